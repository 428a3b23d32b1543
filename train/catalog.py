"""What is known of every network and neuron by name: source, published figures, verdict.

`python -m ranvier.train.catalog` prints the tables of docs/models.md, counted from the code.
Published figures are those of the named papers, not ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ranvier.train.errors import RangeError
from ranvier.train.models import (
    NORM_AND_POOL_FACTOR,
    create_model,
    list_models,
    n_parameters,
    operations,
)

BINARY = "accumulate-only after the first layer; deployable"
JOINED = (
    "accumulate-only after the stem with vanilla, sew-and, sew-iand, or, and with ms at option A;"
    " sew sums spikes to integers; all deployable"
)
REAL_SHORTCUTS = "deployable; its 1x1 shortcut convolutions see real values (multiply-accumulate)"
CONV_SHORTCUTS = (
    "as resnet20 but for ms, whose stem pools real values and is refused (ms-resnet18 .. 104 have"
    " no such pooling)"
)
POOLED_SUMS = (
    "deployable but for ms, whose pools take real values;"
    " with sew a pool of sums up to k is 2k - 1 populations"
)
STAGED = (
    "deployable as a program a stage, temporal transformers on the host (`ranvier.deploy.staged`);"
    " refused whole"
)


@dataclass(frozen=True)
class Facts:
    """source: paper or document; published: its figures, with time steps; verdict: on a chip."""

    source: str
    published: str
    verdict: str


_SEW = "SEW-ResNet, Fang et al. 2021"
_MS = "MS-ResNet, Hu et al. 2024"
_REPORT = "compact reconstruction, T = 6"


def _imagenet(sew: str, vanilla: str) -> Facts:
    published = f"ImageNet, T = 4: SEW-ADD {sew} %, vanilla {vanilla} %"
    return Facts(_SEW, published, CONV_SHORTCUTS)


FACTS: dict[str, Facts] = {
    "mlp": Facts("-", "-", BINARY),
    "cnn": Facts("-", "-", BINARY),
    "vgg9": Facts("usual widths of the literature", "-", BINARY),
    "vgg11": Facts("VGG-11", "-", BINARY),
    "vgg16": Facts(_REPORT, "CIFAR-10 90.18 %, MNIST 99.03 %; 14.79 M, 317.0 M", BINARY),
    "resnet": Facts("He et al. 2016, any depth", "-", JOINED),
    "resnet-digits": Facts("for 8x8 digits", "-", JOINED),
    "resnet8": Facts("CIFAR family, n = 1", "-", JOINED),
    "resnet14": Facts("CIFAR family, n = 2", "-", JOINED),
    "resnet20": Facts("CIFAR family, n = 3", "-", JOINED),
    "resnet32": Facts(
        _REPORT,
        "CIFAR-10: SEW 89.03 %, MS 82.39 %, vanilla 10.00 %; 0.47 M, 72.5 M",
        JOINED,
    ),
    "resnet56": Facts("CIFAR family, n = 9", "-", JOINED),
    "resnet110": Facts(_MS, "CIFAR-10: MS 91.7 %", JOINED),
    "resnet482": Facts(_MS, "CIFAR-10: MS 91.9 %", JOINED),
    "resnet18": _imagenet("63.18", "62.32"),
    "resnet34": _imagenet("67.04", "61.86"),
    "resnet50": _imagenet("67.78", "57.66"),
    "resnet101": _imagenet("68.76", "31.79"),
    "resnet152": _imagenet("69.26", "10.03"),
    "ms-resnet18": Facts(_MS, "ImageNet, T = 6: 63.10 %", REAL_SHORTCUTS),
    "ms-resnet34": Facts(_MS, "ImageNet, T = 6: 69.42 %", REAL_SHORTCUTS),
    "ms-resnet104": Facts(_MS, "ImageNet, T = 5: 74.21 %", REAL_SHORTCUTS),
    "ghostnet": Facts(
        _REPORT,
        "CIFAR-10 80.12 %; 3.9 M, 6.4 M",
        "host-only: squeeze-and-excitation gates are real-valued; se=False deploys",
    ),
    "ghostnet-dfc": Facts(
        _REPORT, "CIFAR-10 80.42 %; 4.9 M, 9.7 M", "host-only: the DFC gate is a sigmoid"
    ),
    "ghostnet-mlp": Facts(
        _REPORT + ", closest documented layout",
        "CIFAR-10 81.30 %; 4.7 M, 7.1 M",
        "host-only: squeeze-and-excitation gates are real-valued; se=False deploys",
    ),
    "syna-resnet18": Facts(
        "SynA-ResNet, arXiv 2311.06570",
        "0.8 spikes per neuron and sample",
        "host-only: attention looks at all steps together; attention='' deploys",
    ),
    "syna-resnet18-dvs": Facts(
        "SynA-ResNet, arXiv 2311.06570",
        "-",
        "host-only: attention looks at all steps together; attention='' deploys",
    ),
    "ssnn-vgg9": Facts(
        "SSNN, Ding et al. 2024",
        "T_avg = 5: CIFAR10-DVS 73.63 %, DVS-Gesture 90.74 %",
        STAGED,
    ),
    "ssnn-resnet": Facts(
        "SSNN, Ding et al. 2024; our depth and widths",
        "-",
        STAGED,
    ),
    "sew7b": Facts(
        _SEW,
        "CIFAR10-DVS, T = 16: 74.4 %",
        POOLED_SUMS,
    ),
    "sew7b-gesture": Facts(
        _SEW,
        "DVS-Gesture, T = 16: 97.92 %",
        POOLED_SUMS,
    ),
    "dvs-snn": Facts(
        "IF network of a CIFAR10-DVS comparison; our widths", "CIFAR10-DVS, T = 8: 66.68 %", BINARY
    ),
    "dvs-cnn": Facts(
        "its ReLU twin", "CIFAR10-DVS: 68.20 %", "host-only: an artificial network, no spikes"
    ),
    "sequential": Facts(
        "PSN, Fang et al. 2023",
        "sequential CIFAR-10, T = 32: PSN 88.45, sliding 86.70, masked 85.81, LIF 81.50 %",
        "host-only with PSN: a dense product over time in every neuron; deployable with lif",
    ),
}

_DENSE = "host-only: a dense product over time in every neuron"
_SIGMOID = "host-only: a sigmoid over time guesses the resets"
NEURON_FACTS: dict[str, Facts] = {
    "if": Facts("-", "-", "deployable"),
    "lif": Facts("-", "-", "deployable"),
    "plif": Facts("Fang et al. 2021", "-", "deployable: its decay is fixed after training"),
    "cuba": Facts(
        "-",
        "-",
        "deployable: the chip's own neuron; a bias is one more neuron, firing in every step",
    ),
    "psn": Facts("Fang et al. 2023", "-", _DENSE + ", and it sees the future"),
    "masked-psn": Facts("Fang et al. 2023", "-", _DENSE),
    "sliding-psn": Facts(
        "Fang et al. 2023", "-", "deployable: k delayed synapses, no memory; a bias as with cuba"
    ),
    "psu": Facts("Li et al. 2024", "-", _SIGMOID),
    "ipsu": Facts("Li et al. 2024", "-", _SIGMOID),
    "rpsu": Facts("Li et al. 2024", "-", _SIGMOID),
    "paralif-t": Facts(
        "Yarga and Wood 2024",
        "-",
        "deployable: a CUBA LIF without reset; a bias as with cuba",
    ),
    "relu": Facts("-", "-", "host-only: real-valued output"),
    **{
        f"paralif-{name}": Facts("Yarga and Wood 2024", "-", why)
        for names, why in (
            (("gs", "sb", "trb"), "host-only: fires at random"),
            (("d", "sd", "td", "trd"), "host-only: fires on a difference of squashed membranes"),
            (("st", "tt", "trt"), "host-only as traced; equals a moved threshold after training"),
        )
        for name in names
    },
}


_BUILT_FOR_STEPS = ("sequential", "ssnn", "syna")


@dataclass(frozen=True)
class Row:
    """One network, counted: `mega_flops` by the rule of `train.models.flops`."""

    name: str
    join: str
    neuron: str
    steps: int
    input_shape: tuple[int, int, int]
    n_parameters: int
    n_macs: int
    mega_flops: float
    facts: Facts


def describe(name: str) -> Row:
    """The row of one network at its defaults. Raises RangeError for an unknown name."""
    net = create_model(name)
    if name not in FACTS:
        raise RangeError(f"catalog: nothing is recorded of '{name}'; add it to FACTS")
    config = net.config
    if not name.startswith(_BUILT_FOR_STEPS):
        net.steps = 1  # the counts are of one step; these cannot run fewer than they are built for
    macs, elements = operations(net)
    return Row(
        name,
        config.join,
        config.neuron,
        config.steps,
        config.input_shape,
        n_parameters(net),
        macs,
        (macs + NORM_AND_POOL_FACTOR * elements) / 1e6,
        FACTS[name],
    )


def model_table(names: Iterable[str] | None = None) -> str:
    """A Markdown table of the networks, all by default."""
    lines = [
        "| name | join | neuron | T | input | parameters | MMAC a step | MFLOP (T = 6 rule) |"
        " source | published | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in list_models() if names is None else names:
        row = describe(name)
        shape = "x".join(str(n) for n in row.input_shape)
        lines.append(
            f"| {row.name} | {row.join} | {row.neuron} | {row.steps} | {shape} |"
            f" {row.n_parameters:,} | {row.n_macs / 1e6:.2f} | {row.mega_flops:.1f} |"
            f" {row.facts.source} | {row.facts.published} | {row.facts.verdict} |"
        )
    return "\n".join(lines) + "\n"


def neuron_table() -> str:
    """A Markdown table of the neurons."""
    lines = ["| neuron | source | verdict |", "|---|---|---|"]
    lines += [f"| {n} | {f.source} | {f.verdict} |" for n, f in sorted(NEURON_FACTS.items())]
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/models.md."""
    return (
        "# Networks and neurons\n\n"
        "Generated by `python -m ranvier.train.catalog`; edit train/catalog.py instead. Counts are"
        " of the code at each name's defaults, published figures of the named source. Joins other"
        " than the default have the same counts unless their shortcuts carry neurons. What the"
        " verdicts say is run in [zoo-lava.md](zoo-lava.md), where each network is compared with"
        " Lava value for value.\n\n"
        f"## Networks\n\n{model_table()}\n## Neurons\n\n{neuron_table()}"
    )


if __name__ == "__main__":
    print(page(), end="")
