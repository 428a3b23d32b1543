"""What a slice of a population needs on a core: neurons, synapse memory, axons.

A slice is a box of channels and rows (all columns) of a (C, H, W) population, or a range of a vector.
Synapse memory is modelled, chip by chip:

loihi1  every synapse is stored: weight bits + 10 index bits (1024 compartments), in blocks of up to 64
        synapses with 10 header bits each, rounded up to 64-bit words; one list an input axon.
        Source: the axon memory rule of nengo-loihi's synapse configuration, with a 10-bit index.
loihi2  a convolution's kernel is stored once a core and shared by all positions; a dense projection
        stores every weight; 64 bits an input axon. Neuron state also lives in these 192 KB; how much is
        not public and is not counted, so the result is a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ranvier.deploy.chip import Chip
from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Population, Program, Projection
from ranvier.export.linear import image

INDEX_BITS = 10
HEADER_BITS = 10
BLOCK = 64
WORD = 64
AXON_BITS = 64


@dataclass(frozen=True)
class Slice:
    """Channels c0..c1 and rows r0..r1 (ends left out) of a population seen as (C, H, W)."""

    population: str
    c0: int
    c1: int
    r0: int
    r1: int
    width: int

    @property
    def neurons(self) -> int:
        return (self.c1 - self.c0) * (self.r1 - self.r0) * self.width

    def __str__(self) -> str:
        rows = f", rows {self.r0}..{self.r1 - 1}" if (self.r0, self.r1) != (0, 1) else ""
        return f"{self.population}[channels {self.c0}..{self.c1 - 1}{rows}]"


@dataclass(frozen=True)
class Need:
    """Of one slice, or the sum over a core. Axons may be None-checked by the chip."""

    neurons: int = 0
    synapse_bits: int = 0
    in_axons: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(
            self.neurons + other.neurons,
            self.synapse_bits + other.synapse_bits,
            self.in_axons + other.in_axons,
        )

    def over(self, chip: Chip) -> str | None:
        """The first resource of a core that this exceeds, with both numbers; None where it fits."""
        for name, used, limit in self.against(chip):
            if used > limit:
                return f"{used:,} {name.replace('_', ' ')} on one core; {chip.name} has {limit:,}"
        return None

    def against(self, chip: Chip) -> Iterator[tuple[str, int, int]]:
        """(resource, used, limit) for all that the chip limits."""
        yield "neurons", self.neurons, int(chip.neurons_per_core.value)
        yield "synapse_bits", self.synapse_bits, int(chip.synapse_bits.value)
        if chip.in_axons is not None:
            yield "in_axons", self.in_axons, int(chip.in_axons.value)

    def share(self, chip: Chip) -> float:
        """The fullest resource, used / limit."""
        return max(used / limit for _, used, limit in self.against(chip))


def cut(population: Population, n_channels: int, n_rows: int) -> list[Slice]:
    """The population in n_channels x n_rows nearly equal boxes."""
    channels, height, width = image(population.shape)
    cs = np.linspace(0, channels, n_channels + 1).astype(int)
    rs = np.linspace(0, height, n_rows + 1).astype(int)
    return [
        Slice(population.name, int(c0), int(c1), int(r0), int(r1), width)
        for c0, c1 in zip(cs, cs[1:], strict=False)
        for r0, r1 in zip(rs, rs[1:], strict=False)
        if c1 > c0 and r1 > r0
    ]


def need(program: Program, part: Slice, chip: Chip) -> Need:
    """What the slice and all synapses onto it need."""
    total = Need(neurons=part.neurons)
    for projection in program.into(part.population):
        total = total + _synapses(projection, part, chip)
    return total


def _synapses(p: Projection, part: Slice, chip: Chip) -> Need:
    shared = chip.graded  # Loihi 2 shares kernels
    match p.map:
        case ConvMap():
            axons, synapses, kernel = _conv(p.map, part)
            stored = kernel if shared else synapses
        case DenseMap():
            axons = p.map.weight.shape[1]
            stored = synapses = axons * part.neurons
        case OneToOne():
            axons = stored = synapses = part.neurons
    if shared:
        return Need(synapse_bits=stored * p.bits + axons * AXON_BITS, in_axons=axons)
    return Need(synapse_bits=axons * axon_bits(synapses / max(axons, 1), p.bits), in_axons=axons)


def axon_bits(synapses: float, weight_bits: int) -> int:
    """Memory of one input axon's list on Loihi 1, in bits.

    >>> axon_bits(64, 8)
    1216
    """
    whole = int(np.ceil(synapses))
    full, rest = divmod(whole, BLOCK)
    sizes = [BLOCK] * full + [rest] * bool(rest)
    words = sum(-(-(n * (weight_bits + INDEX_BITS) + HEADER_BITS) // WORD) for n in sizes)
    return words * WORD


def _conv(conv: ConvMap, part: Slice) -> tuple[int, int, int]:
    """(source neurons, synapses, kernel weights) of a slice of a convolution's target."""
    c_out, per_group, k_y, k_x = conv.weight.shape
    step = c_out // conv.groups
    groups = len({c // step for c in range(part.c0, part.c1)})
    taps_y, rows = _axis(conv, 0, part.r0, part.r1)
    taps_x, columns = _axis(conv, 1, 0, conv.out_shape[2])
    channels = part.c1 - part.c0
    return (
        groups * per_group * rows * columns,
        channels * per_group * taps_y * taps_x,
        channels * per_group * k_y * k_x,
    )


def _axis(conv: ConvMap, axis: int, start: int, end: int) -> tuple[int, int]:
    """(taps that fall on the source, source places touched) for targets start..end along an axis."""
    kernel, n = conv.weight.shape[2 + axis], conv.in_shape[1 + axis]
    at = np.arange(start, end)[:, None] * conv.stride[axis] - conv.padding[axis]
    at = at + np.arange(kernel)[None] * conv.dilation[axis]
    inside = at[(at >= 0) & (at < n)]
    return int(inside.size), int(np.unique(inside).size)
