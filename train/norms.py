"""Threshold-dependent batch normalization (tdBN).

Statistics are taken over time, batch and space together: with time folded into the batch that is
plain batch normalization. What differs is the scale: the output has the standard deviation
alpha v_threshold. Source: Zheng et al., "Going deeper with directly-trained larger spiking neural
networks", AAAI 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranvier.train.errors import RangeError


class TdBN2d(nn.BatchNorm2d):
    """Batch normalization whose weight starts at alpha v_threshold; else torch's own.

    alpha        1 in a serial net, 1 / sqrt(n) where n branches are summed
    v_threshold  of the neuron that follows
    """

    def __init__(self, num_features: int, *, alpha: float = 1.0, v_threshold: float = 1.0) -> None:
        self.alpha, self.v_threshold = float(alpha), float(v_threshold)
        super().__init__(num_features)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, self.alpha * self.v_threshold)


class ScaledTdBN2d(nn.BatchNorm2d):
    """tdBN as the paper writes it: y = weight (alpha v_threshold x_hat) + bias, weight starts at 1.

    The same function as TdBN2d with its weight divided by `scale`; learns at another rate.
    """

    def __init__(self, num_features: int, *, alpha: float = 1.0, v_threshold: float = 1.0) -> None:
        super().__init__(num_features)
        self.scale = float(alpha) * float(v_threshold)

    @property
    def effective_weight(self) -> Tensor:
        """The weight of the plain batch normalization that computes the same."""
        return self.weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        use_batch = self.training or self.running_mean is None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 0.1 if self.momentum is None else self.momentum
        return nn.functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.effective_weight,
            self.bias,
            use_batch,
            momentum,
            self.eps,
        )


def make_norm(
    kind: str, channels: int, *, alpha: float = 1.0, v_threshold: float = 1.0
) -> nn.Module:
    """Batch normalization of that kind: "bn", "tdbn", "tdbn-scaled", or nothing for "none".

    Raises RangeError for another.
    """
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind == "tdbn":
        return TdBN2d(channels, alpha=alpha, v_threshold=v_threshold)
    if kind == "tdbn-scaled":
        return ScaledTdBN2d(channels, alpha=alpha, v_threshold=v_threshold)
    if kind == "none":
        return nn.Identity()
    raise RangeError(f"norm: '{kind}' is none of bn, tdbn, tdbn-scaled, none")


def zero_init(norm: nn.Module, bias: float = 0.0) -> None:
    """Makes the normalization give `bias` everywhere, so that its branch starts as a constant.

    Raises RangeError where there is no normalization.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        raise RangeError("norm: 'none' leaves nothing to start at zero; set zero_init=False")
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(bias)
