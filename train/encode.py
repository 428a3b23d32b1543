"""Spike encodings of a data set by snntorch.spikegen: rate, latency, delta; or direct."""

from __future__ import annotations

from dataclasses import replace

import torch

from ranvier.train.data import Dataset, require_timed
from ranvier.train.errors import RangeError, UnsupportedError

ENCODINGS = ("direct", "rate", "latency", "delta")
_CHUNK = 4096  # samples encoded at a time: spikegen works in float32, we keep a byte a spike


def encode(
    data: Dataset, encoding: str = "direct", steps: int | None = None, *, seed: int = 0
) -> Dataset:
    """`data` with x encoded: [N, T, ...] of 0, 1 (uint8), for delta of -1, 0, 1 (int8).

    direct   the network sees the same analog image at every step
    rate     a pixel p spikes with probability p at each of `steps` steps, drawn once with `seed`
    latency  one spike a pixel, the brighter the earlier, linear over `steps` steps; black pixels
             stay silent
    delta    a spike where x grows by 0.1 or more from one step to the next, -1 where it falls; time
             series only
    Raises RangeError where steps is missing, UnsupportedError for an unknown or unfitting encoding.
    """
    if encoding not in ENCODINGS:
        raise UnsupportedError(
            f"data: there is no encoding '{encoding}'; known: {', '.join(ENCODINGS)}"
        )
    if encoding == "direct":
        return data
    if encoding == "delta":
        require_timed(data, "the delta code")
        return replace(data, x=_delta(data.x))
    if data.timed:
        raise UnsupportedError(
            f"data: '{data.name}' has a time axis already; use encoding='direct' or 'delta'"
        )
    if steps is None or steps < 1:
        raise RangeError(f"data: encoding='{encoding}' needs steps=1 or more (found {steps})")
    with torch.random.fork_rng(devices=[]):  # spikegen draws from the global generator
        torch.manual_seed(seed)
        parts = [_still(chunk, encoding, steps) for chunk in torch.split(data.x, _CHUNK)]
    return replace(data, x=torch.cat(parts), timed=True)


def _still(x: torch.Tensor, encoding: str, steps: int) -> torch.Tensor:
    from snntorch import spikegen

    if encoding == "rate":
        spikes = spikegen.rate(x, num_steps=steps)
    elif steps == 1:
        spikes = (x > _DARK).float()[None]  # spikegen divides by steps - 1
    else:
        spikes = spikegen.latency(
            x, num_steps=steps, threshold=_DARK, clip=True, normalize=True, linear=True
        )
    return spikes.transpose(0, 1).to(torch.uint8)


_DARK = 0.01  # spikegen's own threshold of the latency code: what is darker never spikes


def _delta(x: torch.Tensor) -> torch.Tensor:
    from snntorch import spikegen

    spikes = spikegen.delta(x.float().transpose(0, 1), threshold=0.1, padding=False, off_spike=True)
    return spikes.transpose(0, 1).to(torch.int8)
