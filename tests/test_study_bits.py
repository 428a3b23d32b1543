"""`study bits`: stored networks on the chip at several weight widths."""

from __future__ import annotations

import pytest

from ranvier.sim import study_bits
from ranvier.train.errors import RangeError


def test_the_data_of_a_stored_network_is_its_recipes():
    assert study_bits.data_of("resnet8", "ms", "mnist-wide") == "mnist"
    assert study_bits.data_of("resnet8", "sew", "fashion_mnist") == "fashion_mnist"


def test_a_row_a_network_and_kept_rows_are_taken(tmp_path, monkeypatch):
    def study():
        return study_bits.study_bits(
            "digits", only="*-ms", ptq=(8, 2), qat=None, lava_samples=0, limit=90, out=tmp_path
        )

    (row,) = study()
    assert (row["model"], row["join"], row["n_test"]) == ("resnet-digits", "ms", 90)
    assert row["float %"] > 90 and abs(row["ptq-8 %"] - row["float %"]) < 5
    assert row["ptq-2 %"] < row["ptq-8 %"] - 3  # two bits must hurt
    monkeypatch.setattr(study_bits, "_row", None)  # not to be called again
    assert study() == [row]


def test_nothing_stored_is_an_error(tmp_path):
    with pytest.raises(RangeError, match="no network is stored for 'cifar100'"):
        study_bits.study_bits("cifar100", out=tmp_path)
