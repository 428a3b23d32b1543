"""Networks without shortcuts: VGG, a small convolutional network, a perceptron."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ranvier.train.blocks import conv3x3
from ranvier.train.errors import RangeError
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm

POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


@dataclass(frozen=True)
class PlainConfig(ModelConfig):
    """Convolutions in a row, then linear layers.

    layers     channels of each 3x3 convolution, 0 for a 2x2 pooling
    pool       max or avg
    hidden     units of the linear layers between the last convolution and the classes; no neuron
               follows them if `hidden_neurons` is False
    conv_bias  a bias in the convolutions
    dropout    in front of every linear layer
    """

    layers: tuple[int, ...] = ()
    pool: str = "max"
    hidden: tuple[int, ...] = ()
    hidden_neurons: bool = True
    conv_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise RangeError(f"model {self.name}: pool '{self.pool}' is none of {', '.join(POOLS)}")


class PlainNet(Network):
    """`conv1, norm1, neuron1, pool..., fc1, ...`: one path from the image to the classes."""

    config: PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self._names: list[str] = []
        channels, (height, width) = config.in_channels, config.input_shape[1:]
        n_conv = n_pool = 0
        for c in config.layers:
            if c == 0:
                n_pool += 1
                self._put(f"pool{n_pool}", POOLS[config.pool](2))
                height, width = height // 2, width // 2
                continue
            n_conv += 1
            self._put(f"conv{n_conv}", conv3x3(channels, c, bias=config.conv_bias))
            self._put(
                f"norm{n_conv}", make_norm(config.norm, c, v_threshold=float(config.threshold))
            )
            self._put(f"neuron{n_conv}", make_neuron(config))
            channels = c
        if height * width == 0:
            raise RangeError(
                f"model {config.name}: an image of {config.image_size} pixels is too small for"
                f" {n_pool} poolings; at least {2**n_pool} are needed"
            )
        self._n_stem = min(2, len(self._names))
        self._put("flatten", nn.Flatten())
        self._linear_layers(channels * height * width)
        initialize(self)

    def _put(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)
        self._names.append(name)

    def _linear_layers(self, features: int) -> None:
        config = self.config
        for i, n in enumerate((*config.hidden, config.num_classes), 1):
            if config.dropout:
                self._put(f"dropout{i}", nn.Dropout(config.dropout))
            self._put(f"fc{i}", nn.Linear(features, n))
            if i <= len(config.hidden) and config.hidden_neurons:
                self._put(f"neuron_fc{i}", make_neuron(config))
            features = n

    def _modules_of(self, part: slice) -> list[nn.Module]:
        return [getattr(self, name) for name in self._names[part]]

    def stem(self, x: Tensor) -> Tensor:
        for module in self._modules_of(slice(0, self._n_stem)):
            x = module(x)
        return x

    def body(self, x: Tensor) -> Tensor:
        return self.seq(x, *self._modules_of(slice(self._n_stem, -1)))

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, *self._modules_of(slice(-1, None)))


def vgg_layers(*stages: tuple[int, ...]) -> tuple[int, ...]:
    """Stages of convolutions, each closed by a pooling."""
    return tuple(c for stage in stages for c in (*stage, 0))


VGG9 = vgg_layers((64, 128), (256, 256), (512, 512), (512, 512))
VGG11 = vgg_layers((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = vgg_layers((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
