"""SynA-ResNet: spikes joined by OR, attention on the backbone, inhibition on the shortcuts.

Layout of ResNet-18; only the three units that halve the image have a shortcut. Each branch is
evaluated once, so that the join is a true OR. Source: arXiv 2311.06570 and the released code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranvier.train.blocks import conv3x3, make_join
from ranvier.train.errors import RangeError, ShapeError, UnsupportedError
from ranvier.train.multistep import Stepped
from ranvier.train.networks import ModelConfig, Network, initialize, make_neuron
from ranvier.train.norms import make_norm

DIMENSIONS = ("t", "c", "s")


@dataclass(frozen=True)
class SynAConfig(ModelConfig):
    """An OR-joined spiking ResNet-18.

    attention   the dimensions attended to, a subset of "tcs" (time, channels, space); "" for none
    ma_after    which convolution of a unit the backbone's attention follows: 1 or 2
    reduction   of the attention's hidden layer over time
    c_reduction of the one over channels
    kernel      of the attention over space
    stem_pool   stem at stride 2 with 3x3 max-pooling, for event data
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    attention: str = "t"
    ma_after: int = 2
    reduction: int = 4
    c_reduction: int = 16
    kernel: int = 3
    stem_pool: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.attention) - set(DIMENSIONS) or self.ma_after not in (1, 2):
            raise RangeError(
                f"model {self.name}: attention '{self.attention}' after convolution"
                f" {self.ma_after}; a subset of 'tcs', after 1 or 2"
            )
        if self.join not in ("or", "sew-and", "sew-iand", "sew"):
            raise RangeError(
                f"model {self.name}: join '{self.join}' does not fit; its shortcuts carry spikes:"
                " or (the published one), sew, sew-and, sew-iand"
            )


