"""Spiking GhostNets: half of the channels of a layer by 1x1 convolution, half by a depthwise one.

Layout: GhostNet (Han et al., 2020); DFC attention: GhostNetV2 (Tang et al., 2022). Every ReLU is a
neuron; the squeeze-and-excitation and DFC gates stay real-valued, so these are not spike-driven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranvier.train.blocks import conv3x3, make_join
from ranvier.train.errors import RangeError
from ranvier.train.multistep import Stepped
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm

# kernel, expanded channels, output channels, squeeze and excitation, stride
GHOST_ROWS = (
    (3, 16, 16, 0, 1),
    (3, 48, 24, 0, 2),
    (3, 72, 24, 0, 1),
    (5, 72, 40, 1, 2),
    (5, 120, 40, 1, 1),
    (3, 240, 80, 0, 2),
    (3, 200, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 480, 112, 1, 1),
    (3, 672, 112, 1, 1),
    (5, 672, 160, 1, 2),
    (5, 960, 160, 0, 1),
    (5, 960, 160, 1, 1),
    (5, 960, 160, 0, 1),
    (5, 960, 160, 1, 1),
)


@dataclass(frozen=True)
class GhostConfig(ModelConfig):
    """A GhostNet of width 1.0.

    dfc          gate the first Ghost module of the third bottleneck and later by DFC attention
    dfc_half     at half resolution, as published; the compact reconstruction is at full
    channel_mlp  1x1 convolutions to three times the width and back in the last five bottlenecks
    se           squeeze and excitation where the table has it
    rows         bottlenecks: (kernel, expanded, out, se, stride)
    """

    dfc: bool = False
    dfc_half: bool = False
    channel_mlp: bool = False
    se: bool = True
    rows: tuple[tuple[int, ...], ...] = GHOST_ROWS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join not in ("vanilla", "ms"):
            raise RangeError(
                f"model {self.name}: join '{self.join}' does not fit; a Ghost bottleneck adds"
                " currents: vanilla (neuron after the sum) or ms (before the next branch)"
            )
        if self.dfc_half and min(self.input_shape[1:]) < 64:
            raise RangeError(
                f"model {self.name}: dfc_half needs images of 64 pixels or more: its last maps"
                " are too small to halve. Leave dfc_half out."
            )


def _norm(config: ModelConfig, channels: int) -> nn.Module:
    return make_norm(config.norm, channels, v_threshold=float(config.threshold))


def _depthwise(channels: int, kernel: int | tuple[int, int], stride: int = 1) -> nn.Conv2d:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = (size[0] // 2, size[1] // 2)
    return nn.Conv2d(channels, channels, size, stride, pad, groups=channels, bias=False)


class ChannelCat(nn.Module):
    """The channels of both, cut to `channels`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -3)[..., : self.channels, :, :]


class Ghost(Stepped):
    """c_out channels, half of them by a 1x1 convolution, half depthwise from those."""

    def __init__(self, config: ModelConfig, c_in: int, c_out: int, neurons: bool) -> None:
        super().__init__()
        half = math.ceil(c_out / 2)
        self.primary = nn.Conv2d(c_in, half, 1, bias=False)
        self.primary_norm = _norm(config, half)
        self.primary_neuron = make_neuron(config) if neurons else None
        self.cheap = _depthwise(half, 3)
        self.cheap_norm = _norm(config, half)
        self.cheap_neuron = make_neuron(config) if neurons else None
        self.cat = ChannelCat(c_out)

    def forward(self, x: Tensor) -> Tensor:
        a = self.seq(x, self.primary, self.primary_norm, self.primary_neuron)
        b = self.seq(a, self.cheap, self.cheap_norm, self.cheap_neuron)
        return self.cat(a, b)


class Gate(nn.Module):
    """x times a gate, both real."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


class SqueezeExcite(Stepped):
    """Channels weighted by a gate that two small layers compute from their means."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        reduced = max(4, int(channels * 0.25 + 2) // 4 * 4)
        if reduced < 0.9 * channels * 0.25:
            reduced += 4
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.neuron = make_neuron(config)
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.hard_sigmoid = nn.Hardsigmoid()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((-2, -1), keepdim=True)
        gate = self.seq(mean, self.reduce, self.neuron, self.expand, self.hard_sigmoid)
        return self.gate(x, gate)


