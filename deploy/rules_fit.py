"""Rules RV4xx: what does not fit, with the layer and the number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ranvier.deploy.placement import Placement
from ranvier.deploy.rules import Context, Hit, rule
from ranvier.train.errors import CapacityError

CONFIGS = {"loihi1": (32, 16)}  # compartment and threshold settings a core; nengo-loihi 1.0


@rule("RV401", "error", "layer that fits no core")
def no_core(c: Context) -> Iterator[Hit]:
    """A single row of a single channel whose synapses alone exceed a core's memory."""
    if isinstance(c.placed, CapacityError):
        text = str(c.placed).removeprefix("place: ")
        name = text.split("'")[1] if "'" in text else ""
        yield name, text, "fewer inputs, a smaller kernel, or fewer weight bits"


@rule("RV402", "error", "network larger than the chip")
def too_large(c: Context) -> Iterator[Hit]:
    """VGG on Loihi 1: more cores than one chip has."""
    if isinstance(c.placed, Placement) and c.placed.n_chips > 1:
        worst = max(c.placed.rows(), key=lambda r: int(r["slices"]))
        yield (
            str(worst["population"]),
            f"the network needs {c.placed.n_cores} cores; {c.chip.name} has "
            f"{int(c.chip.n_cores.value)}. '{worst['population']}' alone takes {worst['slices']} "
            f"slices ({worst['synapse_bits']:,} synapse bits)",
            f"{c.placed.n_chips} chips, fewer channels, or fewer weight bits",
        )


@rule("RV403", "info", "layer cut over several cores")
def cut(c: Context) -> Iterator[Hit]:
    """A population larger than a core: its slices each hold the kernel and their own axons."""
    if isinstance(c.placed, Placement):
        for row in c.placed.rows():
            if int(row["slices"]) > 1:
                yield (
                    str(row["population"]),
                    f"{row['neurons']:,} neurons on {row['slices']} slices (cores {row['cores']})",
                    "nothing; fewer channels would need fewer cores",
                )


@rule("RV404", "warning", "more neuron settings than a core keeps")
def configs(c: Context) -> Iterator[Hit]:
    """Thresholds or decays for each channel on Loihi 1, whose cores share a few settings."""
    limit = CONFIGS.get(c.chip.name)
    if limit is None or c.program is None:
        return
    for p in c.program:
        if p.cell is None:
            continue
        n_vth = len(np.unique(p.cell.vth))
        n_cell = len(np.unique(p.cell.dv)) * len(np.unique(p.cell.du))
        if n_cell > limit[0] or n_vth > limit[1]:
            yield (
                p.name,
                f"{n_vth} thresholds and {n_cell} decays; a core of {c.chip.name} keeps {limit[1]} "
                f"and {limit[0]}",
                "share thresholds and decays within a layer",
            )
