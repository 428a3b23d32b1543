"""Networks for event data, and for images read column by column.

SEW-7B: the seven blocks of SEW-ResNet (Fang et al., 2021) for DVS-Gesture and CIFAR10-DVS.
Sequential CIFAR: the network of the PSN paper (Fang et al., 2023), T = the image's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ranvier.train.blocks import ResidualBlock, conv3x3
from ranvier.train.errors import RangeError
from ranvier.train.multistep import Stepped
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm


@dataclass(frozen=True)
class SevenBConfig(ModelConfig):
    """Blocks of [1x1 convolution if the width changes, residual block, 2x2 max-pooling].

    widths  channels of each block; the image is halved once a block
    """

    widths: tuple[int, ...] = (64, 64, 64, 64, 128, 128, 128)
    zero_init: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.input_shape[1:]) < 2 ** len(self.widths):
            raise RangeError(
                f"model {self.name}: an image of {self.image_size} pixels cannot be halved"
                f" {len(self.widths)} times; at least {2 ** len(self.widths)} are needed, or"
                " fewer widths"
            )


class SevenBLayer(Stepped):
    """One of the blocks; the first one's convolution is the network's stem."""

    def __init__(self, config: SevenBConfig, c_in: int, c_out: int, first: bool) -> None:
        super().__init__()
        changes = c_in != c_out and not first
        v = float(config.threshold)
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False) if changes else None
        self.norm = make_norm(config.norm, c_out, v_threshold=v) if changes else None
        ms = config.join == "ms"
        self.neuron = make_neuron(config) if (changes or first) and not ms else None
        convs = [
            (conv3x3(c_out, c_out), make_norm(config.norm, c_out, v_threshold=v)) for _ in range(2)
        ]
        self.block = ResidualBlock(
            convs,
            nn.Identity(),
            config.join,
            lambda: make_neuron(config),
            zero_init_last=config.zero_init,
            v_threshold=v,
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x, self.conv, self.norm, self.neuron, self.block, self.pool)


class SevenB(Network):
    """SEW-7B and its variants by join."""

    config: SevenBConfig

    def __init__(self, config: SevenBConfig) -> None:
        super().__init__(config)
        width = config.widths[0]
        self.conv = nn.Conv2d(config.in_channels, width, 1, bias=False)
        self.norm = make_norm(config.norm, width, v_threshold=float(config.threshold))
        c_in = width
        for i, c in enumerate(config.widths, 1):
            self.add_module(f"layer{i}", SevenBLayer(config, c_in, c, first=i == 1))
            c_in = c
        self.last_neuron = make_neuron(config) if config.join == "ms" else None
        height, wide = (n >> len(config.widths) for n in config.input_shape[1:])
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(c_in * height * wide, config.num_classes)
        initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def body(self, x: Tensor) -> Tensor:
        layers = [getattr(self, f"layer{i}") for i in range(1, len(self.config.widths) + 1)]
        return self.seq(x, *layers, self.last_neuron)

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, self.flatten, self.fc)


@dataclass(frozen=True)
class SequentialConfig(ModelConfig):
    """An image read column by column: `steps` must be its width.

    channels  of the six 1-D convolutions; hidden  units of the linear layer
    """

    channels: int = 128
    hidden: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != self.input_shape[2] or self.input_shape[1] % 4:
            raise RangeError(
                f"model {self.name}: steps {self.steps} with images of {self.image_size} pixels;"
                " a step is a column, so steps must equal the width, and the height divide by 4"
            )
        if self.norm == "tdbn-scaled":
            raise RangeError(
                f"model {self.name}: norm 'tdbn-scaled' is for images; take bn, tdbn or none"
            )


def _norm1d(config: SequentialConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    norm = nn.BatchNorm1d(config.channels)
    if config.norm == "tdbn":
        nn.init.constant_(norm.weight, float(config.threshold))
    return norm


class SequentialNet(Network):
    """2 x {3 x [Conv1d, BatchNorm1d, neuron], AvgPool1d 2}, Linear, neuron, Linear.

    `step` takes one column [B, C, H]; `forward` an image [B, C, H, W], whose columns are the steps.
    """

    config: SequentialConfig

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__(config)
        c_in = config.in_channels
        self._order: list[str] = []
        for i in range(1, 7):
            self._put(f"conv{i}", nn.Conv1d(c_in, config.channels, 3, padding=1, bias=False))
            self._put(f"norm{i}", _norm1d(config))
            self._put(f"neuron{i}", make_neuron(config))
            c_in = config.channels
            if i % 3 == 0:
                self._put(f"pool{i // 3}", nn.AvgPool1d(2))
        self._put("flatten", nn.Flatten())
        features = config.channels * (config.input_shape[1] // 4)
        self._put("fc1", nn.Linear(features, config.hidden))
        self._put("neuron7", make_neuron(config))
        self._put("fc2", nn.Linear(config.hidden, config.num_classes))
        initialize(self)

    def _put(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)
        self._order.append(name)

    def _stem_steps(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [W, B, C, H]."""
        if x.ndim == 5:
            raise RangeError(
                f"model {self.config.name}: it reads an image column by column and takes"
                " [batch, C, H, W] alone"
            )
        return x.permute(3, 0, 1, 2)

    def stem(self, x: Tensor) -> Tensor:
        return x

    def body(self, x: Tensor) -> Tensor:
        layers: list[Any] = [getattr(self, name) for name in self._order[:-1]]
        return self.seq(x, *layers)

    def head(self, x: Tensor) -> Tensor:
        last: Any = self.fc2
        return self.seq(x, last)
