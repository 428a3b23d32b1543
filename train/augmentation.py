"""Augmentation of a batch, drawn from its own generator, so that a resume repeats the draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ranvier.train.errors import UnsupportedError

AUGMENTATIONS = ("none", "shift", "flip-crop", "randaugment", "events")


def augment(x: Tensor, kind: str, generator: Generator) -> Tensor:
    """x [B, C, H, W] or [T, B, C, H, W], changed sample by sample (alike at all steps).

    shift        moved by up to 1/14 of the width: 1 pixel of 8, 2 of 28 or 32
    flip-crop    moved by up to 4 pixels and mirrored for half of the samples
    randaugment  flip-crop, then two random operations of torchvision's RandAugment (needs
                 torchvision)
    events       moved by up to 1/10 of the width and mirrored for half of the samples
    """
    match kind:
        case "none":
            return x
        case "shift":
            return shift(x, max(x.shape[-1] // 14, 1), generator)
        case "flip-crop":
            return flip(shift(x, 4, generator), generator)
        case "events":
            return flip(shift(x, max(x.shape[-1] // 10, 1), generator), generator)
        case "randaugment":
            return _rand_augment(flip(shift(x, 4, generator), generator), generator)
        case _:
            raise UnsupportedError(
                f"train: augment='{kind}' is unknown; known: {', '.join(AUGMENTATIONS)}"
            )


def shift(x: Tensor, most: int, generator: Generator) -> Tensor:
    """Each sample moved by -most..most pixels in both directions; zeros come in."""
    height, width = x.shape[-2:]
    n = x.shape[-4]
    padded = F.pad(x, (most, most, most, most))
    dy, dx = (torch.randint(0, 2 * most + 1, (n,), generator=generator) for _ in range(2))
    rows = (dy[:, None] + torch.arange(height))[:, None, :, None].to(x.device)
    columns = (dx[:, None] + torch.arange(width))[:, None, None, :].to(x.device)
    samples = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[-3], device=x.device)[None, :, None, None]
    return padded[..., samples, channels, rows, columns]


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Half of the samples mirrored left to right."""
    mirrored = torch.rand(x.shape[-4], generator=generator).to(x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def mix(
    x: Tensor, y: Tensor, n_classes: int, mixup: float, cutmix: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """(x, probabilities [B, n_classes]), each sample blended with or patched by another.

    Where both are on, each batch gets one of them. Beta(a, a) is drawn through two Gammas.
    Source: Zhang et al., ICLR 2018 (mixup); Yun et al., ICCV 2019 (cutmix).
    """
    labels = F.one_hot(y, n_classes).to(torch.float32)
    cut = cutmix > 0 and (mixup == 0 or torch.rand((), generator=generator).item() < 0.5)
    lam = _beta(cutmix if cut else mixup, generator)
    order = torch.randperm(len(y), generator=generator).to(x.device)
    batch_axis = x.ndim - 4
    other = x.index_select(batch_axis, order)
    if cut:
        x, lam = _patch(x, other, lam, generator)
    else:
        x = lam * x + (1 - lam) * other
    return x, lam * labels + (1 - lam) * labels[order]


def _patch(x: Tensor, other: Tensor, lam: float, generator: Generator) -> tuple[Tensor, float]:
    height, width = x.shape[-2:]
    side = (1 - lam) ** 0.5
    h, w = round(height * side), round(width * side)
    top = int(torch.randint(0, height - h + 1, (), generator=generator))
    left = int(torch.randint(0, width - w + 1, (), generator=generator))
    x = x.clone()
    x[..., top : top + h, left : left + w] = other[..., top : top + h, left : left + w]
    return x, 1 - h * w / (height * width)


def _beta(a: float, generator: Generator) -> float:
    pair = torch._standard_gamma(torch.full((2,), float(a)), generator=generator)
    return float(pair[0] / pair.sum())


def _rand_augment(x: Tensor, generator: Generator) -> Tensor:
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UnsupportedError(
            f"train: augment='randaugment' needs a torchvision that fits this torch ({error});"
            " pip install 'ranvier[vision]', or use 'flip-crop'"
        ) from error
    seed = int(torch.randint(0, 2**31, (), generator=generator))
    transform = v2.RandAugment(num_ops=2, magnitude=9)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(seed)
        bytes_ = (x * 255).round().to(torch.uint8)
        changed = torch.stack([transform(image) for image in bytes_])
    return changed.to(x.dtype) / 255
