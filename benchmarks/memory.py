"""``python -m benchmarks.memory``: the bytes of a training step on W1, W2 and W3, one row per workload, batch and variant.

    saved       kept between forward and backward, by saved-tensor hooks and by the storages still alive
    state       parameters, suffixes, gradients, Adam's moments and saved, without BatchNorm's buffers
    transients  the most new storages alive at once, in forward and in backward
    resident    growth of a fresh process's peak memory by two training steps (its allocator's rounding, oneDNN's own copies and
                the compiled primitives included)

Writes ``results/<device>/memory.csv`` and fails if a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import lora_edge
from lora_edge.environment.machine import describe_machine
from lora_edge.memory import training_step_bytes
from lora_edge.methods.training import Training, training_step

from . import RESULTS, write_rows
from .workloads import WORKLOADS

RANK = 2
VARIANTS = {
    "full": None,
    "stock layers": {"lean": False},
    "bn=batch": {"bn": "batch"},
    "exact": {},
    "half h": {"saved_dtype": "float16"},
}
MEASURES = ("saved_hooks", "saved_alive", "state", "forward_peak", "backward_peak")
FIELDS = ("device", "date", "lora_edge", "torch", "threads", "workload", "batch", "variant", "rank", *MEASURES, "resident")
# upper bounds in bytes at batch 64
BOUNDS = {
    ("exact", "saved"): {"W1": 0.83e6, "W2": 8.40e6, "W3": 8.0e6},
    ("half h", "saved"): {"W1": 0.65e6, "W2": 7.0e6, "W3": 6.3e6},
    ("exact", "state"): {"W1": 3.2e6, "W2": 17.8e6, "W3": 54e6},
    ("exact", "transients"): {"W1": 8.5e6, "W2": 50e6, "W3": 55e6},
}


def build(workload: str, variant: str) -> torch.nn.Module:
    """The workload's model as the variant trains it, in train mode."""
    model = WORKLOADS[workload].model()
    options = VARIANTS[variant]
    if options is not None:
        lora_edge.adapt(model, RANK, targets=WORKLOADS[workload].targets(model), **options)
    return model.train()


def measure(workload: str, batch: int, variant: str) -> dict[str, int]:
    """Every measure of one row except the resident memory, in bytes."""
    model = build(workload, variant)
    x, y = WORKLOADS[workload].batch(batch)
    if batch == 1 and variant in ("full", "bn=batch"):
        model.eval()  # one sample with one position has no batch variance
    bytes_ = training_step_bytes(model, x, lambda output: F.cross_entropy(output, y))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    bytes_["state"] = parameters + 3 * trained + bytes_["saved_hooks"]
    return bytes_


def resident(workload: str, batch: int, variant: str) -> int:
    """Growth of a fresh process's peak resident memory by two steps of training, in bytes."""
    model = build(workload, variant)
    x, y = WORKLOADS[workload].batch(batch)
    training = Training([p for p in model.parameters() if p.requires_grad])
    optimizer = training.optimizer(training.parameters, 1e-3)
    before = _peak_resident()
    for _ in range(2):
        training_step(model, training, optimizer, x, y)
    return _peak_resident() - before


def _peak_resident() -> int:
    """The peak in bytes. Not getrusage's ru_maxrss, which a process inherits from its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def resident_in_a_fresh_process(workload: str, batch: int, variant: str) -> int:
    case = json.dumps([workload, batch, variant])
    arguments = [sys.executable, "-W", "ignore", "-m", f"{__package__}.memory", "--resident", case]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def misses(rows: list[dict[str, object]]) -> list[str]:
    """A message for each bound that the rows miss."""
    found = []
    for (variant, what), bounds in BOUNDS.items():
        for row in rows:
            if row["batch"] != 64 or row["variant"] != variant or row["workload"] not in bounds:
                continue
            bound = bounds[str(row["workload"])]
            names = {"saved": ("saved_hooks", "saved_alive"), "transients": ("forward_peak", "backward_peak")}.get(
                what, (what,)
            )
            for name in names:
                value = float(str(row[name]))
                if value > bound:
                    over = 100 * (value / bound - 1)
                    found.append(
                        f"{row['workload']} {variant}: {name} {value / 1e6:.2f} MB, bound {bound / 1e6:.2f} (+{over:.1f} %)"
                    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--device", default="cpu", help="folder of the results")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        print(resident(*json.loads(options.resident)))
        return 0
    rows: list[dict[str, object]] = []
    for workload in options.workload:
        for batch in options.batch:
            for variant in VARIANTS:
                found = measure(workload, batch, variant)
                about = {
                    **describe_machine(),
                    "device": options.device,
                    "workload": workload,
                    "batch": batch,
                    "variant": variant,
                }
                kept = resident_in_a_fresh_process(workload, batch, variant) if batch == max(options.batch) else ""
                row = {**about, **found, "rank": RANK, "resident": kept}
                rows.append({key: row[key] for key in FIELDS})
    path = RESULTS / options.device / "memory.csv"
    write_rows(path, FIELDS, rows)
    table = Table(title="bytes of a training step, MB")
    for column in ("workload", "batch", "variant", *MEASURES, "resident"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{float(str(row[k])) / 1e6:.2f}" if row[k] != "" else "" for k in (*MEASURES, "resident")]
        table.add_row(str(row["workload"]), str(row["batch"]), str(row["variant"]), *cells)
    Console(width=130).print(table)
    for line in misses(rows):
        print("missed:", line)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
