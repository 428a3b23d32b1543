"""Colored MNIST: digits whose color predicts the label better than their shape, until it does not.

Source: Arjovsky et al., Invariant Risk Minimization, 2019. A digit below 5 has label 1; a quarter
of the labels is flipped; the color is the label, flipped with a probability that differs from one
environment to the next. Shape alone is right in 75 % everywhere; color alone in 1 - flip.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ranvier.train.data import Dataset, load_dataset
from ranvier.train.errors import RangeError

LABEL_NOISE = 0.25
TEST_FLIP = 0.9
# The environment gaps that the course report compares; the mean flip is 0.15 in each.
GAPS = ((0.1, 0.2), (0.05, 0.25), (0.025, 0.275), (0.0, 0.3))


@dataclass(frozen=True)
class Environments:
    """train: two environments; validation: colors at random, for an honest choice of the epoch;
    test: colors reversed. Images [N, 2, 14, 14] in 0..1, one channel of the two black; labels 0, 1.
    """

    train: tuple[Dataset, Dataset]
    validation: Dataset
    test: Dataset


def colored_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    flips: tuple[float, float] = (0.1, 0.2),
    test_flip: float = TEST_FLIP,
    validation_flip: float = 0.5,
    n_validation: int = 5000,
    seed: int = 0,
    limit: int | None = None,
) -> Environments:
    """The environments, made of MNIST's 60,000 training digits.

    50,000 digits train (every second one to each environment, after n_validation are set aside) and
    10,000 test. validation_flip 0.5 makes the color useless: a method that is chosen by it has seen
    neither the test colors nor the test digits, but has been told that colors may change.
    limit   digits in all, a fifth of them for the test
    Raises RangeError for a flip outside 0..1.
    """
    for flip in (*flips, test_flip, validation_flip):
        if not 0 <= flip <= 1:
            raise RangeError(f"ood: a color flip of {flip}; a probability lies in 0..1")
    digits = load_dataset("mnist", data_dir, "train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)[:limit]
    n_test = len(order) // 6 if limit is None else len(order) // 5
    n_validation = min(n_validation, (len(order) - n_test) // 5)
    held, rest = order[-n_test:], order[:-n_test]
    validation, rest = rest[:n_validation], rest[n_validation:]

    def environment(index: Tensor, flip: float, split: str) -> Dataset:
        x, y = color(digits.x[index], digits.y[index], flip, generator)
        return Dataset(x, y, 2, f"colored_mnist-{flip:g}", split)

    first, second = (environment(rest[i::2], flip, "train") for i, flip in enumerate(flips))
    return Environments(
        (first, second),
        environment(validation, validation_flip, "validation"),
        environment(held, test_flip, "test"),
    )


def color(x: Tensor, digit: Tensor, flip: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """(images [N, 2, 14, 14], labels): every second pixel of x [N, 1, 28, 28], in one color of two.

    The label is noisy before the color is drawn from it: the order decides which the color follows.
    """

    def chance(p: float) -> Tensor:
        return (torch.rand(len(digit), generator=generator) < p).long()

    y = (digit < 5).long() ^ chance(LABEL_NOISE)
    z = y ^ chance(flip)
    images = x[:, :, ::2, ::2].repeat(1, 2, 1, 1)
    images[torch.arange(len(digit)), 1 - z] = 0
    return images, y