class DFC(Stepped):
    """Decoupled fully connected attention: a gate [C_out, H, W] from rows and columns of x."""

    def __init__(self, config: ModelConfig, c_in: int, c_out: int, half: bool) -> None:
        super().__init__()
        self.down = nn.AvgPool2d(2) if half else None
        self.point = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.point_norm = _norm(config, c_out)
        self.row = _depthwise(c_out, (1, 5))
        self.row_norm = _norm(config, c_out)
        self.column = _depthwise(c_out, (5, 1))
        self.column_norm = _norm(config, c_out)
        self.sigmoid = nn.Sigmoid()
        self.up = nn.Upsample(scale_factor=2, mode="nearest") if half else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.seq(x, self.down, self.point, self.point_norm, self.row, self.row_norm)
        return self.seq(x, self.column, self.column_norm, self.sigmoid, self.up)


class Bottleneck(Stepped):
    """Ghost to the expanded width, stride, squeeze-excite, Ghost back, and the shortcut."""

    def __init__(self, config: GhostConfig, index: int, c_in: int, row: tuple[int, ...]) -> None:
        super().__init__()
        kernel, expanded, c_out, se, stride = row
        ms = config.join == "ms"
        self.top_neuron = make_neuron(config) if ms else None
        self.ghost1 = Ghost(config, c_in, expanded, neurons=True)
        self.dfc = (
            DFC(config, c_in, expanded, config.dfc_half) if config.dfc and index > 1 else None
        )
        self.gate = Gate() if self.dfc is not None else None
        self.stride_conv = _depthwise(expanded, kernel, stride) if stride > 1 else None
        self.stride_norm = _norm(config, expanded) if stride > 1 else None
        self.se = SqueezeExcite(config, expanded) if se and config.se else None
        self.ghost2 = Ghost(config, expanded, c_out, neurons=False)
        self._channel_mlp(config, index, c_out)
        self.shortcut = self._shortcut(config, c_in, row)
        self.join = make_join(config.join)
        self.neuron = None if ms else make_neuron(config)

    def _channel_mlp(self, config: GhostConfig, index: int, channels: int) -> None:
        wanted = config.channel_mlp and index >= len(config.rows) - 5
        self.mlp_neuron1 = make_neuron(config) if wanted else None
        self.mlp1 = nn.Conv2d(channels, 3 * channels, 1, bias=False) if wanted else None
        self.mlp_neuron2 = make_neuron(config) if wanted else None
        self.mlp2 = nn.Conv2d(3 * channels, channels, 1, bias=False) if wanted else None

    @staticmethod
    def _shortcut(config: GhostConfig, c_in: int, row: tuple[int, ...]) -> nn.Module:
        kernel, _, c_out, _, stride = row
        if stride == 1 and c_in == c_out:
            return nn.Identity()
        return nn.Sequential(
            _depthwise(c_in, kernel, stride),
            _norm(config, c_in),
            nn.Conv2d(c_in, c_out, 1, bias=False),
            _norm(config, c_out),
        )

    def forward(self, a: Tensor) -> Tensor:
        spikes = self.seq(a, self.top_neuron)
        x = self.ghost1(spikes)
        if self.dfc is not None and self.gate is not None:
            x = self.gate(x, self.dfc(spikes))
        x = self.seq(x, self.stride_conv, self.stride_norm, self.se, self.ghost2)
        x = self.seq(x, self.mlp_neuron1, self.mlp1, self.mlp_neuron2, self.mlp2)
        return self.seq(self.join(x, self.seq(a, self.shortcut)), self.neuron)


class GhostNet(Network):
    """Stem at stride 2, sixteen bottlenecks, 960 channels, mean over space, 1280, classes."""

    config: GhostConfig

    def __init__(self, config: GhostConfig) -> None:
        super().__init__(config)
        ms = config.join == "ms"
        self.conv = conv3x3(config.in_channels, 16, 2)
        self.norm = _norm(config, 16)
        self.neuron = None if ms else make_neuron(config)
        c_in, names = 16, []
        for i, row in enumerate(config.rows):
            self.add_module(f"block{i + 1}", Bottleneck(config, i, c_in, row))
            names.append(f"block{i + 1}")
            c_in = row[2]
        self._blocks = names
        self.last_neuron = make_neuron(config) if ms else None
        width = config.rows[-1][1]
        self.tail = nn.Conv2d(c_in, width, 1, bias=False)
        self.tail_norm = _norm(config, width)
        self.tail_neuron = make_neuron(config)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.wide = nn.Conv2d(width, 1280, 1)
        self.wide_neuron = make_neuron(config)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(1280, config.num_classes)
        initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def body(self, x: Tensor) -> Tensor:
        blocks = [getattr(self, name) for name in self._blocks]
        x = self.seq(x, self.neuron, *blocks, self.last_neuron)
        return self.seq(x, self.tail, self.tail_norm, self.tail_neuron)

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, self.pool, self.wide, self.wide_neuron, self.flatten, self.fc)
