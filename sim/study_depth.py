"""`study_depth`: the same family at several depths, each join: does depth help, or does it degrade?"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranvier.sim.study import Say, Study, study_residual
from ranvier.sim.study_setup import parts_of
from ranvier.train.errors import RangeError
from ranvier.train.files import write_text

DEPTHS = (20, 32, 56)
JOINS = ("vanilla", "sew", "ms", "or")
NARROW = {"widths": (8, 8, 16)}  # channels of the stages: deep networks that train in a minute
EPOCHS = 6


@dataclass(frozen=True, eq=False)
class DepthStudy:
    """A Study for each depth, and measures of the untrained networks.

    measures  (join, depth) -> identity at initialisation, gradient norms over depth
    """

    studies: Mapping[int, Study]
    measures: Mapping[tuple[str, int], Mapping[str, Any]]
    wall_s: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row a join and depth."""
        from ranvier.sim.study_depth_view import rows

        return rows(self)

    def table(self) -> str:
        """The rows as text."""
        from ranvier.sim.study_depth_view import text_table

        return text_table(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Rows and measures as JSON; written to `path` as well, where one is given."""
        measures = [{"join": j, "depth": d, **m} for (j, d), m in self.measures.items()]
        content = {
            "rows": self.rows(), "measures": measures, "wall_s": self.wall_s,
            "setups": {d: s.setup.key() for d, s in self.studies.items()}, "meta": dict(self.meta),
        }  # fmt: skip
        text = json.dumps(content, indent=1)
        if path is not None:
            write_text(path, text)
        return text

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file that needs nothing else."""
        from ranvier.sim.report import write_report
        from ranvier.sim.study_depth_view import report_data

        write_report(report_data(self), path)


def study_depth(
    dataset: str | None = None,
    depths: Sequence[int] = DEPTHS,
    joins: Sequence[str] = JOINS,
    seeds: int | Sequence[int] = 2,
    *,
    out: str | os.PathLike[str] = "runs/depth",
    measures: bool = True,
    options: Mapping[str, Any] = NARROW,
    epochs: int | None = EPOCHS,
    say: Say | None = None,
    meta: Mapping[str, Any] | None = None,
    **more: Any,
) -> DepthStudy:
    """The DepthStudy of ResNets of 6n + 2 layers: the same data, widths, seeds and training at each depth.

    depths   numbers of weighted layers: 8, 14, 20, 32, 56 or 110
    options  of the network, see `create_model`
    out      folder: depth<N>/ is the folder of a `study_residual`; depth.json, depth.html
    more     further arguments of `study_residual`
    Raises RangeError for an unknown depth, and what `study_residual` raises.
    """
    from ranvier.train import list_models

    begin, known = time.perf_counter(), list_models("resnet*")
    for depth in depths:
        if f"resnet{depth}" not in known or (depth - 2) % 6:
            raise RangeError(
                f"study: depth {depth} is none of 8, 14, 20, 32, 56, 110, 482 (6n + 2)"
            )
    studies = {
        depth: study_residual(
            dataset, joins, seeds, out=Path(out) / f"depth{depth}", model=f"resnet{depth}",
            options=dict(options), epochs=epochs, measures=False, mapping="graded",
            say=None if say is None else (lambda text, d=depth: say(f"depth {d}: {text}")),  # type: ignore[misc]
            meta=meta, **more,
        )
        for depth in depths
    }  # fmt: skip
    some = studies[depths[0]].setup
    found = {(j, d): untrained(j, d, options, some) for d in depths for j in joins if measures}
    made = DepthStudy(studies, found, time.perf_counter() - begin, dict(meta or {}))
    made.to_json(Path(out) / "depth.json")
    made.to_html(Path(out) / "depth.html")
    return made


def untrained(variant: str, depth: int, options: Mapping[str, Any], setup: Any) -> dict[str, Any]:
    """What initialisation alone says about a join at a depth.

    identity  share of its shortcut that the worst block passes on, as initialised by default, and with
              the last normalization of each branch at zero
    gradient  of the blocks, all equal, by default and with zero: log norm a block (slope), largest |log|
    """
    import torch

    from ranvier.sim.measures import gradient_norms, identity_at_init, isometry
    from ranvier.train import create_model

    join, shortcut = parts_of(variant)
    identity, gradient = {}, {}
    for name, zero in (("default", join == "ms"), ("zero", True)):
        torch.manual_seed(0)
        net = create_model(
            f"resnet{depth}", join=join, shortcut=shortcut, zero_init=zero, steps=setup.steps,
            in_channels=1, image_size=8, **options,
        )  # fmt: skip
        identity[name] = min(identity_at_init(net, torch.rand(4, 1, 8, 8)).values())
    for name, zero in (("plain", False), ("zero", True)):
        r = gradient_norms(join, depth=(depth - 2) // 2, zero_init=zero)
        gradient[name] = {"r": r.tolist(), **isometry(r)}
    return {"identity": identity, "gradient": gradient}
