"""Spiking ResNets: the CIFAR family of depth 6n + 2, and the ImageNet families, with every join."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ranvier.train.blocks import ResidualBlock, conv3x3, make_shortcut
from ranvier.train.errors import RangeError
from ranvier.train.multistep import Stepped
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm

EXPANSION = {"basic": 1, "bottleneck": 4}
STEMS = ("3x3", "7x7", "7x7-pool", "3x3-deep")


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """A residual network.

    blocks         residual blocks of each stage
    widths         channels of each stage; the stem has the first
    strides        of each stage's first block
    block          basic: two 3x3 convolutions; bottleneck: 1x1, 3x3, 1x1 to four times the width
    stem           3x3; 7x7 at stride 2; 7x7-pool: and a 3x3 max-pooling at stride 2 after its
                   neuron; 3x3-deep: three with bias, the first at stride 2
    shortcut       A (no parameters) or conv (1x1)
    shortcut_pool  the conv shortcut halves by 2x2 averages instead of a stride
    conv_bias      a bias in the convolutions of the blocks
    zero_init      start the last normalization of each branch at 0; None: for ms alone
    dropout        in front of the classes
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    strides: tuple[int, ...] = (1, 2, 2)
    block: str = "basic"
    stem: str = "3x3"
    shortcut: str = "A"
    shortcut_pool: bool = False
    conv_bias: bool = False
    zero_init: bool | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.blocks) == len(self.widths) == len(self.strides) > 0:
            raise RangeError(
                f"model {self.name}: {len(self.blocks)} stages in blocks, {len(self.widths)} in"
                f" widths, {len(self.strides)} in strides; all three need one entry a stage"
            )
        for key, allowed in (("block", tuple(EXPANSION)), ("stem", STEMS)):
            if getattr(self, key) not in allowed:
                raise RangeError(
                    f"model {self.name}: {key} '{getattr(self, key)}' is none of"
                    f" {', '.join(allowed)}"
                )


def zero_init_wanted(zero_init: bool | None, join: str) -> bool:
    """Whether branches start as zero; by default only ms, whose depth rests on it."""
    return join == "ms" if zero_init is None else zero_init


def branch_alpha(config: ModelConfig) -> float:
    """tdBN's alpha in front of a sum of two branches."""
    return 1 / math.sqrt(2) if config.join == "vanilla" else 1.0


def branch_convs(config: ResNetConfig, c_in: int, width: int, stride: int) -> list[nn.Conv2d]:
    """The convolutions of one branch."""
    bias = config.conv_bias
    if config.block == "basic":
        return [conv3x3(c_in, width, stride, bias), conv3x3(width, width, 1, bias)]
    return [
        nn.Conv2d(c_in, width, 1, bias=bias),
        conv3x3(width, width, stride, bias),
        nn.Conv2d(width, width * EXPANSION["bottleneck"], 1, bias=bias),
    ]


def residual_block(config: ResNetConfig, c_in: int, width: int, stride: int) -> ResidualBlock:
    """One block of the configuration's kind; its output has width x EXPANSION channels."""
    v = float(config.threshold)
    convs = branch_convs(config, c_in, width, stride)
    last = len(convs) - 1
    branch = [
        (
            conv,
            make_norm(
                config.norm,
                conv.out_channels,
                alpha=branch_alpha(config) if i == last else 1.0,
                v_threshold=v,
            ),
        )
        for i, conv in enumerate(convs)
    ]
    shortcut = make_shortcut(
        config.shortcut,
        config.join,
        c_in,
        convs[last].out_channels,
        stride,
        lambda: make_neuron(config),
        norm=config.norm,
        v_threshold=v,
        pool=config.shortcut_pool,
    )
    return ResidualBlock(
        branch,
        shortcut,
        config.join,
        lambda: make_neuron(config),
        zero_init_last=zero_init_wanted(config.zero_init, config.join),
        v_threshold=v,
    )


def make_stem(kind: str, c_in: int, width: int) -> nn.Module:
    """The first convolution (or three) of a network."""
    if kind == "3x3":
        return conv3x3(c_in, width)
    if kind == "3x3-deep":
        return nn.Sequential(
            conv3x3(c_in, width, 2, True),
            conv3x3(width, width, 1, True),
            conv3x3(width, width, 1, True),
        )
    return nn.Conv2d(c_in, width, 7, 2, 3, bias=False)


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
        self.conv = make_stem(config.stem, config.in_channels, width)
        self.norm = make_norm(config.norm, width, v_threshold=float(config.threshold))
        self.neuron = None if ms else make_neuron(config)
        self.max_pool = nn.MaxPool2d(3, 2, 1) if config.stem == "7x7-pool" else None
        stages = zip(config.blocks, config.widths, config.strides, strict=True)
        for i, (n, c, stride) in enumerate(stages, 1):
            c_out = c * EXPANSION[config.block]
            first = residual_block(config, width, c, stride)
            rest = [residual_block(config, c_out, c, 1) for _ in range(n - 1)]
            self.add_module(f"stage{i}", Stage([first, *rest]))
            width = c_out
        self.last_neuron = make_neuron(config) if ms else None
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.fc = nn.Linear(width, config.num_classes)
        initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def body(self, x: Tensor) -> Tensor:
        stages = [getattr(self, f"stage{i}") for i in range(1, len(self.config.blocks) + 1)]
        return self.seq(x, self.neuron, self.max_pool, *stages, self.last_neuron)

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, self.pool, self.flatten, self.dropout, self.fc)
