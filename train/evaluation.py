"""Running a network on a data set: outputs, sums, hooks, and `evaluate`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.train.data import IGNORE, Dataset, as_dataset
from ranvier.train.errors import ShapeError, UnsupportedError, expect
from ranvier.train.losses import Loss, make_loss
from ranvier.train.multistep import Stepped, reset_states
from ranvier.train.rates import FiringRates

# A hook makes a network compute as the chip would, while it is entered: it is called as `hook(net)`
# around every forward pass, in training and in evaluation, and returns a context manager. On
# leaving,
# net's parameters must be the float ones again under their own names, since that is what the
# optimizer
# moves and a checkpoint keeps.
QatHook = Callable[[nn.Module], AbstractContextManager[Any]]

# qat=True takes the quantizer's own hook. It lives in a later stage, which imports this one; a
# plug-in
# named by text and looked up only when asked for keeps the imports pointing one way.
QAT_HOOK = "ranvier.deploy.qat:fake_quant"


def evaluate(
    net: nn.Module,
    data: Dataset | tuple[Any, Any],
    batch_size: int = 256,
    *,
    loss: str | Loss = "ce",
    qat: bool | QatHook = False,
) -> dict[str, Any]:
    """{accuracy, loss, n, firing_rate, firing_rates} of net on a data set, without gradients.

    accuracy     fraction of right labels (of labelled steps where every step has its own)
    n            samples
    firing_rate  spikes per neuron and step; firing_rates: layer -> the same
    loss         as in Settings; a set with a label a step always takes per-step
    The network runs in eval mode, on the device where it lies, and is left in the mode it was in.
    data is a Dataset or a pair (x, y) of arrays.
    Raises ShapeError where net gives no [B, n] or [T, B, n].
    """
    expect(net, nn.Module, "evaluate", "give the network")
    data = as_dataset(data, "evaluate")
    loss = make_loss("per-step" if data.per_step else loss) if isinstance(loss, str) else loss
    was_training = net.training
    net.eval()
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    hook = hook_of(qat)
    sums = torch.zeros(3, dtype=torch.float64)
    try:
        with torch.inference_mode(), FiringRates(net) as rates:
            for i in range(0, len(data), batch_size):
                x, y = (t.to(device) for t in data.batch(slice(i, i + batch_size)))
                with hook(net):
                    output = run_net(net, x, loss.per_step)
                sums += batch_sums(net, loss(output, y), output, y)
    finally:
        net.train(was_training)
    total, right, n_labels = sums.tolist()
    return {
        "accuracy": right / max(n_labels, 1),
        "loss": total / max(n_labels, 1),
        "n": len(data),
        "firing_rate": rates.mean(),
        "firing_rates": rates.by_layer(),
    }


def run_net(net: nn.Module, x: Tensor, per_step: bool) -> Tensor:
    """net's output: the readout [B, n], or where `per_step` every step's [T, B, n].

    Raises ShapeError where net returns something else.
    """
    if not isinstance(
        net, Stepped
    ):  # ours begins at rest by itself; a user's keeps its hidden states
        reset_states(net)
    sequence = getattr(net, "sequence", None)
    output = sequence(x) if per_step and sequence is not None else net(x)
    if not isinstance(output, Tensor) or output.ndim not in (2, 3):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ShapeError(
            f"train: {type(net).__name__} returned {found}; a network must return logits"
            " [batch, classes], or [time, batch, classes]"
        )
    return output


def batch_sums(net: nn.Module, loss: Tensor, output: Tensor, y: Tensor) -> Tensor:
    """float64 [3] on the CPU: loss times labels, right labels, labels."""
    if output.ndim == 3 and y.ndim == 1:
        read_out = getattr(net, "read_out", None)
        output = output.mean(0) if read_out is None else read_out(output)
    labelled = y != IGNORE
    n = labelled.sum()
    right = ((output.argmax(-1) == y) & labelled).sum()
    # one transfer, and no float64 on the device, which not every one has
    mean, right, n = torch.stack([loss.detach().float(), right.float(), n.float()]).cpu().double()
    return torch.stack([mean * n, right, n])


def hook_of(qat: bool | QatHook) -> QatHook:
    """The hook itself, the registered one for True, one that does nothing for False."""
    if qat is False:
        return lambda net: nullcontext()
    if qat is not True:
        return qat
    module, name = QAT_HOOK.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"train: qat=True needs {QAT_HOOK}, which is not there ({error}); give a hook"
            f" (qat=hook)"
        ) from error


class Wrapped(nn.Module):
    """What Fabric and DDP see: forward gives the output that the loss wants, inside the hook."""

    def __init__(self, net: nn.Module, per_step: bool, hook: QatHook) -> None:
        super().__init__()
        self.net, self._per_step, self._hook = net, per_step, hook

    def forward(self, x: Tensor) -> Tensor:
        with self._hook(self.net):
            return run_net(self.net, x, self._per_step)
