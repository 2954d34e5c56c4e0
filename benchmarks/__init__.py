"""Benchmarks: ``python -m benchmarks.NAME`` in a clone, ``python -m lora_edge.benchmarks.NAME`` from an installed package."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The folder of the rows, with one folder per device: inside a clone; in the working directory for an installed wheel.
_CLONE = (Path(__file__).parents[1] / "pyproject.toml").is_file()
RESULTS = Path(__file__).parent / "results" if _CLONE else Path("results")


def write_rows(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, replacing the file; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
