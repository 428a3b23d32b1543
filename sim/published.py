"""Published figures that need no weights, counted again: operations, parameters, energies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A row of a published table, and what its network comes to here.

    printed_flops, printed_parameters  in millions, as printed; printed_energy in microjoules, or None
    flops, parameters                  counted
    rate                               mean operations a FLOP that the table gives, or None
    """

    network: str
    dataset: str
    printed_flops: float
    printed_parameters: float
    flops: int
    parameters: int
    rate: float | None = None
    printed_energy: float | None = None

    @property
    def flops_agree(self) -> bool:
        """To the digit that is printed."""
        return round(self.flops / 1e6, 1) == self.printed_flops

    @property
    def parameters_agree(self) -> bool:
        """To the digit that is printed."""
        digits = len(f"{self.printed_parameters:g}".partition(".")[2])
        return round(self.parameters / 1e6, digits) == self.printed_parameters

    @property
    def energy_uj(self) -> float | None:
        """By the literature's formula at the given rate: 0.9 pJ x rate x FLOPs."""
        from ranvier.sim.energy_models import published

        if self.rate is None:
            return None
        return published(0.0, {"all layers": (self.rate, self.flops)}, 1).total_pj / 1e6

    @property
    def energy_agrees(self) -> bool | None:
        """To the digits that are printed; None where no energy is."""
        if self.energy_uj is None or self.printed_energy is None:
            return None
        return abs(self.energy_uj - self.printed_energy) < 0.01


# name, data set, options, FLOPs and parameters as printed (millions), rate, energy (uJ). The 32-layer network
# is printed as "ResNet-34"; the convolutions of its blocks, and those of vgg16, have biases. MNIST is padded
# to 32x32. The layout of ghostnet-mlp is not printed: ours is the closest simple one.
ROWS: tuple[tuple[str, str, dict[str, Any], float, float, float | None, float | None], ...] = (
    ("resnet32", "CIFAR-10", {"in_channels": 3, "conv_bias": True}, 72.5, 0.47, None, None),
    ("resnet32", "MNIST", {"in_channels": 1, "conv_bias": True}, 72.2, 0.46, None, None),
    ("vgg16", "CIFAR-10", {"in_channels": 3, "conv_bias": True}, 317.0, 14.79, None, None),
    ("vgg16", "MNIST", {"in_channels": 1, "conv_bias": True}, 315.8, 14.79, None, None),
    ("ghostnet", "CIFAR-10", {}, 6.4, 3.9, 0.181, 1.04),
    ("ghostnet-dfc", "CIFAR-10", {}, 9.7, 4.9, 0.175, 1.53),
    ("ghostnet-mlp", "CIFAR-10", {}, 7.1, 4.7, 0.150, 0.96),
)


def published_figures() -> list[Published]:
    """The rows, each network built and counted: MACs of one step + 12 (normalization + pooling outputs).

    The printed tables give no configuration; these networks and this rule reproduce their operations to
    the printed digit, but for ghostnet-mlp. Where the rate of operations a FLOP is given, the literature's
    energy formula at that rate is held against the printed energy.
    """
    from ranvier.train import create_model
    from ranvier.train.models import flops, n_parameters

    found = []
    for name, dataset, options, printed_flops, printed_parameters, rate, energy in ROWS:
        net = create_model(name, steps=6, image_size=32, **options)
        counted = flops(net), n_parameters(net)
        found.append(
            Published(name, dataset, printed_flops, printed_parameters, *counted, rate, energy)
        )
    return found


def cells(found: Sequence[Published]) -> list[dict[str, Any]]:
    """The rows as a table shows them, by column."""
    return [
        {
            "network": r.network, "data set": r.dataset,
            "MFLOP, printed": r.printed_flops, "counted": round(r.flops / 1e6, 3),
            "FLOPs agree": "yes" if r.flops_agree else "no",
            "M parameters, printed": r.printed_parameters, "here": round(r.parameters / 1e6, 4),
            "parameters agree": "yes" if r.parameters_agree else "no",
            "uJ, printed": r.printed_energy,
            "uJ, formula": None if r.energy_uj is None else round(r.energy_uj, 3),
            "energy agrees": {True: "yes", False: "no", None: "-"}[r.energy_agrees],
        }
        for r in found
    ]  # fmt: skip


def section(found: Sequence[Published]) -> dict[str, Any]:
    """A report's table of them."""
    from ranvier.sim import report_parts as parts

    rows = cells(found)
    columns = [parts.column(k, k) for k in rows[0]]
    note = (
        "Compact networks, T = 6. FLOPs: multiply-accumulates of one step + 12 x (normalization and pooling "
        "outputs). Energy: 0.9 pJ x FLOPs x the mean rate of operations that the table gives."
    )
    return parts.table(
        "Published figures, counted again", columns, rows, basis="measured", note=note
    )


def markdown(found: Sequence[Published]) -> str:
    """A Markdown table of them."""
    rows = cells(found)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += [
        "| " + " | ".join("-" if v is None else str(v) for v in r.values()) + " |" for r in rows
    ]
    return "\n".join(lines) + "\n"
