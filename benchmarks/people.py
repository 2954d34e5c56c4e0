"""``python -m benchmarks.people``: the main job for every person of the watch data, a row a person, method and seed.

Writes ``results/<device>/people_<protocol>.csv``, row by row, so an interrupted run goes on where it stopped, and prints the
table: each person's macro-F1 (mean of the seeds), the mean, the spread, and for how many people LoRA-Edge is ahead.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lora_edge.har.adaptation import Row, Settings, adapt_by, machine, set_seconds_to_target, source
from lora_edge.har.data import mirrored
from lora_edge.har.train import macro_f1
from lora_edge.methods import methods

from . import RESULTS

COMPARED = ("head_only", "bn_only", "full", "lora_edge", "lora_edge_calibrated")
FIELDS = (
    "device", "date", "lora_edge", "torch", "threads", "protocol", "person", "seed", "method", "lr", "steps", "trainable",
    "share_percent", "saved_bytes", "f1", "seconds", "seconds_to_target",
)  # fmt: skip


def measure(protocol: str, person: int, seeds: int, device: str, bar: Progress) -> list[dict[str, object]]:
    """Rows of one person: every method with every seed, on one source model."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as out:
        settings = Settings(data="watch", target_subject=person, protocol=protocol, out=Path(out))
        running = bar.add_task(f"person {person}", total=None)
        task, model = source(settings, lambda title, done, total: bar.update(running, description=f"person {person}: {title}"))
        fixed = [Row("zero_shot", "", macro_f1(model, task.test))]
        if protocol == "B":
            fixed.append(Row("mirrored", "", macro_f1(model, mirrored(task).test)))
        for seed in range(seeds):
            seeded = Settings(data="watch", target_subject=person, protocol=protocol, out=Path(out), seed=seed)
            found = []
            for name in COMPARED:
                bar.update(running, description=f"person {person}: {name}, seed {seed}")
                found.append(adapt_by(methods()[name], model, task, seeded, lambda *_: None))
            set_seconds_to_target(found)
            for row in fixed + found:
                values = {**machine(), **vars(row), "device": device, "protocol": protocol, "person": person, "seed": seed,
                          "method": row.name, "steps": settings.steps}  # fmt: skip
                rows.append({key: _rounded(values[key]) for key in FIELDS})
        bar.remove_task(running)
    return rows


def show(path: Path) -> None:
    """Print the table of a result file."""
    f1: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            f1[row["method"]][int(row["person"])].append(float(row["f1"]))
    people = sorted(next(iter(f1.values())))
    table = Table(title=f"{path.stem}: macro-F1, mean of the seeds, by person")
    for column in ("method", *map(str, people), "mean", "spread", "LoRA-Edge ahead"):
        table.add_column(column, justify="left" if column == "method" else "right")
    ours = f1["lora_edge"]
    for method, scores in f1.items():
        each = [mean(scores[p]) for p in people]
        ahead = sum(mean(ours[p]) > mean(scores[p]) for p in people)
        spread = stdev(each) if len(each) > 1 else 0.0
        cells = [f"{v:.3f}" for v in (*each, mean(each), spread)]
        table.add_row(method, *cells, "" if method == "lora_edge" else f"{ahead} of {len(people)}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.people", description=__doc__)
    parser.add_argument("--protocol", choices=["A", "B"], default="B")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--people", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--device", default="cpu", help="folder of the results")
    parser.add_argument("--show", action="store_true", help="print the table of the rows that are there, measure nothing")
    options = parser.parse_args()
    path = RESULTS / options.device / f"people_{options.protocol}.csv"
    if not options.show:
        path.parent.mkdir(parents=True, exist_ok=True)
        done: set[int] = set()
        if path.is_file():
            with path.open() as file:
                done = {int(row["person"]) for row in csv.DictReader(file)}
        with Progress() as bar:
            for person in options.people:
                if person in done:
                    continue
                rows = measure(options.protocol, person, options.seeds, options.device, bar)
                is_new = not path.is_file()
                with path.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if is_new:
                        writer.writeheader()
                    writer.writerows(rows)
    show(path)


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
