"""``python -m benchmarks.subspace_pass``: what ``adapt(subspace="input")`` and ``"gradient"`` cost beside a training step.

    time   of the pass over one batch over that of a training step (Adam, rank 2), each the median of interleaved rounds
    peak   most new bytes alive at once over those of the training step, forward and backward together

Fails if a pass takes longer than five steps or more than twice the bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from torch import Tensor

import lora_edge
from lora_edge.memory import StorageTracker
from lora_edge.methods.training import Training, training_step
from lora_edge.subspaces.gradient import leading_gradients
from lora_edge.subspaces.inputs import leading_inputs
from lora_edge.surgery.selection import select

from .workloads import WORKLOADS

MOST_STEPS, MOST_PEAK = 5.0, 2.0  # times a training step's


def actions(workload: str, batch: int, rank: int) -> tuple[dict[str, Callable[[], object]], list[Tensor]]:
    """A training step and the pass of each subspace, and the tensors that exist without them."""
    about = WORKLOADS[workload]
    model = about.model()
    names = select(model, about.targets(model), None)
    x, y = about.batch(batch)
    trained = lora_edge.adapt(about.model(), 2, targets=about.targets(model)).train()
    training = Training(list(lora_edge.trainable_parameters(trained)))
    optimizer = training.optimizer(training.parameters, 1e-2)

    def step() -> None:
        training_step(trained, training, optimizer, x, y)

    step()  # Adam's moments are not transient
    known = [x, y, *model.parameters(), *model.buffers(), *trained.parameters(), *trained.buffers()]
    known += [moment for state in optimizer.state.values() for moment in state.values()]
    passes = {
        "input": lambda: leading_inputs(model, names, rank, [x]),
        "gradient": lambda: leading_gradients(model, names, rank, [(x, y)]),
    }
    return {"step": step, **passes}, known


def peak_bytes(action: Callable[[], object], known: list[Tensor]) -> int:
    """The most new bytes alive at once while ``action`` runs."""
    tracker = StorageTracker(known)
    with tracker:
        action()
    return tracker.peak


def measure(workload: str, batch: int, rank: int, rounds: int) -> dict[str, float]:
    """Seconds and peak bytes of a training step and of each pass."""
    named, known = actions(workload, batch, rank)
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for action in named.values():
        action()
    for _ in range(rounds):
        for name, action in named.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    found = {f"{name} s": statistics.median(times) for name, times in seconds.items()}
    return found | {f"{name} bytes": float(peak_bytes(action, known)) for name, action in named.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.subspace_pass", description=__doc__)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["W1"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
    table = Table(title=f"a subspace's pass over one batch of {options.batch}")
    for column in ("workload", "rank", "subspace", "step ms", "pass ms", "steps", "step MB", "pass MB", "peak ratio"):
        table.add_column(column, justify="right")
    missed = 0
    for workload in options.workload:
        for rank in options.rank:
            row = measure(workload, options.batch, rank, options.rounds)
            for subspace in ("input", "gradient"):
                steps = row[f"{subspace} s"] / row["step s"]
                peak = row[f"{subspace} bytes"] / row["step bytes"]
                times = (1e3 * row["step s"], 1e3 * row[f"{subspace} s"], steps)
                sizes = (row["step bytes"] / 1e6, row[f"{subspace} bytes"] / 1e6, peak)
                table.add_row(workload, str(rank), subspace, *(f"{value:.2f}" for value in times + sizes))
                missed += steps > MOST_STEPS or peak > MOST_PEAK
    Console(width=110).print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
