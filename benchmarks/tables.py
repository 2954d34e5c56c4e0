"""``python -m benchmarks.tables``: writes the tables of docs/ that come from the committed rows of memory and train_step.

A page holds ``<!-- rows: NAME -->`` and ``<!-- /rows -->``; what stands between is replaced. With ``--check`` it writes nothing
and fails where a page is not what the rows say. The study's tables are those of :mod:`benchmarks.study.report`.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import RESULTS
from .markdown import table

PAGES = Path(__file__).parents[1] / "docs"
WORKLOADS = ("W1", "W2", "W3")
HEAD = ("", "W1 T-ResNet", "W2 MobileNetV2", "W3 ResNet-18")
MEMORY_LINES = (
    ("full fine-tuning, saved", "full", ("saved_hooks", "saved_alive")),
    ("adapted, stock layers around (`lean=False`), saved", "stock layers", ("saved_hooks", "saved_alive")),
    ("**adapted, saved**", "exact", ("saved_hooks", "saved_alive")),
    ("**with half-precision `h`, saved**", "half h", ("saved_hooks", "saved_alive")),
    ("adapted, parameters + gradients + Adam + saved", "exact", ("state",)),
    ("full fine-tuning, the same", "full", ("state",)),
    ("adapted, transients", "exact", ("forward_peak", "backward_peak")),
    ("full fine-tuning, transients", "full", ("forward_peak", "backward_peak")),
)
# title, what, method, column, batches
STEP_LINES = (
    ("full fine-tuning, ms", "step", "full", "ms_p50", (64,)),
    ("full, channels-last", "step", "full, channels-last", "over_full", (64,)),
    ("full, torch.compile", "step", "full, torch.compile", "over_full", (64,)),
    ("frozen backbone", "step", "frozen backbone", "over_full", (64,)),
    ("PEFT conv LoRA", "step", "PEFT conv LoRA", "over_full", (64,)),
    ("LyCORIS LoCon", "step", "LyCORIS LoCon", "over_full", (64,)),
    ("LyCORIS LoCon, bypass", "step", "LyCORIS LoCon, bypass", "over_full", (64,)),
    ("**lora_edge**", "step", "lora_edge", "over_full", (64,)),
    ("lora_edge over PEFT", "step", "lora_edge", "over_peft", (64,)),
    ("lora_edge at batch 8 / 1, over full", "step", "lora_edge", "over_full", (8, 1)),
    ("lora_edge at batch 8 / 1, over PEFT", "step", "lora_edge", "over_peft", (8, 1)),
    ("inference adapted, over the base", "inference", "adapted", "over_full", (64,)),
    ("the same at batch 8 / 1", "inference", "adapted", "over_full", (8, 1)),
)


def memory_table(results: Path) -> str:
    """Decimal MB at batch 64; of two measures of the same bytes the larger one."""
    rows = {(row["workload"], row["variant"]): row for row in _read(results / "cpu/memory.csv") if row["batch"] == "64"}
    lines = []
    for title, variant, columns in MEMORY_LINES:
        cells = [f"{max(float(rows[w, variant][column]) for column in columns) / 1e6:.2f}" for w in WORKLOADS]
        lines.append((title, *cells))
    return table(HEAD, lines)


def train_step_table(results: Path) -> str:
    """Ratios to full fine-tuning unless the line says otherwise; a hyphen where a method was not timed."""
    rows = {(r["workload"], int(r["batch"]), r["what"], r["method"]): r for r in _read(results / "cpu/train_step.csv")}
    lines = []
    for title, what, method, column, batches in STEP_LINES:
        digits = 0 if column == "ms_p50" else 2
        cells = []
        for workload in WORKLOADS:
            found = [rows.get((workload, batch, what, method)) for batch in batches]
            cells.append(" / ".join("-" if row is None else f"{float(row[column]):.{digits}f}" for row in found))
        bold = "**" if title.startswith("**") else ""
        lines.append((title, *(f"{bold}{cell}{bold}" for cell in cells)))
    return table(HEAD, lines)


TABLES: dict[str, Callable[[Path], str]] = {"memory": memory_table, "train_step": train_step_table}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with each of its tables as the rows have it.

    Raises:
        ValueError: a mark names a table that does not exist, or is not closed.
    """

    def rewritten(found: re.Match[str]) -> str:
        if found["name"] not in TABLES:
            raise ValueError(f"<!-- rows: {found['name']} -->: there is no such table; there are {', '.join(TABLES)}")
        return f"{found['open']}\n\n{TABLES[found['name']](results)}\n\n<!-- /rows -->"

    filled_page, count = re.subn(r"(?s)(?P<open><!-- rows: (?P<name>\S+) -->).*?<!-- /rows -->", rewritten, page)
    if count != page.count("<!-- rows:"):
        raise ValueError("a <!-- rows: NAME --> has no <!-- /rows -->")
    return filled_page


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is not what the rows say")
    options = parser.parse_args()
    stale = []
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text()
        new = filled(page)
        if new != page:
            stale.append(path)
            if not options.check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'not what the rows say; run python -m benchmarks.tables' if options.check else 'written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
