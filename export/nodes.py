"""The closed union of graph nodes, each a frozen value, and the shape rule of each.

Shapes leave out time and batch: an image is (C, H, W), a vector (n,). Each node names its inputs.
Only `Delay` may name a node that stands later in the graph: every cycle goes through one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from typing_extensions import assert_never

from ranvier.export.neurons import NeuronModel
from ranvier.train.errors import ShapeError

Shape: TypeAlias = tuple[int, ...]
JoinOp: TypeAlias = Literal["add", "and", "iand", "or", "max", "mul", "cat"]
PoolOp: TypeAlias = Literal["avg", "sum", "max"]
Reduce: TypeAlias = Literal["none", "mean", "sum", "last", "max"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """name: unique in its graph; inputs: names of nodes; source: the user's line, where known."""

    name: str
    inputs: tuple[str, ...] = ()
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Input(Base):
    """What comes in: `shape`, and what is known of its values (`lo`..`hi`, whole numbers or not)."""

    shape: Shape
    lo: float = -math.inf
    hi: float = math.inf
    integer: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Base):
    """Cross-correlation as in torch; weight [C_out, C_in/groups, k] or [C_out, C_in/groups, kH, kW]."""

    weight: np.ndarray
    bias: np.ndarray | None = None
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense(Base):
    """weight [out, in] applied to the last axis, plus bias [out].

    out_shape  a vector's result, laid out in this shape; only lowering asks for it
    """

    weight: np.ndarray
    bias: np.ndarray | None = None
    out_shape: Shape | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Base):
    """Pooling over the last axes; windows that stick out at the end are dropped (floor).

    avg counts the padding as zeros, as torch does by default.
    """

    op: PoolOp
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Base):
    """Axes start..end (of the shape without time and batch) become one, in C order."""

    start: int = 0
    end: int = -1


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Base):
    """Batch normalization at inference over axis 0: gamma * (x - mean) / sqrt(var + eps) + beta."""

    mean: np.ndarray
    var: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eps: float = 1e-5


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Base):
    """scale * x + shift, both broadcast to the shape."""

    scale: np.ndarray
    shift: np.ndarray | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Subsample(Base):
    """A parameter-free shortcut: every stride-th row and column, zero channels before and after."""

    stride: tuple[int, ...] = (1, 1)
    pad_channels: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample(Base):
    """Nearest-neighbour upsampling of the last axes by whole factors."""

    factor: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Join(Base):
    """Several inputs into one: add; on spikes: and a*b, iand (1-a)*b, or; max; mul; cat along axis."""

    op: JoinOp
    axis: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Neuron(Base):
    """A population: one neuron of `model` for each element of its input.

    bias  a constant current for each neuron, broadcast to the shape; only lowering makes one
    """

    model: NeuronModel
    bias: np.ndarray | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Delay(Base):
    """The value of `steps` steps ago, zero before that; carries `shape` since it may close a cycle."""

    steps: int
    shape: Shape


@dataclass(frozen=True, eq=False, kw_only=True)
class Opaque(Base):
    """Something the chip has no word for: what it is, why, its output shape, and how to run it."""

    kind: str
    reason: str
    shape: Shape
    function: Callable[..., Any] | None = None  # one step, torch tensors [batch, *shape]; not saved


@dataclass(frozen=True, eq=False, kw_only=True)
class Output(Base):
    """What goes out: the input's value, or a state of it ("v"); `reduce` makes one value a sample."""

    observe: Literal["out", "v", "u"] = "out"
    reduce: Reduce = "none"


Node: TypeAlias = (
    Input
    | Conv
    | Dense
    | Pool
    | Flatten
    | Norm
    | Scale
    | Subsample
    | Upsample
    | Join
    | Neuron
    | Delay
    | Opaque
    | Output
)
NODES: dict[str, type[Any]] = {n.__name__: n for n in get_args(Node)}


def own_fields(node: Node) -> dict[str, Any]:
    """The fields that say what the node does: all but name, inputs, source and meta."""
    common = {f.name for f in fields(Base)}
    return {f.name: getattr(node, f.name) for f in fields(node) if f.name not in common}


def output_shape(node: Node, shapes: list[Shape]) -> Shape:
    """The shape that `node` gives for the shapes of its inputs.

    Raises ShapeError naming the node, what it got and what it takes.
    """
    match node:
        case Input() | Delay() | Opaque():
            return node.shape
        case Conv():
            return conv_shape(node, shapes[0])
        case Dense():
            return dense_shape(node, shapes[0])
        case Pool():
            return pool_shape(node, shapes[0])
        case Flatten():
            return flatten_shape(node, shapes[0])
        case Norm():
            if not shapes[0] or len(node.mean) != shapes[0][0]:
                raise wrong(node, shapes[0], f"{len(node.mean)} channels first")
            return shapes[0]
        case Scale():
            return broadcast(node, shapes[0], [node.scale, node.shift])
        case Subsample():
            return subsample_shape(node, shapes[0])
        case Upsample():
            spatial = [n * f for n, f in zip(shapes[0][1:], node.factor, strict=True)]
            return (shapes[0][0], *spatial)
        case Join():
            return join_shape(node, shapes)
        case Neuron():
            params = [p for p in node.model.params().values() if isinstance(p, np.ndarray)]
            taps = getattr(node.model, "taps", None)
            return broadcast(node, shapes[0], [node.bias, *(p for p in params if p is not taps)])
        case Output():
            return shapes[0]
        case _:
            assert_never(node)


