"""Where a training runs: Lightning Fabric for devices, processes and precision; seeds and order."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ranvier.train.errors import RangeError, UnsupportedError

PRECISIONS: dict[str, Any] = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_fabric(amp: str, devices: int, accelerator: str) -> Any:
    """A Fabric for `devices` processes; where torchrun started this process, one of its group.

    Raises UnsupportedError for fp16 without CUDA, RangeError for devices below 1.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    if amp == "fp16" and not torch.cuda.is_available():
        raise UnsupportedError("train: amp='fp16' needs a CUDA device; use amp='bf16' or 'no'")
    if devices < 1:
        raise RangeError(f"train: devices is {devices}; give 1 or more")
    for name in ("lightning.fabric", "lightning.pytorch"):  # they announce the precision
        logging.getLogger(name).setLevel(logging.WARNING)
    several = devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    # neurons keep membranes as buffers, whose shape follows the batch: nothing to broadcast
    strategy: Any = DDPStrategy(broadcast_buffers=False) if several else "auto"
    try:
        return Fabric(
            accelerator=accelerator, devices=devices, strategy=strategy, precision=PRECISIONS[amp]
        )
    except (ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"train: accelerator='{accelerator}' with {devices} devices is not to be had here: {error}"
        ) from error


def lay_out(net: nn.Module, channels_last: bool = True) -> nn.Module:
    """net itself, its 4-dimensional weights with channels last in memory (or first again).

    No value changes. Convolutions, normalizations and scans follow the weights' layout and are
    fastest so: they need not reorder what passes between them.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    to: Any = net.to  # its stubs forget this argument
    to(memory_format=layout)
    return net


def part_of_batch(n: int, rank: int, world: int) -> tuple[slice, float]:
    """(samples, share) of process `rank` in a batch of n: the mean over processes of share * (mean
    loss of the part) is the mean loss of the whole batch, also where n does not divide.

    >>> part_of_batch(5, 1, 2)
    (slice(1, None, 2), 0.8)
    """
    if n >= world:
        return slice(rank, None, world), world * len(range(rank, n, world)) / n
    # too few to go round: the last processes compute a sample that counts for nothing
    return slice(rank % n, rank % n + 1), world / n if rank < n else 0.0


def seed_all(seed: int) -> None:
    """Seeds the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def ordered_kernels(wanted: bool) -> Iterator[None]:
    """While entered, CUDA kernels whose order of summation varies are avoided."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
