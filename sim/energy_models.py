"""Energy as named models over a Ledger: every figure carries its model and its boundary.

These are models, not measurements: each multiplies counts by published costs of one event, and says
what it leaves out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ranvier.train.errors import FormatError, RangeError


class Counts(Protocol):
    """What an energy model reads; a Ledger and an `operations.Operations` both have it."""

    @property
    def n_samples(self) -> int: ...

    def total(self, key: str) -> int: ...


@dataclass(frozen=True)
class Energy:
    """A modelled energy.

    total_pj   picojoules a sample
    parts_pj   what it is the sum of
    model      the model's name
    boundary   what is counted and what is left out
    source     where the costs come from
    """

    total_pj: float
    parts_pj: Mapping[str, float]
    model: str
    boundary: str
    source: str
    kind: Literal["modelled"] = "modelled"

    def __str__(self) -> str:
        amount, unit = self.total_pj, "pJ"
        for bigger in ("nJ", "uJ", "mJ"):
            if amount < 1000:
                break
            amount, unit = amount / 1000, bigger
        return f"{amount:.4g} {unit} a sample (modelled: {self.model}; {self.boundary})"


@dataclass(frozen=True)
class EnergyModel:
    """Costs by count.

    costs_pj  name of the part -> (the Ledger's count, picojoules each)
    minus     name of the part -> a count that is taken from its count first
    """

    name: str
    costs_pj: Mapping[str, tuple[str, float]]
    boundary: str
    source: str
    minus: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, counts: Counts) -> Energy:
        parts = {
            part: cost * self._count(counts, part, count) / max(1, counts.n_samples)
            for part, (count, cost) in self.costs_pj.items()
        }
        return Energy(sum(parts.values()), parts, self.name, self.boundary, self.source)

    def _count(self, counts: Counts, part: str, count: str) -> int:
        less = counts.total(self.minus[part]) if part in self.minus else 0
        return counts.total(count) - less


MAC_PJ = 4.6  # 32-bit float multiply 3.7 and add 0.9
AC_PJ = 0.9
_HOROWITZ = "M. Horowitz, ISSCC 2014: 45 nm, 0.9 V, 32-bit floating point"
_DAVIES = (
    "M. Davies et al., IEEE Micro 38(1), 2018: Loihi, 14 nm, 0.75 V, from pre-silicon simulation; "
    "quoted from files that cite it"
)

MODELS: dict[str, EnergyModel] = {
    "horowitz": EnergyModel(
        "horowitz",
        {"accumulates": ("n_synops", AC_PJ), "multiplications": ("n_mults", MAC_PJ)},
        "arithmetic of synapses only: no memory, no neurons, no communication, no leakage; "
        "only ratios between networks mean something",
        _HOROWITZ,
        {"accumulates": "n_mults"},
    ),
    "loihi-davies": EnergyModel(
        "loihi-davies",
        {
            "synaptic operations": ("n_synops", 23.6),
            "neuron updates, active": ("n_spikes", 81.0),
            "neuron updates, inactive": ("n_updates", 52.0),
            "spikes within a tile": ("n_spikes", 1.7),
        },
        "one chip, every spike within a tile and sent once, a neuron active in steps in which it "
        "fires; no routing between tiles or chips, no leakage, no host, no input and output",
        _DAVIES,
        {"neuron updates, inactive": "n_spikes"},
    ),
}


def energy(counts: Counts, model: str | EnergyModel | os.PathLike[str] = "loihi-davies") -> Energy:
    """The modelled energy a sample of what a Ledger counted.

    model  a name in MODELS, an EnergyModel, or the path of a YAML file (see `read_model`)
    Raises RangeError for an unknown name.
    """
    if isinstance(model, EnergyModel):
        return model(counts)
    if str(model).endswith((".yaml", ".yml")):
        return read_model(model)(counts)
    if model not in MODELS:
        raise RangeError(
            f"energy: model '{model}' is none of {', '.join(MODELS)}, nor a .yaml file"
        )
    return MODELS[str(model)](counts)


def read_model(path: str | os.PathLike[str]) -> EnergyModel:
    """The EnergyModel in a YAML file: name, boundary, source, and costs_pj: {part: {count, pj}}.

    Raises FormatError naming what is missing or wrong.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise FormatError(f"energy: cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"energy: '{path}' holds no mapping")
    missing = [k for k in ("name", "boundary", "source", "costs_pj") if not content.get(k)]
    if missing:
        raise FormatError(f"energy: '{path}' does not say its {missing[0]}; a model must")
    return _model(content, path)


def _model(content: dict[str, Any], path: str | os.PathLike[str]) -> EnergyModel:
    from ranvier.sim.ledger import POPULATION_COUNTS, PROJECTION_COUNTS

    known = POPULATION_COUNTS + PROJECTION_COUNTS
    costs: dict[str, tuple[str, float]] = {}
    minus: dict[str, str] = {}
    for part, entry in content["costs_pj"].items():
        if not isinstance(entry, dict) or entry.get("count") not in known:
            raise FormatError(f"energy: '{path}': {part} needs a count, one of {', '.join(known)}")
        if not isinstance(entry.get("pj"), (int, float)) or entry["pj"] < 0:
            raise FormatError(f"energy: '{path}': {part} needs pj, a number that is not negative")
        costs[str(part)] = (entry["count"], float(entry["pj"]))
        if "minus" in entry:
            minus[str(part)] = entry["minus"]
    name, boundary, source = (str(content[k]) for k in ("name", "boundary", "source"))
    return EnergyModel(name, costs, boundary, source, minus)


def published_sops(rate: float, steps: int, flops: float) -> float:
    """The literature's synaptic operations of a layer: rate x steps x FLOPs.

    rate   mean firing rate of the spikes that enter the layer
    flops  its multiply-accumulates in one step
    Source: Spikformer (Zhou et al., ICLR 2023), and many before it. Borders are not counted
    exactly; a Ledger's n_synops are.
    """
    if not 0 <= rate or steps < 1 or flops < 0:
        raise RangeError(f"energy: rate {rate}, steps {steps}, FLOPs {flops} make no layer")
    return rate * steps * flops


def published(first_macs: float, layers: Mapping[str, tuple[float, float]], steps: int) -> Energy:
    """The literature's energy of a spiking network: E_MAC * FLOPs of the first layer, once, plus
    E_AC * sum of `published_sops` over the others.

    layers  name -> (rate of its input, its FLOPs in one step); the first layer left out
    """
    parts = {"first layer": MAC_PJ * first_macs}
    parts |= {n: AC_PJ * published_sops(rate, steps, flops) for n, (rate, flops) in layers.items()}
    boundary = (
        "arithmetic of synapses only; the first layer as multiply-accumulates of one step; "
        "integer inputs are taken for binary ones"
    )
    source = "Spikformer (Zhou et al., ICLR 2023) with the costs of " + _HOROWITZ
    return Energy(sum(parts.values()), parts, "published-snn", boundary, source)


def ann(macs: float) -> Energy:
    """The literature's energy of the same network without spikes: E_MAC * FLOPs."""
    boundary = "arithmetic of one dense pass only"
    return Energy(
        MAC_PJ * macs, {"all layers": MAC_PJ * macs}, "published-ann", boundary, _HOROWITZ
    )


def energy_table(program: object, counts: Counts) -> dict[str, float]:
    """Nanojoules a sample by every model in MODELS; their boundaries differ, see each."""
    return {name: energy(counts, name).total_pj / 1000 for name in MODELS}