def wrong(node: Node, got: Shape | list[Shape], wanted: str) -> ShapeError:
    return ShapeError(f"graph: {type(node).__name__} '{node.name}' got {got}; it takes {wanted}")


def window(n: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many places a window has along an axis of n (may be < 1: no place)."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_shape(node: Conv, shape: Shape) -> Shape:
    kernel = node.weight.shape[2:]
    channels = node.weight.shape[1] * node.groups
    if len(shape) != 1 + len(kernel) or shape[0] != channels:
        raise wrong(node, shape, f"({channels}, {'L' if len(kernel) == 1 else 'H, W'})")
    if node.weight.shape[0] % node.groups:
        raise wrong(node, shape, f"a number of outputs that {node.groups} groups divide")
    if node.bias is not None and node.bias.shape != (node.weight.shape[0],):
        raise wrong(node, node.bias.shape, f"a bias of shape ({node.weight.shape[0]},)")
    if not len(node.stride) == len(node.padding) == len(node.dilation) == len(kernel):
        raise wrong(node, shape, "one stride, padding and dilation for each kernel axis")
    if min(node.stride) < 1 or min(node.dilation) < 1 or min(node.padding) < 0:
        raise wrong(node, shape, "stride and dilation of at least 1, padding of at least 0")
    spatial = tuple(
        window(*a)
        for a in zip(shape[1:], kernel, node.stride, node.padding, node.dilation, strict=True)
    )
    if min(spatial) < 1:
        raise wrong(node, shape, f"an input that holds its kernel {tuple(kernel)}")
    return (node.weight.shape[0], *spatial)


def dense_shape(node: Dense, shape: Shape) -> Shape:
    out, n_in = node.weight.shape
    if not shape or shape[-1] != n_in:
        raise wrong(node, shape, f"a last axis of {n_in}")
    if node.bias is not None and node.bias.shape != (out,):
        raise wrong(node, node.bias.shape, f"a bias of shape ({out},)")
    if node.out_shape is not None:
        if len(shape) != 1 or math.prod(node.out_shape) != out:
            raise wrong(node, shape, f"a vector, and {out} results that fill {node.out_shape}")
        return node.out_shape
    return (*shape[:-1], out)


def pool_shape(node: Pool, shape: Shape) -> Shape:
    if len(shape) != 1 + len(node.kernel):
        raise wrong(node, shape, f"channels and {len(node.kernel)} axes")
    spatial = tuple(
        window(n, k, s, p)
        for n, k, s, p in zip(shape[1:], node.kernel, node.stride, node.padding, strict=True)
    )
    if min(spatial) < 1:
        raise wrong(node, shape, f"an input that holds its window {node.kernel}")
    return (shape[0], *spatial)


def flatten_shape(node: Flatten, shape: Shape) -> Shape:
    end = node.end % len(shape) if shape else 0
    return (*shape[: node.start], math.prod(shape[node.start : end + 1]), *shape[end + 1 :])


def subsample_shape(node: Subsample, shape: Shape) -> Shape:
    if len(shape) != 1 + len(node.stride):
        raise wrong(node, shape, f"channels and {len(node.stride)} axes")
    spatial = [-(-n // s) for n, s in zip(shape[1:], node.stride, strict=True)]
    return (shape[0] + sum(node.pad_channels), *spatial)


def join_shape(node: Join, shapes: list[Shape]) -> Shape:
    if node.op == "cat":
        rest = {s[: node.axis] + s[node.axis + 1 :] for s in shapes}
        if len(rest) != 1:
            raise wrong(node, shapes, f"shapes that differ along axis {node.axis} only")
        first = shapes[0]
        total = sum(s[node.axis] for s in shapes)
        return (*first[: node.axis], total, *first[node.axis + 1 :])
    if len(set(shapes)) != 1:
        raise wrong(node, shapes, "inputs of one shape")
    return shapes[0]


def broadcast(node: Node, shape: Shape, params: list[Any]) -> Shape:
    for p in params:
        if p is None:
            continue
        try:
            fits = np.broadcast_shapes(np.shape(p), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise wrong(node, shape, f"a shape to which its parameter {np.shape(p)} broadcasts")
    return shape
