"""The fastest configuration of a kernel, measured once per device and size and then remembered.

The choices are kept in memory and in ``triton.json`` in the user's cache. Nothing is measured inside a CUDA graph capture, in
the interpreter, with LORA_EDGE_TUNE=0, or in :func:`without_measuring`: there a known choice is used, else the first
configuration. Triton's own ``@autotune(cache_results=True)`` (3.7) cannot replace this: for a size that is not in memory it
measures inside a capture too, where ``do_bench`` synchronises the device, which CUDA forbids, and it asks for a driver even in
the interpreter, while ``do_bench`` alone runs each configuration for 125 ms on a 256 MB buffer instead of six launches.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

VARIABLE = "LORA_EDGE_TUNE"
ROUNDS = 5
_known: dict[str, str] | None = None
_measures = True


class Configuration(NamedTuple):
    """Rows, columns and depth of a tile, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as "64x32x16w4s3"."""
        return f"{self.rows}x{self.columns}x{self.depth}w{self.warps}s{self.stages}"


class Tuned(NamedTuple):
    """A kernel's configurations on the device of a tensor."""

    kernel: str
    configurations: Sequence[Configuration]
    on: Tensor

    def run(self, kind: Sequence[object], launch: Callable[[Configuration], None]) -> None:
        """Launch the best configuration for calls of this kind, measuring first where it is not known."""
        launch(self.best(kind, launch))

    def best(self, kind: Sequence[object], launch: Callable[[Configuration], None]) -> Configuration:
        """The best configuration for calls of this kind."""
        first = self.configurations[0]
        if len(self.configurations) == 1 or not self.on.is_cuda:
            return first
        key = " ".join([_device(self.on.device.index), self.kernel, *map(str, kind)])
        by_name = {configuration.name: configuration for configuration in self.configurations}
        known = by_name.get(_choices().get(key, ""))
        if known is not None:
            return known
        if not _measures or os.environ.get(VARIABLE) == "0" or torch.cuda.is_current_stream_capturing():
            return first
        best = min(self.configurations, key=lambda configuration: _seconds(lambda: launch(configuration)))
        _remember(key, best.name)
        return best


@contextmanager
def without_measuring() -> Iterator[None]:
    """Inside, and in the threads that run backward, nothing is measured."""
    global _measures
    before, _measures = _measures, False
    try:
        yield
    finally:
        _measures = before


def cache_file() -> Path:
    """The file of the choices: under XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_edge" / "triton.json"


def _choices() -> dict[str, str]:
    global _known
    if _known is None:
        _known = _read()
    return _known


def _read() -> dict[str, str]:
    """The file's choices; empty where it is missing or damaged."""
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _remember(key: str, name: str) -> None:
    """Add a choice to what all processes have written so far; write failures are ignored."""
    _choices()[key] = name
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        together = {**_read(), **_choices()}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(together, file, indent=0, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return


def _seconds(launch: Callable[[], None]) -> float:
    """The seconds of the fastest of a few launches, after one that compiles."""
    launch()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)


@functools.cache
def _device(index: int) -> str:
    return f"{torch.cuda.get_device_name(index).replace(' ', '_')} triton-{triton.__version__}"
