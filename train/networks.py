"""What every network is: the base class, the base of its configuration, and its neurons by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ranvier.train.errors import RangeError, ShapeError
from ranvier.train.multistep import Stepped, reset_states, set_multi_step
from ranvier.train.neurons import CUBA, IF, LIF, PLIF
from ranvier.train.neurons_paralif import FIRING, ParaLIF
from ranvier.train.neurons_parallel import IPSU, PSN, PSU, RPSU, MaskedPSN, SlidingPSN
from ranvier.train.surrogates import surrogate

READOUTS = ("mean", "sum", "last")


@dataclass(frozen=True)
class ModelConfig:
    """What all networks share; with its family's fields enough to build the network again.

    name         as in list_models()
    join         vanilla, sew, sew-and, sew-iand, ms, or; networks without joins ignore it
    neuron       a name of NEURONS: if, lif, plif, cuba, psn, ..., paralif-sd
    norm         bn, tdbn, tdbn-scaled
    steps        time steps of a static image
    image_size   side in pixels, or (height, width)
    readout      mean, sum or last over time
    beta, alpha  membrane and current decay a step
    reset        zero, subtract, none
    surrogate    kind of the surrogate gradient; surrogate_alpha None is its published default
    order        inputs in the window of masked and sliding PSN
    """

    name: str = ""
    join: str = "vanilla"
    neuron: str = "lif"
    norm: str = "bn"
    steps: int = 4
    in_channels: int = 3
    num_classes: int = 10
    image_size: int | tuple[int, int] = 32
    readout: str = "mean"
    beta: float = 0.5
    alpha: float = 0.5
    threshold: float = 1.0
    reset: str = "zero"
    decay_input: bool = False
    v_reset: float = 0.0
    surrogate: str = "atan"
    surrogate_alpha: float | None = None
    order: int = 4

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.in_channels, height, width

    def __post_init__(self) -> None:
        for key in ("steps", "in_channels", "num_classes"):
            if not isinstance(getattr(self, key), int):
                found = getattr(self, key)
                raise RangeError(f"model {self.name}: {key} is {found!r}; a whole number is needed")
        if self.steps < 1:
            raise RangeError(f"model {self.name}: steps is {self.steps}; at least 1 is needed")
        if min(*self.input_shape, self.num_classes) < 1:
            raise RangeError(
                f"model {self.name}: input {self.input_shape} (channels, height, width) and"
                f" {self.num_classes} classes; each must be at least 1"
            )
        if self.readout not in READOUTS:
            raise RangeError(
                f"model {self.name}: readout '{self.readout}' is none of {', '.join(READOUTS)}"
            )


NeuronBuilder = Callable[[ModelConfig, dict[str, Any]], nn.Module]


def _lif_options(config: ModelConfig, over: dict[str, Any]) -> dict[str, Any]:
    options = {
        "threshold": config.threshold,
        "spike_grad": surrogate(config.surrogate, config.surrogate_alpha),
        "reset_mechanism": config.reset,
        "decay_input": config.decay_input,
        "v_reset": config.v_reset,
    }
    return {**options, **over}


def _spike(config: ModelConfig) -> dict[str, Any]:
    return {"spike_grad": surrogate(config.surrogate, config.surrogate_alpha)}


def _psu_options(config: ModelConfig, over: dict[str, Any]) -> dict[str, Any]:
    return {"beta": config.beta, "threshold": config.threshold, **_spike(config), **over}


def _paralif(firing: str) -> NeuronBuilder:
    """ParaLIF takes its own surrogate and threshold, which go with its firing function."""
    return lambda c, o: ParaLIF(**{"firing": firing, "alpha": c.alpha, "beta": c.beta, **o})


NEURONS: dict[str, NeuronBuilder] = {
    "if": lambda c, o: IF(**_lif_options(c, o)),
    "lif": lambda c, o: LIF(c.beta, **_lif_options(c, o)),
    "plif": lambda c, o: PLIF(c.beta, **_lif_options(c, o)),
    "cuba": lambda c, o: CUBA(c.alpha, c.beta, **_lif_options(c, o)),
    "psn": lambda c, o: PSN(**{"steps": c.steps, **_spike(c), **o}),
    "masked-psn": lambda c, o: MaskedPSN(**{"steps": c.steps, "order": c.order, **_spike(c), **o}),
    "sliding-psn": lambda c, o: SlidingPSN(**{"order": c.order, **_spike(c), **o}),
    "psu": lambda c, o: PSU(**_psu_options(c, o)),
    "ipsu": lambda c, o: IPSU(**{"steps": c.steps, **_psu_options(c, o)}),
    "rpsu": lambda c, o: RPSU(**{"steps": c.steps, **_psu_options(c, o)}),
    **{f"paralif-{firing}": _paralif(firing) for firing in FIRING},
    "relu": lambda c, o: nn.ReLU(),  # the artificial twin of a network; use steps=1
}


def make_neuron(config: ModelConfig, **over: Any) -> nn.Module:
    """A new neuron as the configuration says; `over` replaces single arguments of its class."""
    return NEURONS[config.neuron](config, over)


class Network(Stepped):
    """Base of all networks.

    `net(x)` takes a static batch [B, C, H, W], shown for `steps` steps, or a sequence
    [T, B, C, H, W], and returns the readout [B, classes]; it starts from the zero state.
    `net.step(x_t)` runs one step on [B, C, H, W] and returns that step's output [B, classes]; the
    state stays in the neurons until `net.reset()`. In eval mode the readout over steps of `step`
    equals `net(x)`.

    A family writes `stem` (from pixels, no neuron inside), `body` and `head`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.steps = config.steps
        self.readout = config.readout
        self.input_shape = config.input_shape

    def stem(self, x: Tensor) -> Tensor:
        """What depends on the image alone, [N, C, H, W]; computed once for a static image."""
        raise NotImplementedError

    def body(self, x: Tensor) -> Tensor:
        """From the stem's output to the last spikes or membranes, in either mode."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """From there to the classes, in either mode."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        self._set_mode(True)
        return self.read_out(self.head(self.body(self._stem_steps(x))))

    def sequence(self, x: Tensor) -> Tensor:
        """The output of every step [T, B, classes], before the readout."""
        self._check(x)
        self._set_mode(True)
        return self.head(self.body(self._stem_steps(x)))

    def step(self, x: Tensor) -> Tensor:
        """One time step: x [B, C, H, W] -> [B, classes]; the neurons keep their state."""
        self._set_mode(False)
        return self.head(self.body(self.stem(x)))

    def reset(self) -> None:
        """Clears the state of every neuron."""
        reset_states(self)

    def read_out(self, y: Tensor) -> Tensor:
        """[T, B, classes] -> [B, classes] by `readout`."""
        if self.readout == "last":
            return y[-1]
        return y.sum(0) if self.readout == "sum" else y.mean(0)

    def _stem_steps(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            y = self.stem(x)
            return y.unsqueeze(0).expand(self.steps, *y.shape)
        return self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _set_mode(self, multi_step: bool) -> None:
        if self.multi_step != multi_step:
            set_multi_step(self, multi_step)

    def _check(self, x: Tensor) -> None:
        shape = tuple(x.shape)
        if x.ndim not in (4, 5) or shape[-3:] != self.input_shape:
            want = ", ".join(str(n) for n in self.input_shape)
            raise ShapeError(
                f"model {self.config.name}: input has shape {shape}; it takes [batch, {want}] or"
                f" [time, batch, {want}]"
            )


def initialize(net: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out), small linear layers; normalizations keep theirs."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
