"""SSNN: stages that use fewer and fewer time steps (Ding et al., AAAI 2024).

Between two stages a temporal transformer shares the sum of T1 spike maps over T2 steps; early
classifiers behind every stage but the last train with it and are left out in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.train.blocks import conv3x3
from ranvier.train.errors import RangeError, ShapeError, UnsupportedError
from ranvier.train.models_resnet import ResNetConfig, Stage, residual_block
from ranvier.train.multistep import Stepped, set_multi_step
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm


@dataclass(frozen=True)
class SSNNConfig(ResNetConfig):
    """Stages of VGG units (3x3 convolution, normalization, neuron) or of residual blocks.

    stage_steps  time steps of each stage, never rising; `steps` is the first
    units        vgg: convolutions of each stage, as channels; a 2x2 average-pooling closes a stage
    kind         vgg or resnet (`blocks`, `widths`, `strides` as in ResNetConfig)
    softmax_of   f in softmax(f(W o)): none or relu; the published text leaves it open
    """

    stage_steps: tuple[int, ...] = (8, 6, 4, 2)
    units: tuple[tuple[int, ...], ...] = ((64, 128), (256, 256), (512, 512), (512, 512))
    kind: str = "vgg"
    softmax_of: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.units) if self.kind == "vgg" else len(self.blocks)
        falling = list(self.stage_steps) == sorted(self.stage_steps, reverse=True)
        if self.kind not in ("vgg", "resnet") or self.softmax_of not in ("none", "relu"):
            raise RangeError(
                f"model {self.name}: kind '{self.kind}' (vgg, resnet), softmax_of"
                f" '{self.softmax_of}' (none, relu)"
            )
        if len(self.stage_steps) != n or not falling or self.stage_steps[-1] < 1:
            raise RangeError(
                f"model {self.name}: stage_steps {self.stage_steps} for {n} stages; one number a"
                " stage is needed, none above the one before, all 1 or more"
            )
        if self.steps != self.stage_steps[0]:
            raise RangeError(
                f"model {self.name}: steps {self.steps} but the first stage has"
                f" {self.stage_steps[0]}; they must agree"
            )


class TemporalTransformer(nn.Module):
    """[T1, B, ...] -> [T2, B, ...]: I[t'] = d[t'] sum_t O[t], d = softmax(f(W o)).

    o are the means of O per step. What leaves is what came: sum I = sum O.
    """

    def __init__(self, t_in: int, t_out: int, softmax_of: str = "none") -> None:
        super().__init__()
        self.t_in, self.t_out, self.softmax_of = t_in, t_out, softmax_of
        self.weight = nn.Parameter(torch.empty(t_out, t_in))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def shares(self, x: Tensor) -> Tensor:
        """d, [T2, B], summing to 1 over time."""
        score = self.weight @ x.flatten(2).mean(2)
        return torch.softmax(torch.relu(score) if self.softmax_of == "relu" else score, 0)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.t_in:
            raise ShapeError(
                f"temporal transformer: {len(x)} steps came, it takes {self.t_in} to {self.t_out}"
            )
        d = self.shares(x)
        return d.view(*d.shape, *[1] * (x.ndim - 2)) * x.sum(0)

    def extra_repr(self) -> str:
        return f"{self.t_in} -> {self.t_out}"


class VGGStage(Stepped):
    """Convolution, normalization and neuron of each unit, then a 2x2 average-pooling."""

    def __init__(self, config: SSNNConfig, c_in: int, units: Sequence[int], first: bool) -> None:
        super().__init__()
        self._order: list[str] = []
        for i, c in enumerate(units, 1):
            if not (first and i == 1):  # the first convolution is the network's stem
                self._put(f"conv{i}", conv3x3(c_in, c, bias=config.conv_bias))
                self._put(f"norm{i}", make_norm(config.norm, c, v_threshold=config.threshold))
            self._put(f"neuron{i}", make_neuron(config))
            c_in = c
        self._put("pool", nn.AvgPool2d(2))

    def _put(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)
        self._order.append(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x, *(getattr(self, name) for name in self._order))


class EarlyClassifier(Stepped):
    """3x3 convolution, normalization, neuron, mean over space, linear: [T, B, classes]."""

    def __init__(self, config: SSNNConfig, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)
        self.norm = make_norm(config.norm, channels, v_threshold=config.threshold)
        self.neuron = make_neuron(config)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x, self.conv, self.norm, self.neuron, self.pool, self.flatten, self.fc)


class SSNN(Network):
    """Stages with their own numbers of steps, temporal transformers between, classes at the end.

    `net(x)` returns the last head's mean over its steps; `net.heads(x)` those of all heads, for
    `stage_loss`. There is no `step`: the number of steps changes inside.
    """

    config: SSNNConfig

    def __init__(self, config: SSNNConfig) -> None:
        super().__init__(config)
        vgg = config.kind == "vgg"
        width = config.units[0][0] if vgg else config.widths[0]
        self.conv = conv3x3(config.in_channels, width)
        self.norm = make_norm(config.norm, width, v_threshold=config.threshold)
        ms = not vgg and config.join == "ms"
        self.neuron = None if vgg or ms else make_neuron(config)
        n = len(config.stage_steps)
        for i in range(n):
            stage, width = self._stage(i, width)
            self.add_module(f"stage{i + 1}", stage)
            if i + 1 < n:
                before, after = config.stage_steps[i : i + 2]
                t = TemporalTransformer(before, after, config.softmax_of)
                self.add_module(f"shrink{i + 1}", t)
                self.add_module(f"early{i + 1}", EarlyClassifier(config, width))
        self.last_neuron = make_neuron(config) if ms else None
        side = [s >> n for s in config.input_shape[1:]]
        self.pool = nn.Identity() if vgg else nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width * (side[0] * side[1] if vgg else 1), config.num_classes)
        initialize(self)

    def _stage(self, i: int, width: int) -> tuple[nn.Module, int]:
        config = self.config
        if config.kind == "vgg":
            return VGGStage(config, width, config.units[i], first=i == 0), config.units[i][-1]
        c = config.widths[i]
        first = residual_block(config, width, c, config.strides[i])
        rest = [residual_block(config, c, c, 1) for _ in range(config.blocks[i] - 1)]
        return Stage([first, *rest]), c

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def _run(self, x: Tensor, early: bool) -> list[Tensor]:
        """Outputs [T_i, B, classes] of the heads: the last alone, or all."""
        self._check(x)
        self._set_mode(True)
        x = self.seq(self._stem_steps(x), self.neuron)
        outputs = []
        n = len(self.config.stage_steps)
        for i in range(1, n + 1):
            x = getattr(self, f"stage{i}")(x)
            if i < n:
                if early:
                    outputs.append(getattr(self, f"early{i}")(x))
                x = getattr(self, f"shrink{i}")(x)
        x = self.seq(x, self.last_neuron, self.pool, self.flatten, self.fc)
        return [*outputs, x]

    def sequence(self, x: Tensor) -> Tensor:
        return self._run(x, early=False)[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(self.sequence(x))

    def heads(self, x: Tensor) -> list[Tensor]:
        """Logits [B, classes] of every early classifier and of the last head."""
        return [self.read_out(y) for y in self._run(x, early=True)]

    def step(self, x: Tensor) -> Tensor:
        raise UnsupportedError(
            f"model {self.config.name}: the number of time steps shrinks inside, from"
            f" {self.config.stage_steps[0]} to {self.config.stage_steps[-1]}; export its stages one"
            " by one and keep the temporal transformers on the host"
        )

    def inference_state(self) -> dict[str, Any]:
        """The state without the early classifiers, which only training needs."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("early")}


