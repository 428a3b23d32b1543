"""Chips: limits, bit widths and energy per event, each number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ranvier.train.errors import RangeError, expect

BRIEF = "Intel, Taking Neuromorphic Computing to the Next Level with Loihi 2 (technology brief)"
NENGO = "nengo-loihi 1.0, builder and hardware validation constants"
DAVIES = "Davies et al., Loihi, IEEE Micro 38(1), 2018, 82-99 (pre-silicon SDF and SPICE estimates)"
LAVA = "lava-nc 0.10, fixed-point process models"


@dataclass(frozen=True)
class Limit:
    """A number, and where it stands."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """One target.

    n_cores            neuro cores a chip
    neurons_per_core   compartments (Loihi 2: for small state)
    synapse_bits       synapse memory a core, in bits
    in_axons, out_axons   a core (None: not public; not checked)
    weight_bits        widest weight, sign included
    graded             whether a spike may carry a payload
    custom             whether neuron models can be programmed (microcode)
    max_delay          longest synaptic delay in steps
    energy_pj          event -> picojoule; empty where no official number is known
    """

    name: str
    n_cores: Limit
    neurons_per_core: Limit
    synapse_bits: Limit
    in_axons: Limit | None
    out_axons: Limit | None
    weight_bits: Limit
    graded: bool
    custom: bool
    max_delay: Limit
    energy_pj: Mapping[str, Limit] = field(default_factory=dict)


LOIHI1 = Chip(
    name="loihi1",
    n_cores=Limit(128, BRIEF),
    neurons_per_core=Limit(1024, NENGO),
    synapse_bits=Limit(1_048_576, NENGO),
    in_axons=Limit(4096, NENGO),
    out_axons=Limit(4096, NENGO),
    weight_bits=Limit(9, LAVA),
    graded=False,
    custom=False,
    max_delay=Limit(62, LAVA),
    energy_pj={
        "synop": Limit(23.6, DAVIES),
        "update_active": Limit(81.0, DAVIES),
        "update_inactive": Limit(52.0, DAVIES),
        "spike_within_tile": Limit(1.7, DAVIES),
        "hop_east_west": Limit(3.0, DAVIES),
        "hop_north_south": Limit(4.0, DAVIES),
    },
)

LOIHI2 = Chip(
    name="loihi2",
    n_cores=Limit(128, BRIEF),
    neurons_per_core=Limit(8192, BRIEF),
    synapse_bits=Limit(192 * 1024 * 8, BRIEF + "; 192 KB shared by synapses, axons and neurons"),
    in_axons=None,
    out_axons=None,
    weight_bits=Limit(8, BRIEF),
    graded=True,
    custom=True,
    max_delay=Limit(62, LAVA),
)

CHIPS = {c.name: c for c in (LOIHI1, LOIHI2)}


def chip_of(chip: Chip | str, stage: str) -> Chip:
    """The chip, or the one of that name. Raises RangeError, UnsupportedError for what is neither."""
    found = chip_named(chip) if isinstance(chip, str) else chip
    expect(found, Chip, stage, "give LOIHI1 or LOIHI2")
    return found


def chip_named(name: str) -> Chip:
    """The chip of that name. Raises RangeError listing the known ones."""
    if name not in CHIPS:
        raise RangeError(f"chip: '{name}' is none of {', '.join(CHIPS)}")
    return CHIPS[name]
