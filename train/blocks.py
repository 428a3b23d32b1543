"""Residual blocks: how a branch and its shortcut meet, and where the neurons stand.

    vanilla   a -> C B N C B -> + shortcut(a) -> N
    sew ...   a -> C B N C B N = A ; out = g(A, shortcut(a)),  g = ADD, AND, IAND or OR
    ms        a -> N C B N C B -> + shortcut(a)                no neuron after the sum

C is a convolution, B batch normalization, N a neuron. The classes `Add`, `And`, `Iand`, `Or` and
`ShortcutA` are leaves: whoever traces a network reads their meaning, not their code.
Sources: SEW-ResNet (Fang et al., 2021), MS-ResNet (Hu et al., 2024), OR: SynA-ResNet (2311.06570).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ranvier.train.errors import RangeError, ShapeError
from ranvier.train.multistep import Stepped
from ranvier.train.norms import make_norm, zero_init

NeuronFactory = Callable[[], nn.Module]


class Join(nn.Module):
    """Base of the joins of a branch `a` with its shortcut `s`; `kind` is the name in JOINS."""

    kind: str

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind


class Add(Join):
    """a + s: currents for vanilla and ms, spike counts 0, 1, 2, ... for sew."""

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        return a + s


class And(Join):
    """a s: a spike where both spike."""

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        return a * s


class Iand(Join):
    """(1 - a) s: the branch silences the shortcut."""

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        return (1 - a) * s


class Or(Join):
    """a + s - a s: a spike where either spikes; each side evaluated once."""

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        return a + s - a * s


JOINS: dict[str, type[Join]] = {
    "vanilla": Add,
    "sew": Add,
    "sew-and": And,
    "sew-iand": Iand,
    "ms": Add,
    "or": Or,
}


def make_join(kind: str) -> Join:
    """The join of that kind. Raises RangeError if `kind` is none of JOINS."""
    if kind not in JOINS:
        raise RangeError(f"join: '{kind}' is none of {', '.join(JOINS)}")
    return JOINS[kind](kind)


class ShortcutA(nn.Module):
    """The parameter-free shortcut: every `stride`-th pixel, and zeros for the added channels.

    stride       1 or more, both axes
    c_in, c_out  channels; the c_out - c_in zero channels come after the others (`pad`)
    Source: He et al. 2016, option A.
    """

    def __init__(self, stride: int, c_in: int, c_out: int) -> None:
        super().__init__()
        if c_out < c_in or stride < 1:
            raise ShapeError(
                f"ShortcutA: {c_in} to {c_out} channels at stride {stride}; it can only add"
                " channels and subsample. Use shortcut='conv'."
            )
        self.stride, self.c_in, self.c_out = stride, c_in, c_out
        self.pad = (0, c_out - c_in)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, *self.pad))

    def extra_repr(self) -> str:
        return f"{self.c_in}, {self.c_out}, stride={self.stride}"


def conv3x3(c_in: int, c_out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias)


class ConvShortcut(Stepped):
    """1x1 convolution, normalization and, for the spike joins, a neuron; `pool` averages first."""

    def __init__(
        self, conv: nn.Conv2d, norm: nn.Module, neuron: nn.Module | None, pool: nn.Module | None
    ) -> None:
        super().__init__()
        self.pool, self.conv, self.norm, self.neuron = pool, conv, norm, neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x, self.pool, self.conv, self.norm, self.neuron)


def make_shortcut(
    kind: str,
    join: str,
    c_in: int,
    c_out: int,
    stride: int,
    neuron: NeuronFactory,
    *,
    norm: str = "bn",
    v_threshold: float = 1.0,
    pool: bool = False,
) -> nn.Module:
    """What carries a block's input to its join: nothing, option "A", or a 1x1 convolution.

    A neuron ends the convolution for the joins that need spikes, none for vanilla and ms.
    pool  halve by 2x2 averages and convolve at stride 1 (MS-104)
    Raises RangeError for another kind.
    """
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    if kind == "A":
        return ShortcutA(stride, c_in, c_out)
    if kind != "conv":
        raise RangeError(f"shortcut: '{kind}' is none of A, conv")
    pool = pool and stride > 1
    return ConvShortcut(
        nn.Conv2d(c_in, c_out, 1, 1 if pool else stride, bias=False),
        make_norm(norm, c_out, v_threshold=v_threshold),
        None if join in ("vanilla", "ms") else neuron(),
        nn.AvgPool2d(stride) if pool else None,
    )


class ResidualBlock(Stepped):
    """A branch of convolutions, a shortcut and their join; `convs` are (conv, norm) in order.

    Neurons: `neurons[i]` follows norm i (ms: precedes conv i); vanilla's last one follows the join.
    """

    def __init__(
        self,
        convs: Sequence[tuple[nn.Module, nn.Module]],
        shortcut: nn.Module,
        join: str,
        neuron: NeuronFactory,
        *,
        zero_init_last: bool = False,
        v_threshold: float = 1.0,
    ) -> None:
        super().__init__()
        for i, (conv, norm) in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", norm)
            self.add_module(f"neuron{i}", neuron())
        self.n_convs = len(convs)
        self.shortcut = shortcut
        self.join = make_join(join)
        if zero_init_last:
            # AND is the identity where the branch always fires: a constant current above threshold
            zero_init(convs[-1][1], 1.5 * v_threshold if join == "sew-and" else 0.0)

    def _layer(self, i: int) -> list[nn.Module]:
        return [getattr(self, f"{part}{i}") for part in ("conv", "norm", "neuron")]

    def _ms(self, a: Tensor) -> Tensor:
        x = a
        for i in range(1, self.n_convs + 1):
            conv, norm, neuron = self._layer(i)
            x = self.seq(x, neuron, conv, norm)
        return self.join(x, self.seq(a, self.shortcut))

    def forward(self, a: Tensor) -> Tensor:
        if self.join.kind == "ms":
            return self._ms(a)
        x = a
        for i in range(1, self.n_convs):
            x = self.seq(x, *self._layer(i))
        conv, norm, neuron = self._layer(self.n_convs)
        x = self.seq(x, conv, norm)
        if self.join.kind == "vanilla":
            return self.seq(self.join(x, self.seq(a, self.shortcut)), neuron)
        return self.join(self.seq(x, neuron), self.seq(a, self.shortcut))
