"""What one run of the main job is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_edge.har.training import Curve

Progress = Callable[[str, int, int], None]  # progress(title, done, total)


@dataclass(frozen=True)
class Settings:
    """What one run does; the command line's options."""

    data: str
    target_subject: int
    out: Path
    protocol: str = "A"
    target_domain: str | None = None
    model: str | None = None
    weights: Path | None = None
    rank: int = 2
    steps: int = 50
    epochs: int = 10
    lr: float | None = None
    seed: int = 0
    method: str = "lora_edge"


@dataclass
class Row:
    """One row of the table; None where a column has no meaning.

    Attributes:
        f1: None where the method does not apply to this model or these windows.
        axes: what the model takes as each channel, such as -ax.
        remark: why there is no F1, or what was left out.
    """

    name: str
    title: str
    f1: float | None
    trainable: int = 0
    share_percent: float = 0.0
    saved_bytes: int | None = None
    lr: float | None = None
    seconds: float | None = None
    seconds_to_target: float | None = None
    curve: Curve | None = None
    axes: list[str] | None = None
    remark: str | None = None


@dataclass
class Report:
    """The outcome of a run, as ``results.json`` holds it.

    A model takes a raw window as ``(window[axes] - mean) / std``: the axes of its row, mean and std of ``normalisation``.
    ``target_f1`` is None where full fine-tuning does not apply.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    windows: dict[str, int]
    normalisation: dict[str, list[float]]
    target_f1: float | None
    rows: list[Row] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """The row of a method by its name."""
        return next(row for row in self.rows if row.name == name)
