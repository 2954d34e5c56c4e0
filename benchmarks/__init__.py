"""Benchmarks: ``python -m benchmarks.NAME`` in a clone, ``python -m lora_edge.benchmarks.NAME`` from an installed package."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Where rows go, a folder a device: kept in a clone; under the working directory from a wheel, which is not to be written into.
_CLONE = (Path(__file__).parents[1] / "pyproject.toml").is_file()
RESULTS = Path(__file__).parent / "results" if _CLONE else Path("results")


def write_rows(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table anew, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
