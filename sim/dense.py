"""The dense engine: torch, all steps of a layer at once, exact by a proved bound.

Each projection is one convolution or product over `steps x batch`, in float32 where every partial
sum stays below 2**24, else in float64 below 2**53, else in the reference's own int64; the neurons
run in one fused scan over time. Nothing is rounded anywhere, so the order of sums does not matter.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Program
from ranvier.sim import bounds
from ranvier.sim.bounds import trailing_zeros
from ranvier.sim.int8 import Product, product
from ranvier.sim.layers import Driven, Incoming, Message, Outcome, Tally, Walk, walk
from ranvier.sim.layout import Wiring
from ranvier.sim.plan import CellPlan, Plan, plan
from ranvier.sim.runner import Result, finish
from ranvier.sim.spikes import Spikes
from ranvier.train.errors import RangeError

CHUNK_BYTES = {
    "cpu": 32 << 20,
    "cuda": 1 << 30,
}  # of the largest layer's sums; small enough to stay near


class Synapses:
    """One projection's weights as torch wants them, in the narrowest exact type.

    Plain spikes (uint8) meet 8-bit weights as whole numbers where the processor has such products;
    the float32 weights are then never kept.
    """

    def __init__(self, wiring: Wiring, raw_bound: int, shifted: bool, device: torch.device) -> None:
        self.wiring, self.device = wiring, device
        self.map = wiring.projection.map
        self.dtype = (
            torch.float32 if raw_bound < bounds.FLOAT32_EXACT
            else torch.float64 if raw_bound < bounds.FLOAT64_EXACT
            else None
        )  # fmt: skip
        self.exponent = wiring.projection.exponent if shifted else 0
        self.gather, self.scatter = (
            None if i is None else torch.as_tensor(i, device=device)
            for i in (wiring.gather, wiring.scatter)
        )
        self._weight: Tensor | None = None
        self._int8: Product | None = None
        self._asked = device.type != "cpu" or self.dtype is not torch.float32

    @property
    def weight(self) -> Tensor:
        """The weights in `dtype`, shifted, made on first use."""
        if self._weight is None:
            whole = torch.as_tensor(self.wiring.weight.astype(np.int64) << self.exponent)
            weight = whole.to(self.device, self.dtype)
            if isinstance(self.map, ConvMap) and self.device.type == "cpu":
                weight = weight.contiguous(memory_format=torch.channels_last)
            self._weight = weight
        return self._weight

    @property
    def int8(self) -> Product | None:
        """The product of plain spikes in 8 bits, or None where it cannot be."""
        if not self._asked:
            self._asked = True
            zeros = trailing_zeros(self.wiring.weight)
            self._int8 = product(
                self.map, self.wiring.weight >> zeros, zeros + self.exponent,
                lambda x: self._apply(x.to(torch.float32)),
            )  # fmt: skip
            if self._int8 is not None:
                self._weight = None  # it served as the measure
        return self._int8

    def __call__(self, message: Message) -> Tensor:
        """`[steps, batch, n_in]` -> `[steps, batch, n_out]`, of `dtype`, or int64."""
        message = tensor(message)
        if self.gather is not None:
            message = message[..., self.gather]
        x = message.flatten(0, 1)
        if self.dtype is None:
            out = self._plain(x)
        elif x.dtype is torch.uint8 and self.int8 is not None:
            out = self.int8(x)
        else:
            out = self._apply(x.to(self.dtype))
        out = out.unflatten(0, message.shape[:2])
        return out if self.scatter is None else out[..., self.scatter]

    def _apply(self, x: Tensor) -> Tensor:
        match self.map:
            case ConvMap() as conv:
                c, h, w = conv.in_shape
                # One channel is laid out plainly: seen as channels-last, torch 2.13's convolution
                # on the CPU is wrong for strides of (1, 2) onto one column.
                x = x.reshape(-1, h, w, c).permute(0, 3, 1, 2)
                x = x.reshape(-1, h * w).reshape(-1, 1, h, w) if c == 1 else x
                y = convolve(conv, x, self.weight)
                return y.permute(0, 2, 3, 1).reshape(len(x), -1)
            case DenseMap():
                return F.linear(x, self.weight)
            case OneToOne():
                return x * self.weight

    def add_to(self, total: Tensor, message: Message) -> bool:
        """Adds a one-to-one map of plain spikes in place, in one pass; False where it cannot."""
        direct = isinstance(self.map, OneToOne) and self.gather is None and self.scatter is None
        if not direct or not is_plain(message) or self.dtype is not torch.float32:
            return False
        if total.shape != message.shape or not total.is_contiguous() or self.device.type != "cpu":
            return False
        from ranvier.sim.scan_kernels import add_times

        plain = tensor(message).contiguous().numpy()
        add_times()(total.numpy(), plain, self.weight.numpy())
        return True

    def _plain(self, x: Tensor) -> Tensor:
        """In int64, through the map's own definition, whose order is the neurons'."""
        match self.map:
            case ConvMap() as conv:
                c, h, w = conv.in_shape
                whole = x.cpu().numpy().reshape(-1, h, w, c).transpose(0, 3, 1, 2)
                out = conv.apply(whole).transpose(0, 2, 3, 1).reshape(len(whole), -1)
            case DenseMap():
                out = x.cpu().numpy().astype(np.int64) @ self.wiring.weight.T.astype(np.int64)
            case OneToOne():
                out = x.cpu().numpy().astype(np.int64) * self.wiring.weight
        return torch.as_tensor(np.ascontiguousarray(out), device=self.device)


def convolve(conv: ConvMap, x: Tensor, weight: Tensor) -> Tensor:
    """torch's convolution on the CPU. On a GPU its library may choose a Winograd transform, which
    rounds; there the patches are laid out and multiplied, which does not."""
    if x.device.type == "cpu":
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return conv_by_patches(conv, x, weight)


def conv_by_patches(conv: ConvMap, x: Tensor, weight: Tensor) -> Tensor:
    """As `F.conv2d`, by one product a group; x `[batch, C, H, W]`."""
    (py, px), (sy, sx), (dy, dx) = conv.padding, conv.stride, conv.dilation
    x = F.pad(x, [px, px, py, py]).contiguous()
    c_out, per_group, k_y, k_x = weight.shape
    _, rows, cols = conv.out_shape
    n, c = x.shape[:2]
    s_n, s_c, s_y, s_x = x.stride()
    patches = x.as_strided(
        (conv.groups, n, rows, cols, c // conv.groups, k_y, k_x),
        (s_c * per_group, s_n, s_y * sy, s_x * sx, s_c, s_y * dy, s_x * dx),
    )
    flat = patches.reshape(conv.groups, n * rows * cols, per_group * k_y * k_x)
    by_group = weight.reshape(conv.groups, c_out // conv.groups, -1)
    out = torch.bmm(flat, by_group.transpose(1, 2))
    out = out.reshape(conv.groups, n, rows, cols, -1).permute(1, 0, 4, 2, 3)
    return out.reshape(n, c_out, rows, cols)


MERGED = 100  # messages whose sum a byte holds, and 8-bit products that saturate at 16 bits as well


def is_plain(message: Message) -> bool:
    """Whether a message is of small whole numbers, a byte or a bit each."""
    return isinstance(message, Spikes) or message.dtype is torch.uint8


def tensor(message: Message) -> Tensor:
    """A message with at least a byte a number."""
    return torch.from_numpy(message.plain()) if isinstance(message, Spikes) else message


def merged(incoming: Incoming) -> Incoming:
    """Plain spikes that meet the same map are added before it, since W a + W b = W (a + b)."""
    alike: dict[Any, list[tuple[Wiring, Any]]] = {}
    for i, (wiring, message) in enumerate(incoming):
        p = wiring.projection
        plain = is_plain(message) and wiring.gather is None
        key = (id(p.map), p.exponent, len(message)) if plain else i
        alike.setdefault(key, []).append((wiring, message))
    found: Incoming = []
    for parts in alike.values():
        total = parts[0][1]
        if 1 < len(parts) <= MERGED:
            total = tensor(parts[0][1]) + tensor(parts[1][1])
            for _, message in parts[2:]:
                total += tensor(message)
            parts = parts[:1]
        found += [(wiring, total if len(parts) == 1 else m) for wiring, m in parts]
    return found


def _one_to_one_last(part: tuple[Wiring, Any]) -> bool:
    """Those can be added to sums that are there already."""
    return isinstance(part[0].projection.map, OneToOne)


def wrapped(x: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return ((x + half) & (2 * half - 1)) - half


class DenseBackend:
    """See the module."""

    def __init__(self, program: Program, device: str = "cpu") -> None:
        self.plan: Plan = plan(program)
        self.device = torch.device(device)
        self._synapses: dict[str, Synapses] = {}
        self._params: dict[str, tuple[Tensor, ...]] = {}

    def part(self, steps: int) -> int:
        return chunk_size(self.plan, steps, CHUNK_BYTES[self.device.type])

    def run(self, part: Walk) -> Outcome:
        return part.run()

    def synapses(self, wiring: Wiring) -> Synapses:
        p = wiring.projection
        if p.name not in self._synapses:
            arrival = self.plan.arrival[p.target]
            self._synapses[p.name] = Synapses(
                wiring, arrival.raw[p.name], arrival.float32, self.device
            )
        return self._synapses[p.name]

    def load(self, x: np.ndarray) -> Message:
        name = next(n for n, p in self.plan.populations.items() if p.is_input)
        if not self.plan.binary(name):
            return torch.as_tensor(x.astype(np.int32), device=self.device)
        return self.spikes(torch.as_tensor(x.astype(np.uint8), device=self.device))

    def spikes(self, plain: Tensor) -> Message:
        """uint8 of 0 and 1 as they are kept here: packed, but for a GPU's."""
        return Spikes.of(plain.numpy()) if self.device.type == "cpu" else plain

    def arrive(self, name: str, incoming: Incoming, batch: int) -> Tensor:
        """The sum of everything that reaches a population, `[1 or steps, batch, n]`."""
        exact = self.plan.arrival[name].float32
        total: Tensor | None = None
        for wiring, message in sorted(merged(incoming), key=_one_to_one_last):
            synapses = self.synapses(wiring)
            if exact and total is not None and synapses.add_to(total, message):
                continue
            part = synapses(message)
            part = part if exact else self._shifted(wiring, part)
            if total is None:
                total = part
            elif total.shape[0] >= part.shape[0]:
                total += part  # only this engine holds it
            else:
                total = total + part
        if total is None:
            size = self.plan.populations[name].size
            return torch.zeros(1, batch, size, dtype=torch.int32, device=self.device)
        return total

    def _shifted(self, wiring: Wiring, part: Tensor) -> Tensor:
        moved = part.to(torch.int64) << wiring.projection.exponent
        return wrapped(moved, 24) if isinstance(wiring.projection.map, ConvMap) else moved

    def drive(
        self, name: str, incoming: Incoming, steps: int, batch: int, state: Any, record: bool
    ) -> Driven:
        total = self.arrive(name, incoming, batch)
        if name not in self.plan.cells:
            sent = wrapped(total.to(torch.int64), 32)
            if name in self.plan.gates:
                gate = torch.as_tensor(self.plan.gates[name], device=self.device)
                fired = (sent > gate).to(torch.uint8).expand(steps, -1, -1)
                return Driven(self.spikes(fired.contiguous()))
            if shift := self.plan.relay_shift(name):
                sent = (sent + (1 << shift >> 1)) >> shift
            return Driven(sent.to(torch.int32).expand(steps, -1, -1).contiguous())
        if self.device.type == "cpu":
            return scan_cpu(self.plan, name, total.numpy(), steps, state, record)
        return self._scan_torch(name, total, steps, state, record)

    def _scan_torch(self, name: str, total: Tensor, steps: int, state: Any, record: bool) -> Driven:
        from ranvier.sim.scan_torch import scan

        cell = self.plan.cells[name]
        if name not in self._params:
            self._params[name] = tuple(
                torch.as_tensor(a, device=self.device) for a in cell.arrays()
            )
        return scan(cell, self._params[name], total, steps, state, record)

    def count(self, sent: Message, tally: Tally) -> None:
        if self.device.type == "cpu":
            count_cpu(self.numpy(sent), tally)
            return
        tally.some += (sent != 0).sum(1).cpu().numpy()
        if tally.graded:
            tally.plain += (sent == 1).sum(1).cpu().numpy()
            tally.payload += sent.to(torch.int64).abs().sum((1, 2)).cpu().numpy()

    def join(self, parts: list[Message]) -> Message:
        return Spikes.joined(parts) if isinstance(parts[0], Spikes) else torch.cat(parts)

    def quiet(self, like: Message, steps: int) -> Message:
        if isinstance(like, Spikes):
            return like.quiet(steps)
        return like.new_zeros(steps, *like.shape[1:])

    def numpy(self, message: Message) -> np.ndarray:
        array: np.ndarray = tensor(message).cpu().numpy()
        return array


