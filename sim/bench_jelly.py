"""The same network in SpikingJelly, in an environment of its own: one more side of the benchmarks.

SpikingJelly and what it needs stay out of this environment; the other one, which must have ranvier
too, runs this file as a process that answers every line on its input with one run and its times.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.bench_float import StepLoop, agreement
from ranvier.train.errors import DataError


class Apart:
    """A process that runs x through the network; a call runs it once and returns its CPU seconds.

    equal   what was compared with the exact engine there, in words
    Raises DataError where the process cannot start.
    """

    def __init__(self, python: str, program: Program, x: np.ndarray) -> None:
        self.python, self.program, self.x = python, program, x

    def __enter__(self) -> Apart:
        import torch

        self.folder = tempfile.TemporaryDirectory()
        files = [str(Path(self.folder.name) / n) for n in ("program.h5", "x.npy")]
        self.program.save(files[0])
        np.save(files[1], self.program.encode(self.x))
        try:
            self.process = subprocess.Popen(
                [self.python, "-m", "ranvier.sim.bench_jelly", *files, str(torch.get_num_threads())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        except OSError as error:
            self.folder.cleanup()
            raise DataError(f"bench: '{self.python}' cannot be started: {error}") from error
        try:
            self.equal = self._answer()
        except DataError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def __call__(self) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the answer below says so
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ranvier "):
                return line.removeprefix("ranvier ").strip()
        raise DataError(
            f"bench: SpikingJelly did not run in '{self.python}'; its messages stand above. The "
            "environment needs ranvier and spikingjelly"
        )


class Forgetful:
    """A threshold without memory, called as a node is."""

    def eval(self) -> None:
        pass

    def modules(self) -> list[Any]:
        return []

    def __call__(self, x: Any) -> Any:
        return (x > 1.0).to(x.dtype)


class LayerLoop(StepLoop):
    """A StepLoop in SpikingJelly's way: multi-step neurons, all steps of a layer in one batch."""

    def _leaky(self, population: Any) -> Any:
        from spikingjelly.activation_based import neuron

        beta = float((4096 - np.asarray(population.cell.dv).max()) / 4096)
        soft = population.cell.reset == "subtract"
        if not beta:  # a LIFNode cannot forget everything
            return Forgetful()
        return neuron.LIFNode(
            tau=1 / (1 - beta), decay_input=False, v_threshold=1.0,
            v_reset=None if soft else 0.0, step_mode="m",
        )  # fmt: skip

    def driven(self, series: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch
        from spikingjelly.activation_based import functional

        sent: dict[str, np.ndarray] = {}
        floats = {n: torch.as_tensor(np.array(s, np.float32)) for n, s in series.items()}
        flat = {n: f.flatten(0, 1) for n, f in floats.items()}
        steps_batch = next(iter(floats.values())).shape[:2]
        with torch.no_grad():
            for name, node in self.neurons.items():
                node.eval()
                functional.reset_net(node)
                sent[name] = node(self.current(name, flat).unflatten(0, steps_batch)).numpy()
        return sent

    def __call__(self, x: np.ndarray) -> Any:
        import torch
        from spikingjelly.activation_based import functional

        steps, batch = x.shape[:2]
        flat = torch.as_tensor(x, dtype=torch.float32).flatten(0, 1)
        values: dict[str, Any] = {self.program.input.name: flat}
        with torch.no_grad():
            for name in self.maps:
                current = self.current(name, values)
                if name not in self.neurons:
                    values[name] = current
                    continue
                self.neurons[name].eval()
                functional.reset_net(self.neurons[name])
                series = self.neurons[name](current.unflatten(0, (steps, batch)))
                values[name] = series.flatten(0, 1)
        return values[self.program.readout.population].unflatten(0, (steps, batch)).sum(0)


def main(program: str, x: str, threads: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    exact, series = Program.load(program), np.load(x)
    loop = LayerLoop(exact)
    print("ranvier", agreement(loop, exact, series), flush=True)
    for _ in sys.stdin:
        cpu = time.process_time()
        loop(series)
        print(f"ranvier {time.process_time() - cpu}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
