"""The comparison of a spiking network and its artificial twin on event frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranvier.train.data import Dataset
from ranvier.train.errors import RangeError
from ranvier.train.pair import _frames, compare_pair, main, markdown, seconds_per_batch


def test_frames_are_summed_and_no_event_is_lost():
    x = torch.arange(2 * 3 * 4.0).reshape(2, 3, 1, 2, 2)
    data = Dataset(x, torch.tensor([0, 1]), 2, "toy", timed=True)
    merged = _frames(data, True)
    assert merged.x.shape == (2, 1, 1, 2, 2) and merged.x.sum() == x.sum()
    batch, labels = merged.batch([1, 0])  # time comes first in a batch, samples keep their labels
    assert batch.shape == (1, 2, 1, 2, 2) and labels.tolist() == [1, 0]
    np.testing.assert_array_equal(batch[0, 0], x[1].sum(0))
    assert _frames(data, False) is data


def test_timing_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    before = net[1].weight.detach().clone()
    data = Dataset(torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long), 2, "toy")
    assert seconds_per_batch(net, data, 4, 0.1, n=3) > 0
    np.testing.assert_array_equal(net[1].weight.detach(), before)


def test_both_networks_are_compared_on_the_data_that_is_there(data_file, capsys):
    data_file("nmnist", "nmnist.npz")
    options = {"steps": 2, "size": 8, "epochs": 1, "limit": 64, "timed_batches": 1}
    rows = compare_pair("nmnist", **options)
    assert [(r.network, r.n_frames) for r in rows] == [("dvs-snn", 2), ("dvs-cnn", 1)]
    assert rows[0].n_parameters == rows[1].n_parameters
    assert all(0 <= r.accuracy <= 1 and r.s_per_100 > 0 for r in rows)
    text = markdown(rows, "nmnist")
    assert text.startswith("Data set: nmnist.") and "66.68 %, 23.76 s" in text
    again = compare_pair("nmnist", **options)
    assert [r.accuracy for r in again] == [r.accuracy for r in rows]


def test_what_has_no_events_is_refused(capsys):
    with pytest.raises(RangeError, match="'digits' has no event frames; nmnist"):
        compare_pair("digits")
    assert main(["--dataset", "digits"]) == 2
    assert "has no event frames" in capsys.readouterr().out
