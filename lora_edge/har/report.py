"""The report of a run: one row per method, as ``results.json`` holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lora_edge.environment.machine import describe_machine
from lora_edge.har.data import Split
from lora_edge.har.frame import MIRRORED_CHANNELS, mirrored
from lora_edge.har.settings import Settings
from lora_edge.har.training import Curve, macro_f1

TARGET_SHARE = 0.95  # the target F1 as a share of what full fine-tuning reaches


@dataclass
class Row:
    """One row of the table; None where a column does not apply.

    Attributes:
        f1: macro-F1 on the test windows; None if the method does not apply to this model or these windows.
        axes: what the model reads as each channel, such as -ax.
        remark: why there is no F1, or which step was skipped.
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
    """The outcome of a run.

    A model reads a raw window as ``(window[axes] - mean) / std``: ``axes`` of its row, ``mean`` and ``std`` of
    ``normalisation``. ``target_f1`` is None if full fine-tuning does not apply.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    windows: dict[str, int]
    normalisation: dict[str, list[float]]
    target_f1: float | None
    rows: list[Row] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """Return the row of a method by its name."""
        return next(row for row in self.rows if row.name == name)


def new_report(model: nn.Module, task: Split, settings: Settings) -> Report:
    """Return a report with the rows that need no training."""
    report = Report(
        settings={**asdict(settings), "out": str(settings.out), "weights": settings.weights and str(settings.weights)},
        machine=describe_machine(),
        windows={"source": len(task.source), "adapt": len(task.adapt), "test": len(task.test)},
        normalisation={"mean": task.mean.tolist(), "std": task.std.tolist()},
        target_f1=None,
    )
    report.rows.append(Row("zero_shot", "zero-shot", macro_f1(model, task.test)))
    if set(MIRRORED_CHANNELS) <= set(task.test.channels) and settings.protocol == "B":
        report.rows.append(Row("mirrored", "mirrored input", macro_f1(model, mirrored(task).test)))
    return report


def set_seconds_to_target(rows: list[Row]) -> float | None:
    """Fill in each row's seconds to the target F1 (95 % of full fine-tuning's); returns that F1, None if there is none."""
    full = next(row.f1 for row in rows if row.name == "full")
    if full is None:
        return None
    for row in rows:
        if row.curve is not None:
            row.seconds_to_target = row.curve.seconds_to(TARGET_SHARE * full)
    return TARGET_SHARE * full