def average_steps(net: SSNN) -> float:
    """T_avg = sum n_i T_i / sum n_i, n_i the convolutions with a neuron of stage i."""
    config = net.config
    n = [len(u) for u in config.units] if config.kind == "vgg" else [2 * b for b in config.blocks]
    if config.kind == "resnet":
        n[0] += 1  # the stem
    return sum(a * b for a, b in zip(n, config.stage_steps, strict=True)) / sum(n)


def stage_loss(
    heads: Sequence[Tensor], y: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """sum_i weight_i cross_entropy(heads[i], y); default weights 0.5 early, 1 for the last.

    The published weights are not known; the paper reports that they hardly matter.
    Raises RangeError unless there is a weight for each head.
    """
    given = [0.5] * (len(heads) - 1) + [1.0] if weights is None else list(weights)
    if len(given) != len(heads):
        raise RangeError(f"stage_loss: {len(given)} weights for {len(heads)} heads")
    losses = [w * nn.functional.cross_entropy(h, y) for w, h in zip(given, heads, strict=True)]
    return torch.stack(losses).sum()


class SSNNPart(Network):
    """One stage of an SSNN as a network of its own, with that stage's number of steps.

    The first part takes pixels; a later one what the temporal
    transformer before it gives, [T_i, B, C, H, W]; the last one ends at the classes.
    """

    def __init__(self, net: SSNN, index: int) -> None:
        whole, n = net.config, len(net.config.stage_steps)
        super().__init__(_part_config(whole, index))
        self.first, self.last = index == 1, index == n
        if self.first:
            self.conv, self.norm, self.neuron = net.conv, net.norm, net.neuron
        self.stage = getattr(net, f"stage{index}")
        if self.last:
            self.last_neuron, self.pool = net.last_neuron, net.pool
            self.flatten, self.fc = net.flatten, net.fc

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if self.first else x

    def body(self, x: Tensor) -> Tensor:
        neuron = self.neuron if self.first else None
        return self.seq(x, neuron, self.stage, self.last_neuron if self.last else None)

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, self.pool, self.flatten, self.fc) if self.last else x


def _part_config(whole: SSNNConfig, index: int) -> ModelConfig:
    """The input of part `index` (from 1) as a plain configuration."""
    channels, (height, width) = whole.in_channels, whole.input_shape[1:]
    for i in range(index - 1):
        channels = whole.units[i][-1] if whole.kind == "vgg" else whole.widths[i]
        stride = 2 if whole.kind == "vgg" else whole.strides[i]
        height, width = -(-height // stride), -(-width // stride)
    if whole.kind == "vgg" and index > 1:
        height, width = (side >> (index - 1) for side in whole.input_shape[1:])
    return ModelConfig(
        name=f"{whole.name}/stage{index}",
        steps=whole.stage_steps[index - 1],
        in_channels=channels,
        num_classes=whole.num_classes,
        image_size=(height, width),
        readout=whole.readout,
    )


def parts(net: SSNN) -> list[SSNNPart]:
    """Copies of the stages as networks of their own; `net.shrink1`, ... stand between them.

    net(x) is the last part's readout, each part run on what the transformer makes of the one
    before. `ranvier.deploy.staged` compiles them.
    """
    made = copy.deepcopy(net)
    set_multi_step(made, False)
    n = len(net.config.stage_steps)
    return [SSNNPart(made, i).train(net.training) for i in range(1, n + 1)]
