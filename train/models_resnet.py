"""Spiking ResNets: the CIFAR family of depth 6n + 2, and the ImageNet family with every join."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ranvier.train.blocks import ResidualBlock, conv3x3, make_shortcut
from ranvier.train.errors import RangeError
from ranvier.train.multistep import Stepped
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """A residual network for small images.

    blocks     residual blocks of each stage
    widths     channels of each stage; the stem has the first
    strides    of each stage's first block
    shortcut   A (no parameters) or conv (1x1)
    conv_bias  a bias in the convolutions of the blocks
    zero_init  start the last normalization of each branch at 0; None: for ms alone
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    strides: tuple[int, ...] = (1, 2, 2)
    shortcut: str = "A"
    conv_bias: bool = False
    zero_init: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.blocks) == len(self.widths) == len(self.strides) > 0:
            raise RangeError(
                f"model {self.name}: {len(self.blocks)} stages in blocks, {len(self.widths)} in"
                f" widths, {len(self.strides)} in strides; all three need one entry a stage"
            )


def zero_init_wanted(zero_init: bool | None, join: str) -> bool:
    """Whether branches start as zero; by default only ms, whose depth rests on it."""
    return join == "ms" if zero_init is None else zero_init


def branch_alpha(config: ModelConfig) -> float:
    """tdBN's alpha in front of a sum of two branches."""
    return 1 / math.sqrt(2) if config.join == "vanilla" else 1.0


def basic_block(config: ResNetConfig, c_in: int, c_out: int, stride: int) -> ResidualBlock:
    """Two 3x3 convolutions and a shortcut."""
    v = float(config.threshold)
    convs = [
        (
            conv3x3(c_in, c_out, stride, config.conv_bias),
            make_norm(config.norm, c_out, v_threshold=v),
        ),
        (
            conv3x3(c_out, c_out, 1, config.conv_bias),
            make_norm(config.norm, c_out, alpha=branch_alpha(config), v_threshold=v),
        ),
    ]
    shortcut = make_shortcut(
        config.shortcut,
        config.join,
        c_in,
        c_out,
        stride,
        lambda: make_neuron(config),
        norm=config.norm,
        v_threshold=v,
    )
    return ResidualBlock(
        convs,
        shortcut,
        config.join,
        lambda: make_neuron(config),
        zero_init_last=zero_init_wanted(config.zero_init, config.join),
        v_threshold=v,
    )


class Stage(Stepped):
    """Residual blocks in a row, `0`, `1`, ..."""

    def __init__(self, blocks: list[ResidualBlock]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x, *self.children())


class ResNet(Network):
    """Stem convolution, stages of residual blocks, mean over space, linear classes.

    The stem's neuron is missing with ms, whose blocks begin with one; a last neuron follows the
    last block there instead.
    """

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        width = config.widths[0]
        ms = config.join == "ms"
        self.conv = conv3x3(config.in_channels, width)
        self.norm = make_norm(config.norm, width, v_threshold=float(config.threshold))
        self.neuron = None if ms else make_neuron(config)
        for i, (n, c, stride) in enumerate(
            zip(config.blocks, config.widths, config.strides, strict=True), 1
        ):
            first = basic_block(config, width, c, stride)
            rest = [basic_block(config, c, c, 1) for _ in range(n - 1)]
            self.add_module(f"stage{i}", Stage([first, *rest]))
            width = c
        self.last_neuron = make_neuron(config) if ms else None
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, config.num_classes)
        initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def body(self, x: Tensor) -> Tensor:
        stages = [getattr(self, f"stage{i}") for i in range(1, len(self.config.blocks) + 1)]
        return self.seq(x, self.neuron, *stages, self.last_neuron)

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, self.pool, self.flatten, self.fc)
