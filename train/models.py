"""Networks by name: `create_model`, `list_models`, and the rule that counts their operations."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranvier.train.errors import DataError, RangeError
from ranvier.train.networks import NEURONS, ModelConfig, Network

JOIN_NAMES = ("vanilla", "sew", "sew-and", "sew-iand", "ms", "or")
NORMS = ("bn", "tdbn", "tdbn-scaled", "none")
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Entry:
    """A name of the registry: classes as "module:Name", loaded on first use, and own defaults."""

    network: str
    config: str
    defaults: dict[str, Any]


_PLAIN = ("models_plain:PlainNet", "models_plain:PlainConfig")
_RESNET = ("models_resnet:ResNet", "models_resnet:ResNetConfig")
_V9 = (64, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
_V11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
_V16 = (64, 64, 0, 128, 128, 0, *(256,) * 3, 0, *(512,) * 3, 0, *(512,) * 3, 0)
_DIGITS = {"blocks": (1, 1, 1), "widths": (16, 16, 32), "image_size": 8, "in_channels": 1}
_MNIST = {"in_channels": 1, "image_size": 28}


_GHOST = ("models_ghost:GhostNet", "models_ghost:GhostConfig")
_SYNA = ("models_syna:SynANet", "models_syna:SynAConfig")
_SSNN = ("models_ssnn:SSNN", "models_ssnn:SSNNConfig")
_SEW7B = ("models_dvs:SevenB", "models_dvs:SevenBConfig")
_SEQUENTIAL = ("models_dvs:SequentialNet", "models_dvs:SequentialConfig")
_EVENTS = {"in_channels": 2, "image_size": 48}
_SEW7B_BASE = {
    "join": "sew",
    "neuron": "plif",
    "decay_input": True,
    "steps": 16,
    "in_channels": 2,
    "image_size": 128,
}
_PAIR = {
    "layers": (32, 0, 64, 0, 128, 0),
    "norm": "none",
    "conv_bias": True,
    "in_channels": 2,
}
_LIF2 = {"decay_input": True, "beta": 0.5}  # tau = 2, the input scaled by 1 / tau
_ZOO: dict[str, Entry] = {
    "ghostnet": Entry(*_GHOST, {"steps": 6}),
    "ghostnet-dfc": Entry(*_GHOST, {"steps": 6, "dfc": True}),
    "ghostnet-mlp": Entry(*_GHOST, {"steps": 6, "channel_mlp": True}),
    "syna-resnet18": Entry(*_SYNA, {"join": "or", "steps": 16, **_LIF2}),
    "syna-resnet18-dvs": Entry(
        *_SYNA,
        {"join": "or", "steps": 16, **_LIF2, **_EVENTS, "ma_after": 1, "stem_pool": True},
    ),
    "ssnn-vgg9": Entry(*_SSNN, {"steps": 8, **_EVENTS}),
    "ssnn-resnet": Entry(
        *_SSNN,
        {
            "steps": 8,
            **_EVENTS,
            "kind": "resnet",
            "join": "sew",
            "blocks": (1, 1, 1, 1),
            "widths": (64, 128, 256, 512),
            "strides": (1, 2, 2, 2),
        },
    ),
    "sew7b": Entry(*_SEW7B, _SEW7B_BASE),
    "sew7b-gesture": Entry(*_SEW7B, {**_SEW7B_BASE, "widths": (32,) * 7, "num_classes": 11}),
    "dvs-snn": Entry(*_PLAIN, {**_PAIR, "neuron": "if", "steps": 8}),
    "dvs-cnn": Entry(*_PLAIN, {**_PAIR, "neuron": "relu", "steps": 1}),
    "sequential": Entry(*_SEQUENTIAL, {"neuron": "psn", "steps": 32}),
}
_MS = {
    "join": "ms",
    "norm": "tdbn",
    "steps": 6,
    "beta": 0.25,
    "threshold": 0.5,
    "surrogate": "rectangle",
    "strides": (2, 2, 2, 2),
    "stem": "7x7",
}
_IMAGENET = {
    "widths": (64, 128, 256, 512),
    "strides": (1, 2, 2, 2),
    "stem": "7x7-pool",
    "shortcut": "conv",
    "num_classes": 1000,
    "image_size": 224,
}


def _imagenet_resnets() -> dict[str, Entry]:
    basic = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    deep = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    ms104 = {"blocks": (3, 8, 32, 8), "stem": "3x3-deep", "shortcut_pool": True, "dropout": 0.2}
    return {
        **{f"resnet{d}": Entry(*_RESNET, {**_IMAGENET, "blocks": b}) for d, b in basic.items()},
        **{
            f"resnet{d}": Entry(*_RESNET, {**_IMAGENET, "blocks": b, "block": "bottleneck"})
            for d, b in deep.items()
        },
        **{
            f"ms-resnet{d}": Entry(*_RESNET, {**_IMAGENET, **_MS, "blocks": b})
            for d, b in basic.items()
        },
        "ms-resnet104": Entry(*_RESNET, {**_IMAGENET, **_MS, **ms104}),
    }


def _cifar_resnets() -> dict[str, Entry]:
    depths = {f"resnet{6 * n + 2}": n for n in (1, 2, 3, 5, 9, 18, 80)}
    return {name: Entry(*_RESNET, {"blocks": (n, n, n)}) for name, n in depths.items()}


MODELS: dict[str, Entry] = {
    "mlp": Entry(*_PLAIN, {"hidden": (256,), **_MNIST}),
    "cnn": Entry(*_PLAIN, {"layers": (16, 0, 32, 0), "pool": "avg", **_MNIST}),
    "vgg9": Entry(*_PLAIN, {"layers": _V9}),
    "vgg11": Entry(*_PLAIN, {"layers": _V11}),
    "vgg16": Entry(*_PLAIN, {"layers": _V16, "hidden": (128,)}),
    "resnet": Entry(*_RESNET, {}),
    "resnet-digits": Entry(*_RESNET, _DIGITS),
    **_cifar_resnets(),
    **_imagenet_resnets(),
    **_ZOO,
}


def list_models(pattern: str | None = "*") -> list[str]:
    """Sorted names that match the shell pattern, such as "*resnet*"; None: all."""
    return sorted(fnmatch.filter(MODELS, "*" if pattern is None else pattern))


def create_model(
    name: str,
    *,
    join: str | None = None,
    neuron: str | None = None,
    norm: str | None = None,
    steps: int | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    pretrained: str | None = None,
    **config: Any,
) -> Network:
    """A network by its name; None leaves the name's own default (docs/models.md).

    join         vanilla, sew, sew-and, sew-iand, ms, or; networks without joins ignore it
    neuron       a name of NEURONS: if, lif, plif, cuba, psn, ..., paralif-sd, relu
    norm         bn, tdbn, tdbn-scaled, none
    steps        time steps of a static image
    in_channels, num_classes    what goes in and comes out
    pretrained   tag of stored weights, such as "mnist"; the configuration is then theirs
    config       further fields of the model's configuration, as image_size, which is `net.config`:
                 `create_model(**dataclasses.asdict(net.config))` builds the same network
    Raises RangeError for an unknown name or value, naming the nearest; DataError where the weights
    are not there.
    """
    common = {"join": join, "neuron": neuron, "norm": norm, "steps": steps,
              "in_channels": in_channels, "num_classes": num_classes}  # fmt: skip
    config |= {key: value for key, value in common.items() if value is not None}
    entry = MODELS.get(name)
    if entry is None:
        raise RangeError(_unknown("model", name, MODELS))
    if pretrained is not None:
        config = {**_stored_config(name, entry, config, pretrained), **config}
    made = make_config(name, entry, config)
    net = _load(entry.network)(made)
    assert isinstance(net, Network)
    if pretrained is not None:
        _load_weights(net, pretrained)
    return net


def make_config(name: str, entry: Entry, given: dict[str, Any]) -> ModelConfig:
    """The model's configuration: its family's defaults, the name's own, then what was given.

    Raises RangeError for an unknown field, join, neuron or norm.
    """
    kind = _load(entry.config)
    known = [field.name for field in fields(kind)]
    for key in given:
        if key not in known:
            raise RangeError(_unknown(f"model {name}: option", key, known))
    values = {**entry.defaults, **given, "name": name}
    for key, allowed in (("join", JOIN_NAMES), ("neuron", tuple(NEURONS)), ("norm", NORMS)):
        if key in values and values[key] not in allowed:
            raise RangeError(_unknown(f"model {name}: {key}", values[key], allowed))
    return kind(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    """Lists, as JSON gives them, back to tuples."""
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _unknown(what: str, found: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(found), list(allowed), n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{what} '{found}' is unknown.{hint} Known: {', '.join(sorted(allowed))}."


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(f"ranvier.train.{module}"), name)


def weights_path(name: str, join: str, tag: str) -> Path:
    """Where the stored weights of a model lie."""
    return WEIGHTS / f"{name}-{join}-{tag}.safetensors"


def _stored_config(name: str, entry: Entry, given: dict[str, Any], tag: str) -> dict[str, Any]:
    """The configuration that the stored weights were trained with."""
    join = given.get("join", entry.defaults.get("join", "vanilla"))
    path = weights_path(name, join, tag).with_suffix(".json")
    if not path.is_file():
        return {}  # _load_weights says what there is
    config = json.loads(path.read_text(encoding="utf-8"))["model"]
    return {key: value for key, value in config.items() if key != "name"}


def _load_weights(net: Network, tag: str) -> None:
    from safetensors.torch import load_file

    path = weights_path(net.config.name, net.config.join, tag)
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))) or "none at all"
        raise DataError(
            f"model {net.config.name}: no stored weights '{path.stem}'; there are: {have}."
            " Train it, or leave pretrained out."
        )
    stored = load_file(path)
    own = net.state_dict()
    missing = sorted(k for k in own if k not in stored)
    wrong = sorted(k for k, v in stored.items() if k not in own or own[k].shape != v.shape)
    if missing or wrong:
        raise DataError(
            f"model {net.config.name}: the weights '{path.stem}' do not fit: {(missing + wrong)[0]}"
            " differs; they belong to another configuration of this model."
        )
    net.load_state_dict({k: v.to(own[k].dtype) for k, v in stored.items()})


def n_parameters(net: nn.Module) -> int:
    """Learned numbers of the network."""
    return sum(p.numel() for p in net.parameters())


NORM_AND_POOL_FACTOR = 12  # two operations x six steps; fits every published row (T = 6)


def operations(net: Network) -> tuple[int, int]:
    """(multiply-accumulates, normalization and pooling outputs) of one image in one step."""
    counts = {"macs": 0, "elements": 0}

    def count(module: nn.Module, _: Any, output: Any) -> None:
        n = output[0].numel()  # of one sample of the batch, time folded into it
        if isinstance(module, _WEIGHTED):
            counts["macs"] += n * module.weight[0].numel()
        else:
            counts["elements"] += n

    counted = (*_WEIGHTED, nn.modules.batchnorm._BatchNorm, *_POOLS)
    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, counted)]
    was_training = net.training
    try:
        with torch.no_grad():
            net.eval()(next(net.parameters()).new_zeros(1, *net.input_shape))
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return counts["macs"], counts["elements"]


_WEIGHTED = (nn.Conv2d, nn.Conv1d, nn.Linear)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AvgPool1d, nn.AdaptiveAvgPool2d)


def flops(net: Network) -> int:
    """Operations of one image: MACs of one step + 12 (normalization + pooling outputs).

    The one counting rule that reproduces the published 72.5 M of the 32-layer residual network and
    317.0 M of VGG-16 at six steps; it does not depend on `net.steps`.
    """
    macs, elements = operations(net)
    return macs + NORM_AND_POOL_FACTOR * elements
