"""Published figures that need no weights, counted again: operations and parameters of compact networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A row of a published table, and what its network comes to here.

    printed_flops, printed_parameters  in millions, as printed
    flops, parameters                  counted
    """

    network: str
    dataset: str
    printed_flops: float
    printed_parameters: float
    flops: int
    parameters: int

    @property
    def flops_agree(self) -> bool:
        """To the digit that is printed."""
        return round(self.flops / 1e6, 1) == self.printed_flops


# name, data set, options, FLOPs and parameters as printed (millions). The 32-layer network is printed as
# "ResNet-34"; its blocks have biases. MNIST is padded to 32x32.
ROWS: tuple[tuple[str, str, dict[str, Any], float, float], ...] = (
    ("resnet32", "CIFAR-10", {"in_channels": 3, "conv_bias": True}, 72.5, 0.47),
    ("resnet32", "MNIST", {"in_channels": 1, "conv_bias": True}, 72.2, 0.46),
    ("vgg16", "CIFAR-10", {"in_channels": 3}, 317.0, 14.79),
    ("vgg16", "MNIST", {"in_channels": 1}, 315.8, 14.79),
)


def published_figures() -> list[Published]:
    """The rows, each network built and counted: MACs of one step + 12 (normalization + pooling outputs).

    The printed tables give no configuration; these networks and this rule reproduce their operations to
    the printed digit. Energy columns of the same tables need firing rates that are not published.
    """
    from ranvier.train import create_model
    from ranvier.train.models import flops, n_parameters

    found = []
    for name, dataset, options, printed_flops, printed_parameters in ROWS:
        net = create_model(name, steps=6, image_size=32, **options)
        counted = flops(net), n_parameters(net)
        found.append(Published(name, dataset, printed_flops, printed_parameters, *counted))
    return found