def scan_cpu(
    plan: Plan,
    name: str,
    total: np.ndarray,
    steps: int,
    state: Any,
    record: bool,
    shift: int = 0,
) -> Driven:
    """The compartments of one population over all steps."""
    from ranvier.sim.scan_kernels import scan

    cell = plan.cells[name]
    if cell.plain and state is None and not record and not plan.cyclic:
        return _scan_fast(cell, total, steps, shift)
    if cell.wide:
        total = total.astype(np.int64, copy=False)
    elif total.itemsize == 8:
        total = total.astype(np.float32)  # below 2**18, so exact
    batch, n = total.shape[1:]
    u, v = state if state is not None else (np.zeros((batch, n), cell.dtype) for _ in range(2))
    sent = np.empty((steps, batch, n), np.uint8)
    us, vs = (np.empty((steps, batch, n) if record else (0, 0, 0), cell.dtype) for _ in range(2))
    kinds = (cell.v_reset, cell.reset, cell.timing)
    kernel = scan(cell.memory or cell.wide)
    kernel(np.ascontiguousarray(total), shift, u, v, *cell.arrays(), *kinds, sent, us, vs)
    if record:
        return Driven(Spikes.of(sent), torch.from_numpy(us), torch.from_numpy(vs), (u, v))
    return Driven(Spikes.of(sent), state=(u, v))


