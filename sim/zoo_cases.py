"""The networks of `python -m ranvier.sim.zoo`: each name of list_models() at a size that runs fast.

A small instance has the layout of the named network - its stem, joins, pools, number of stages -
with fewer channels, blocks and pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

JOINS = ("vanilla", "sew", "sew-and", "sew-iand", "ms", "or")


@dataclass(frozen=True)
class Case:
    """A network of the page.

    name     of list_models()
    options  of create_model
    size     what was made smaller, in words
    staged   a program a stage, the host in between (`ranvier.deploy.staged`)
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    size: str = ""
    staged: bool = False

    def __repr__(self) -> str:
        """What decides the outcome, for kept files."""
        return f"Case({self.title!r}, {self.options!r}, {self.size!r})"

    @property
    def title(self) -> str:
        """The name with the options that are not about size."""
        own = {k: v for k, v in self.options.items() if k not in _SIZES}
        words = [str(v) if k in ("join", "neuron") else f"{k}={v!r}" for k, v in own.items()]
        return " ".join([self.name, *words, *(["by stages"] if self.staged else [])])


_SIZES = ("image_size", "widths", "layers", "blocks", "rows", "steps", "hidden", "channels",
          "units", "stage_steps", "strides", "in_channels", "num_classes", "threshold", "pool")  # fmt: skip
_SMALL = {"image_size": 8, "steps": 3}
_V9 = (4, 8, 0, 8, 8, 0, 8, 8, 0, 8, 8, 0)
_V11 = (4, 0, 8, 0, 8, 8, 0, 8, 8, 0, 8, 8, 0)
_V16 = (4, 4, 0, 8, 8, 0, 8, 8, 8, 0, 8, 8, 8, 0, 8, 8, 8, 0)
_ROWS = ((3, 8, 8, 0, 1), (3, 16, 8, 0, 2), (3, 16, 12, 0, 1))
_SE_ROWS = ((3, 8, 8, 0, 1), (3, 16, 8, 1, 2), (3, 16, 12, 0, 1))
_NO_NORM = {"norm": "none", "threshold": 1.0, "pool": "max"}
_THIN = {"widths": (4, 8, 8), **_SMALL}
_FOUR = {"widths": (4, 4, 8, 8), "image_size": 32, "num_classes": 10, "steps": 2}
_CURRENTS = ("cuba", "sliding-psn", "paralif-t")
_NEURONS = ("psn", "masked-psn", "psu", "ipsu", "rpsu", "paralif-sd", "paralif-st", "paralif-gs",
            "relu")  # fmt: skip


def cases() -> list[Case]:
    """All, in the order of the page."""
    return [*_plain(), *_resnets(), *_imagenet(), *_others(), *_neurons()]


def _plain() -> list[Case]:
    vgg = "an eighth of the channels"
    return [
        Case("mlp", {"image_size": 8, "hidden": (32,)}, "8x8 pixels, 32 hidden"),
        Case("cnn", {"image_size": 8}, "8x8 pixels"),
        Case("vgg9", {"layers": _V9, "image_size": 16, "steps": 2}, vgg),
        Case("vgg11", {"layers": _V11, "steps": 2}, vgg),
        Case("vgg16", {"layers": _V16, "hidden": (16,), "steps": 2}, vgg),
    ]


def _resnets() -> list[Case]:
    digits = [Case("resnet-digits", {"join": j, "steps": 3}, "full") for j in JOINS]
    conv = [
        Case("resnet8", {"join": j, "shortcut": "conv", **_THIN}, "4/8/8 channels, 8x8")
        for j in JOINS
    ]
    deep = [Case("resnet20", {"join": j, **_THIN}, "4/8/8 channels, 8x8") for j in ("ms", "or")]
    more = [
        Case("resnet", {"join": "or", "blocks": (1, 2, 1), **_THIN}, "4/8/8 channels, 8x8"),
        Case("resnet14", {"join": "sew", **_THIN}, "4/8/8 channels, 8x8"),
    ]
    names = (("resnet32", "or"), ("resnet56", "sew"), ("resnet110", "ms"), ("resnet482", "ms"))
    short = [
        Case(n, {"join": j, "blocks": (1, 1, 1), **_THIN}, "one block a stage, 4/8/8 channels, 8x8")
        for n, j in names
    ]
    return [*digits, *conv, *deep, *more, *short]


