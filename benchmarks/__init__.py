"""Benchmarks: ``python -m benchmarks.NAME`` in a clone, ``python -m lora_edge.benchmarks.NAME`` from an installed package."""

from pathlib import Path

# Where rows go, a folder a device: kept in a clone; under the working directory from a wheel, which is not to be written into.
_CLONE = (Path(__file__).parents[1] / "pyproject.toml").is_file()
RESULTS = Path(__file__).parent / "results" if _CLONE else Path("results")