def _scan_fast(cell: CellPlan, total: np.ndarray, steps: int, shift: int) -> Driven:
    import numba

    from ranvier.sim.scan_kernels import scan_fast

    batch, n = total.shape[1:]
    if total.itemsize == 8:
        total = total.astype(np.float32)  # below 2**18, so exact
    each = -(-n // (4 * numba.get_num_threads()))
    chunk = min(1024, max(128, -(-each // 64) * 64))
    bits, some = np.empty((steps, batch, -(-n // 8)), np.uint8), np.empty((steps, n), np.int64)
    kernel = scan_fast(cell.reset, cell.timing, cell.folds)
    parameters = (cell.k_v, cell.theta, cell.bias, cell.jump, cell.v_reset, chunk)
    kernel(np.ascontiguousarray(total), shift, *parameters, bits, some)
    return Driven(Spikes(bits, n), some=some)


def count_cpu(sent: np.ndarray, tally: Tally) -> None:
    """Adds a message's counts to a tally."""
    from ranvier.sim import scan_kernels

    if tally.graded:
        scan_kernels.tally_graded()(sent, tally.some, tally.plain, tally.payload)
    else:
        scan_kernels.tally()(sent, tally.some)


@contextlib.contextmanager
def exact_kernels() -> Iterator[None]:
    """torch without the kernels that round (NNPACK's, TF32), and numba with torch's threads."""
    import numba

    config: Any = numba.config
    numba.set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


_BACKENDS: weakref.WeakKeyDictionary[Program, dict[str, DenseBackend]] = weakref.WeakKeyDictionary()


def backend(program: Program, device: str = "cpu") -> DenseBackend:
    """The backend of a program on a device, with its weights laid out once.

    Raises RangeError for a device that torch does not have here.
    """
    made = _BACKENDS.setdefault(program, {})
    if device not in made:
        kind = device.split(":")[0]
        if kind not in CHUNK_BYTES or (kind == "cuda" and not torch.cuda.is_available()):
            raise RangeError(f"run: device '{device}' is not available here; 'cpu' is")
        made[device] = DenseBackend(program, device)
    return made[device]


def chunk_size(plan: Plan, steps: int, n_bytes: int) -> int:
    """How many samples to run at once, so that no layer's sums take more than `n_bytes`."""
    widest = max(p.size for p in plan.populations.values())
    return max(1, n_bytes // (4 * steps * widest))


def run_dense(
    program: Program, x: np.ndarray, record: tuple[str, ...] = (), *, device: str = "cpu"
) -> Result:
    """The Result of whole numbers x `[time, batch, *shape]`; device "cpu" or "cuda"."""
    use = backend(program, device)
    with exact_kernels():
        whole, ledger = walk(use, x, record)
    return finish(program, whole.sent, whole.states, record, ledger, "dense")