def _imagenet() -> list[Case]:
    basic = [
        Case("resnet18", {"join": j, **_FOUR}, "4..8 channels, 32x32")
        for j in ("vanilla", "sew", "ms", "or")
    ]
    one = {"blocks": (1, 1, 1, 1), **_FOUR}
    size = "one block a stage, 4..8 channels, 32x32"
    deep = [Case(f"resnet{d}", {"join": "sew", **one}, size) for d in (50, 101, 152)]
    ms = {**one, "image_size": 32}
    return [
        *basic, Case("resnet34", {"join": "sew-iand", **one}, size), *deep,
        *(Case(n, ms, size) for n in ("ms-resnet18", "ms-resnet34", "ms-resnet104")),
    ]  # fmt: skip


def _others() -> list[Case]:
    ghost = {"rows": _ROWS, **_SMALL}
    gated = {"rows": _SE_ROWS, **_SMALL}
    seven = {"widths": (8, 8, 8), **_SMALL}
    syna = {"widths": (4, 4, 4, 4), "image_size": 16, "steps": 2}
    units = {"units": ((8,), (8,)), "stage_steps": (4, 2), "steps": 4, "image_size": 8}
    stages = {"blocks": (1, 1), "widths": (8, 8), "strides": (1, 2), "stage_steps": (4, 2),
              "steps": 4, "image_size": 8}  # fmt: skip
    columns = {"channels": 8, "hidden": 16, "image_size": 8, "steps": 8}
    bare = {**columns, "norm": "none", "threshold": 1.0}
    pair = {"layers": (8, 0, 8, 0), "image_size": 8}
    three, two = "three rows", "8 channels, 8x8"
    return [
        Case("ghostnet", {**ghost, "se": False}, three), Case("ghostnet", gated, three),
        Case("ghostnet-mlp", {**ghost, "se": False}, three), Case("ghostnet-mlp", gated, three),
        Case("ghostnet-dfc", {**ghost, "se": False}, three),
        *(Case("sew7b", {"join": j, **seven}, "three layers of 8") for j in JOINS),
        Case("sew7b-gesture", {"join": "or", **seven}, "three layers of 8"),
        Case("syna-resnet18", {**syna, "attention": ""}, "4 channels, 16x16"),
        Case("syna-resnet18-dvs", {**syna, "attention": ""}, "4 channels, 16x16"),
        Case("syna-resnet18", syna, "4 channels, 16x16"),
        *(Case(n, o, "two stages of 8", staged)
          for n, o in (("ssnn-vgg9", units), ("ssnn-resnet", stages)) for staged in (True, False)),
        Case("dvs-snn", pair, two), Case("dvs-cnn", pair, two),
        Case("sequential", columns, "8 channels, 8x8"),
        Case("sequential", {"neuron": "lif", **columns}, "8 channels, 8x8"),
        Case("sequential", {"neuron": "sliding-psn", **bare}, "8 channels, 8x8"),
        Case("sequential", {"neuron": "sliding-psn", **columns}, "8 channels, 8x8"),
    ]  # fmt: skip


def _neurons() -> list[Case]:
    base: dict[str, Any] = {"image_size": 8}
    run: list[dict[str, Any]] = [
        {"neuron": "if"}, {"neuron": "plif"}, {"reset": "subtract"}, {"reset": "none"},
        {"decay_input": True},
        *({"neuron": n, **_NO_NORM} for n in _CURRENTS), *({"neuron": n} for n in _CURRENTS),
    ]  # fmt: skip
    refused: list[dict[str, Any]] = [{"neuron": n} for n in _NEURONS]
    return [Case("cnn", {**options, **base}, "8x8 pixels") for options in (*run, *refused)]
