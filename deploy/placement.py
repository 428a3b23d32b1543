"""`place`: which slice of which population sits on which core, and how full each core is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ranvier.deploy.chip import LOIHI2, Chip, chip_of
from ranvier.deploy.program import Population, Program
from ranvier.deploy.resources import Need, Slice, cut, need
from ranvier.export.linear import image
from ranvier.train.errors import CapacityError, RangeError, UnsupportedError, expect

SOLVER_SLICES = 60  # the solver is asked up to here; beyond it the greedy packing stands
SOLVER_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Placed:
    """A slice on a core, and what it needs there."""

    part: Slice
    need: Need
    core: int


@dataclass(frozen=True, eq=False)
class Placement:
    """A program on a chip.

    slices    every slice with its core; cores count on over chips
    method    greedy, or solver where one proved or improved the number of cores
    """

    program: Program
    chip: Chip
    slices: tuple[Placed, ...]
    method: str

    @property
    def n_cores(self) -> int:
        return 1 + max((s.core for s in self.slices), default=-1)

    @property
    def n_chips(self) -> int:
        return -(-self.n_cores // int(self.chip.n_cores.value))

    @property
    def per_core(self) -> list[Need]:
        """What each core holds."""
        total = [Need() for _ in range(self.n_cores)]
        for s in self.slices:
            total[s.core] = total[s.core] + s.need
        return total

    @property
    def utilization(self) -> dict[str, dict[str, float]]:
        """resource -> {"max", "mean"}: used / limit over the cores that are used."""
        found: dict[str, list[float]] = {}
        for core in self.per_core:
            for name, used, limit in core.against(self.chip):
                found.setdefault(name, []).append(used / limit)
        return {k: {"max": max(v), "mean": sum(v) / len(v)} for k, v in found.items()}

    def cores_of(self, population: str) -> list[int]:
        """The cores on which a population has a slice, ascending."""
        return sorted({s.core for s in self.slices if s.part.population == population})

    def core_of(self, population: str) -> Any:
        """The core of each neuron of a population, an int array of its shape."""
        import numpy as np

        shape = self.program.populations[population].shape
        cores = np.zeros(image(shape), np.int64)
        for s in self.slices:
            if s.part.population == population:
                cores[s.part.c0 : s.part.c1, s.part.r0 : s.part.r1] = s.core
        return cores.reshape(shape)

    def rows(self) -> list[dict[str, Any]]:
        """One row a population: its slices, cores, neurons, and its fullest slice."""
        rows = []
        for name in dict.fromkeys(s.part.population for s in self.slices):
            mine = [s for s in self.slices if s.part.population == name]
            cores = self.cores_of(name)
            rows.append({
                "population": name,
                "neurons": sum(s.need.neurons for s in mine),
                "slices": len(mine),
                "cores": f"{cores[0]}..{cores[-1]}" if len(cores) > 1 else str(cores[0]),
                "synapse_bits": sum(s.need.synapse_bits for s in mine),
                "in_axons": sum(s.need.in_axons for s in mine),
                "fullest": max(s.need.share(self.chip) for s in mine),
            })  # fmt: skip
        return rows

    def table(self) -> str:
        """Populations, then used / limit of each resource, as text."""
        rows = self.rows()
        heads = list(rows[0]) if rows else []
        cells = [[f"{v:.0%}" if k == "fullest" else f"{v:,}" if isinstance(v, int) else v
                  for k, v in r.items()] for r in rows]  # fmt: skip
        widths = [max(len(h), *(len(c[i]) for c in cells)) for i, h in enumerate(heads)]
        lines = ["  ".join(h.ljust(w) for h, w in zip(heads, widths, strict=True))]
        lines += ["  ".join(v.rjust(w) if i else v.ljust(w) for i, (v, w) in
                            enumerate(zip(c, widths, strict=True))) for c in cells]  # fmt: skip
        chip = self.chip
        lines.append("")
        lines.append(
            f"{self.n_cores} cores of {int(chip.n_cores.value)} a chip, {self.n_chips} x {chip.name} "
            f"({self.method}; modelled)"
        )
        for name, use in self.utilization.items():
            lines.append(
                f"{name}: {use['max']:.0%} of the fullest core, {use['mean']:.0%} on average"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for the report's picture of the cores."""
        cores: list[dict[str, Any]] = [{"use": {}} for _ in range(self.n_cores)]
        for s in self.slices:
            use = cores[s.core]["use"]
            use[s.part.population] = use.get(s.part.population, 0.0) + s.need.share(self.chip)
        resources = []
        for name, _, limit in Need().against(self.chip):
            used = sum(getattr(core, name) for core in self.per_core)
            resources.append({"name": name, "used": used, "limit": limit * max(self.n_cores, 1)})
        return {
            "chip": self.chip.name,
            "n_cores": self.n_cores,
            "n_chips": self.n_chips,
            "limit": int(self.chip.n_cores.value) * self.n_chips,
            "method": self.method,
            "cores": cores,
            "resources": resources,
            "populations": self.rows(),
        }

    def to_svg(self) -> str:
        """The cores as a picture: one square a core, filled by its fullest resource."""
        side, across = 26, 16
        squares = []
        for i, core in enumerate(self.per_core):
            x, y = (i % across) * 30 + 2, (i // across) * 30 + 2
            high = side * min(1.0, core.share(self.chip))
            squares.append(
                f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="#888"/>'
                f'<rect x="{x}" y="{y + side - high:.1f}" width="{side}" height="{high:.1f}" '
                f'fill="#3b7dd8"><title>core {i}: {core.share(self.chip):.0%}</title></rect>'
            )
        height = 30 * (-(-self.n_cores // across)) + 4
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across * 30 + 4} {height}">'
            f"{''.join(squares)}</svg>"
        )


def place(
    program: Program,
    chip: Chip | str = LOIHI2,
    *,
    max_chips: int = 64,
    solver: Literal["auto", "greedy", "highspy"] = "auto",
) -> Placement:
    """The program on as few cores as the method finds.

    Each population is cut into the fewest boxes of which each fits a core; boxes are packed
    first-fit, largest first. With highspy installed (`pip install ranvier[solver]`) packings of up to
    60 boxes are improved by an integer program, 10 s at most.
    Raises CapacityError naming the population, the resource, by how much, and what would help;
    UnsupportedError where the chip lacks what the program uses.
    """
    expect(program, Program, "place", "compile(graph, calibration=x) makes one")
    chip = chip_of(chip, "place")
    if solver not in ("auto", "greedy", "highspy"):
        raise RangeError(f"place: solver '{solver}' is none of auto, greedy, highspy")
    check_chip(program, chip)
    parts = [
        (s, need(program, s, chip))
        for p in program
        if not p.is_input
        for s in split(program, p, chip)
    ]
    cores = first_fit([n for _, n in parts], chip)
    method = "greedy"
    if solver != "greedy" and len(parts) <= SOLVER_SLICES:
        better = _solve([n for _, n in parts], chip, max(cores, default=0) + 1, solver)
        if better is not None:
            cores, method = better, "solver"
    placed = tuple(Placed(s, n, c) for (s, n), c in zip(parts, cores, strict=True))
    placement = Placement(program, chip, placed, method)
    if placement.n_chips > max_chips:
        worst = max(placement.rows(), key=lambda r: int(r["slices"]))
        raise CapacityError(
            f"place: the program needs {placement.n_cores} cores, {placement.n_chips} chips; {max_chips} "
            f"are allowed. '{worst['population']}' alone takes {worst['slices']} slices. Use fewer "
            "channels, fewer weight_bits, or raise max_chips"
        )
    return placement


def check_chip(program: Program, chip: Chip) -> None:
    """Raises UnsupportedError for the first thing that the chip has no hardware for."""
    for p in program:
        if p.graded and not chip.graded:
            raise UnsupportedError(
                f"place: '{p.name}' sends graded messages ({p.lo}..{p.hi}), which {chip.name} lacks. "
                "Encode the input as spikes, compile with joins='linear', and read spikes out"
            )
        why = p.cell.why_custom() if p.cell is not None else None
        if why and not chip.custom:
            raise UnsupportedError(
                f"place: '{p.name}' needs {why}, which {chip.name} cannot be programmed for; use loihi2"
            )


def split(program: Program, population: Population, chip: Chip) -> list[Slice]:
    """The population in the fewest equal boxes of which each fits one core."""
    channels, height, _ = image(population.shape)
    tries = sorted(
        ((c, r) for c in _counts(channels) for r in _counts(height)),
        key=lambda t: (t[0] * t[1], t[1]),
    )
    worst = None
    for n_channels, n_rows in tries:
        parts = cut(population, n_channels, n_rows)
        worst = next((o for o in (need(program, s, chip).over(chip) for s in parts) if o), None)
        if worst is None:
            return parts
    raise CapacityError(
        f"place: population '{population.name}' {population.shape} needs {worst} even when cut into "
        f"{channels} x {height} slices. Use fewer weight_bits, a smaller kernel, or fewer inputs"
    )


def _counts(n: int) -> list[int]:
    """1, 2, 3, ... n, thinned out above 16."""
    return sorted({*range(1, min(n, 16) + 1), *(-(-n // k) for k in range(1, 17)), n})


def first_fit(needs: Sequence[Need], chip: Chip) -> list[int]:
    """The core of each, first-fit, largest first."""
    cores: list[Need] = []
    found = [0] * len(needs)
    for i in sorted(range(len(needs)), key=lambda i: -needs[i].share(chip)):
        for k, held in enumerate(cores):
            if (held + needs[i]).over(chip) is None:
                cores[k], found[i] = held + needs[i], k
                break
        else:
            found[i] = len(cores)
            cores.append(needs[i])
    return found


def _solve(needs: Sequence[Need], chip: Chip, n_greedy: int, solver: str) -> list[int] | None:
    """Fewer cores than the greedy packing by an integer program, or None."""
    try:
        import highspy
    except ImportError:
        if solver == "highspy":
            raise UnsupportedError(
                "place: solver 'highspy' is not installed; pip install 'ranvier[solver]'"
            ) from None
        return None
    floor = max(
        -(-sum(getattr(n, name) for n in needs) // limit) for name, _, limit in Need().against(chip)
    )
    if floor >= n_greedy:
        return None  # the greedy packing is already the least possible
    highs: Any = highspy.Highs  # its stubs lack types
    h = highs()
    h.silent()
    h.setOptionValue("time_limit", SOLVER_SECONDS)
    bins = range(n_greedy - 1)
    used = [h.addBinary() for _ in bins]
    at = [[h.addBinary() for _ in bins] for _ in needs]
    for row in at:
        h.addConstr(sum(row[1:], row[0]) == 1)
    for k in bins:
        for name, _, limit in Need().against(chip):
            terms = [getattr(n, name) / limit * at[i][k] for i, n in enumerate(needs)]
            h.addConstr(sum(terms[1:], terms[0]) <= used[k])
    h.minimize(sum(used[1:], used[0]))
    if h.getInfo().primal_solution_status != 2:
        return None
    values = h.getSolution().col_value
    chosen = [next(k for k in bins if values[row[k].index] > 0.5) for row in at]
    order = {k: i for i, k in enumerate(sorted(set(chosen)))}
    return [order[k] for k in chosen]
