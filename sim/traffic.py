"""Messages on and between cores, once a program is placed; counted neuron by neuron."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranvier.deploy.placement import Placement
from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Projection
from ranvier.export.linear import image
from ranvier.sim.ledger import Ledger
from ranvier.train.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Traffic:
    """Messages by the cores they go between.

    between  int64 `[n_cores + 1, n_cores]`: row from core, the last row from outside (the input);
             a neuron's message goes once to each core that holds a synapse of it with a weight
    """

    between: np.ndarray

    @property
    def n_on_core(self) -> int:
        """Messages that stay on their core."""
        return int(np.trace(self.between))

    @property
    def n_between(self) -> int:
        """Messages from one core to another."""
        return int(self.between[:-1].sum()) - self.n_on_core

    @property
    def n_from_outside(self) -> int:
        return int(self.between[-1].sum())


def messages_by_core(ledger: Ledger, placement: Placement) -> Traffic:
    """The Traffic of what a ledger counted on a placement of the same program.

    Raises ShapeError where the ledger holds no counts by neuron, or those of another program.
    """
    program = placement.program
    sizes = {p.name: p.size for p in program}
    if {n: len(c) for n, c in ledger.neurons.items()} != sizes:
        raise ShapeError(
            "traffic: the ledger has no counts by neuron of this program; take Result.ledger, or a "
            "ledger saved as HDF5"
        )
    between = np.zeros((placement.n_cores + 1, placement.n_cores), np.int64)
    homes = {name: _homes(placement, name, n) for name, n in sizes.items()}
    for name, counts in ledger.neurons.items():
        for core in range(placement.n_cores):
            reached = np.zeros(sizes[name], bool)
            for projection in program.out_of(name):
                inside = homes[projection.target] == core
                if inside.any():
                    reached |= reaches(projection, inside)
            np.add.at(between[:, core], homes[name][reached], counts[reached])
    return Traffic(between)


def _homes(placement: Placement, name: str, size: int) -> np.ndarray:
    """The core of each neuron; one beyond the last where it is on none, as an input is."""
    shape = image(placement.program.populations[name].shape)
    home = np.full(shape, placement.n_cores)
    for placed in placement.slices:
        part = placed.part
        if part.population == name:
            home[part.c0 : part.c1, part.r0 : part.r1] = placed.core
    return home.reshape(size)


def reaches(projection: Projection, inside: np.ndarray) -> np.ndarray:
    """Which source neurons have a synapse with a weight into target neurons: bool `[n_in]`.

    inside  bool `[n_out]`: the target neurons that are meant
    """
    match projection.map:
        case DenseMap(weight=weight):
            return np.asarray((weight[inside] != 0).any(0))
        case OneToOne(weight=weight, shape=shape):
            return inside & np.broadcast_to(weight != 0, shape).reshape(-1)
        case ConvMap() as conv:
            return _conv_reaches(conv, inside.reshape(conv.out_shape))


def _conv_reaches(conv: ConvMap, inside: np.ndarray) -> np.ndarray:
    """Channels of the target that mean the same places are taken together."""
    (py, px), (sy, sx), (dy, dx) = conv.padding, conv.stride, conv.dilation
    channels, height, width = conv.in_shape
    rows, cols = conv.out_shape[1:]
    found = np.zeros((channels, height + 2 * py, width + 2 * px), bool)
    planes, kind = np.unique(inside.reshape(len(inside), -1), axis=0, return_inverse=True)
    for k, plane in enumerate(planes):
        if not plane.any():
            continue
        taps = _taps(conv, kind.reshape(-1) == k)
        for i, j in np.ndindex(taps.shape[1:]):
            ys = slice(i * dy, i * dy + (rows - 1) * sy + 1, sy)
            xs = slice(j * dx, j * dx + (cols - 1) * sx + 1, sx)
            found[:, ys, xs] |= taps[:, i, j, None, None] & plane.reshape(rows, cols)
    return found[:, py : py + height, px : px + width].reshape(-1)


def _taps(conv: ConvMap, chosen: np.ndarray) -> np.ndarray:
    """Whether an input channel has a weight at a place of the kernel, to a chosen output channel."""
    used = (conv.weight != 0) & chosen[:, None, None, None]
    grouped = used.reshape(conv.groups, -1, *used.shape[1:]).any(1)
    return np.asarray(grouped.reshape(conv.in_shape[0], *used.shape[2:]))
