"""Our counts beside NeuroBench's SynapticOperations, on the same models and inputs.

Run by hand: python tests/bench_neurobench.py; needs `pip install --no-deps neurobench==2.3.0`. Prints
a Markdown table and ends with 1 if any figure differs.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from neurobench.hooks.layer import LayerHook
from neurobench.metrics.workload import SynapticOperations
from neurobench.models import TorchModel
from test_energy import net_of, small_graph

from ranvier.sim.operations import algorithmic

KEYS = ("Effective_ACs", "Effective_MACs", "Dense")


def both(seed: int, groups: int, real: bool) -> tuple[dict[str, float], dict[str, float]]:
    """(ours, NeuroBench's) a sample."""
    graph = small_graph(seed=seed, groups=groups)
    rng = np.random.default_rng(seed + 10)
    x = (rng.random((5, 3, 2, 7, 6)) < 0.4).astype(np.float32)
    x = x * rng.random(x.shape).astype(np.float32) if real else x
    model = TorchModel(net_of(graph))
    model.connection_hooks = [LayerHook(layer) for layer in model.connection_layers()]
    batch = torch.from_numpy(x).transpose(0, 1)
    with torch.no_grad():
        found = SynapticOperations()(model, model(batch), (batch, None))
    return algorithmic(graph, x).neurobench(), {k: float(v) for k, v in found.items()}


def main() -> int:
    print(
        "| network | input | " + " | ".join(f"{k}: ours, NeuroBench" for k in KEYS) + " | equal |"
    )
    print("|---|---|" + "---|" * (len(KEYS) + 1))
    wrong = 0
    for seed in range(3):
        for groups in (1, 2):
            for real in (False, True):
                ours, theirs = both(seed, groups, real)
                wrong += ours != theirs
                cells = " | ".join(f"{ours[k]:,.2f}, {theirs[k]:,.2f}" for k in KEYS)
                what = "real numbers" if real else "spikes"
                same = "yes" if ours == theirs else "NO"
                print(
                    f"| two convolutions, groups {groups}, seed {seed} | {what} | {cells} | {same} |"
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