class Attention(Stepped):
    """y = ReLU(gate x): MA with a sigmoid gate, IA with a neuron's binary gate.

    The gate over time is M(mean) + M(max) with M: T -> T / r -> T; over channels likewise; over
    space a convolution of the mean and the maximum. It looks at all steps: no step-by-step form.
    """

    host_only = "a gate computed from all steps, later ones too, multiplies every current"

    def __init__(self, config: SynAConfig, channels: int, inhibit: bool) -> None:
        super().__init__()
        self.steps, self.inhibit = config.steps, inhibit
        self.dimensions = config.attention
        if "t" in self.dimensions:
            self.time = _bottleneck(config.steps, config.reduction)
        if "c" in self.dimensions:
            self.channel = _bottleneck(channels, config.c_reduction)
        if "s" in self.dimensions:
            self.space = nn.Conv2d(2, 1, config.kernel, padding=config.kernel // 2, bias=False)
        for name in self.dimensions:
            self.add_module(f"gate_{name}", make_neuron(config) if inhibit else nn.Sigmoid())
        self.relu = nn.ReLU()

    def _gate(self, name: str, score: Tensor) -> Tensor:
        return getattr(self, f"gate_{name}")(score)

    def _over_time(self, x: Tensor) -> Tensor:
        mean, top = x.mean((2, 3, 4)).t(), x.amax((2, 3, 4)).t()
        score = (self.time(mean) + self.time(top)).t()
        return self._gate("t", score[:, :, None, None, None])

    def _over_channels(self, x: Tensor) -> Tensor:
        score = self.channel(x.mean((0, 3, 4))) + self.channel(x.amax((0, 3, 4)))
        return self._gate("c", score[None, :, :, None, None])

    def _over_space(self, x: Tensor) -> Tensor:
        maps = torch.stack([x.mean((0, 2)), x.amax((0, 2))], 1)
        return self._gate("s", self.space(maps)[None])

    def forward(self, x: Tensor) -> Tensor:
        if not self.multi_step:
            raise UnsupportedError(
                "attention of SynA looks at all steps together, so it cannot run step by step;"
                " build the network with attention='', or keep it on the host"
            )
        if "t" in self.dimensions and len(x) != self.steps:
            raise ShapeError(
                f"attention over time is built for {self.steps} steps and met {len(x)};"
                " build the network with that many steps"
            )
        gates = {"t": self._over_time, "c": self._over_channels, "s": self._over_space}
        for name in self.dimensions:
            x = gates[name](x) * x
        return self.relu(x)


def _bottleneck(n: int, reduction: int) -> nn.Module:
    hidden = max(1, n // reduction)
    return nn.Sequential(
        nn.Linear(n, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, n, bias=False)
    )


class InhibitedShortcut(Stepped):
    """1x1 convolution at a stride, normalization, inhibitory attention, neuron."""

    def __init__(self, config: SynAConfig, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.norm = make_norm(config.norm, c_out, v_threshold=float(config.threshold))
        self.attention = Attention(config, c_out, inhibit=True) if config.attention else None
        self.neuron = make_neuron(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x, self.conv, self.norm, self.attention, self.neuron)


class Unit(Stepped):
    """Two convolutions; where it halves the image, a shortcut joins. `pruned` leaves it out."""

    def __init__(self, config: SynAConfig, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        v = float(config.threshold)
        self.conv1, self.conv2 = conv3x3(c_in, c_out, stride), conv3x3(c_out, c_out)
        self.norm1, self.norm2 = (make_norm(config.norm, c_out, v_threshold=v) for _ in range(2))
        ma = Attention(config, c_out, inhibit=False) if config.attention else None
        self.attention1 = ma if config.ma_after == 1 else None
        self.attention2 = ma if config.ma_after == 2 else None
        self.neuron1, self.neuron2 = make_neuron(config), make_neuron(config)
        self.shortcut = InhibitedShortcut(config, c_in, c_out, stride) if stride > 1 else None
        self.join = make_join(config.join) if stride > 1 else None
        self.pruned = False

    def forward(self, x: Tensor) -> Tensor:
        a = self.seq(x, self.conv1, self.norm1, self.attention1, self.neuron1)
        a = self.seq(a, self.conv2, self.norm2, self.attention2, self.neuron2)
        if self.shortcut is None or self.join is None or self.pruned:
            return a
        return self.join(a, self.shortcut(x))


class SynANet(Network):
    """Stem, eight units, mean over space, classes. With attention it needs all steps at once."""

    config: SynAConfig

    def __init__(self, config: SynAConfig) -> None:
        super().__init__(config)
        width = config.widths[0]
        self.conv = conv3x3(config.in_channels, width, 2 if config.stem_pool else 1)
        self.norm = make_norm(config.norm, width, v_threshold=float(config.threshold))
        self.neuron = make_neuron(config)
        self.max_pool = nn.MaxPool2d(3, 2, 1) if config.stem_pool else None
        self._units = []
        for i, c in enumerate(config.widths, 1):
            for j, c_in in enumerate((width, c)):
                name = f"unit{i}_{j + 1}"
                self.add_module(name, Unit(config, c_in, c, 2 if i > 1 and j == 0 else 1))
                self._units.append(name)
            width = c
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, config.num_classes)
        initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def body(self, x: Tensor) -> Tensor:
        return self.seq(x, self.neuron, self.max_pool, *(getattr(self, n) for n in self._units))

    def head(self, x: Tensor) -> Tensor:
        return self.seq(x, self.pool, self.flatten, self.fc)


def shortcut_rates(net: SynANet, batches: Iterable[Tensor]) -> dict[str, float]:
    """Spikes per neuron and step of every shortcut over all batches, by the unit's name.

    The measure of natural pruning: a shortcut at 0 contributes nothing.
    """
    spikes: dict[str, float] = {}
    sites: dict[str, int] = {}
    hooks = []
    for name, unit in net.named_modules():
        if isinstance(unit, Unit) and unit.shortcut is not None:

            def count(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
                spikes[name] = spikes.get(name, 0.0) + float(out.sum(dtype=torch.float64))
                sites[name] = sites.get(name, 0) + out.numel()

            hooks.append(unit.shortcut.neuron.register_forward_hook(count))
    was_training = net.training
    try:
        net.eval()
        with torch.no_grad():
            for x in batches:
                net(x)
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: spikes[name] / sites[name] for name in spikes}


def prune_shortcuts(net: SynANet, rates: dict[str, float], below: float = 0.0) -> list[str]:
    """Leaves out the shortcuts whose rate is at most `below`; returns their units' names.

    At 0 the outputs stay the same to the bit, since OR with silence is the branch itself; above 0
    they may change: evaluate again.
    """
    gone = [name for name, rate in rates.items() if rate <= below]
    for name in gone:
        unit = net.get_submodule(name)
        assert isinstance(unit, Unit)
        unit.pruned = True
    return gone
