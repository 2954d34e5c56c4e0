"""The study's rows: one CSV file per data set and protocol, one row per run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

KEY = ("stage", "person", "seed", "method", "rank", "lr", "steps", "share")
FIELDS = (
    "device", "date", "lora_edge", "torch", "threads", "data", "protocol", *KEY, "trainable", "share_percent", "saved_bytes",
    "f1", "curve", "setup_seconds", "step_seconds", "step_over_full",
)  # fmt: skip
WITHOUT_TRAINING = ("zero_shot", "mirrored")
INTEGERS, TEXTS = ("person", "seed", "rank", "steps"), ("stage", "method", "curve")
NUMBERS = ("lr", "share", "trainable", "share_percent", "saved_bytes", "f1", "setup_seconds", "step_seconds", "step_over_full")
_TYPES: dict[str, Any] = {**dict.fromkeys(INTEGERS, int), **dict.fromkeys(TEXTS, str), **dict.fromkeys(NUMBERS, float)}


class Run(NamedTuple):
    """What identifies a row. ``share``: of each of the target's recordings, 0 for the whole adaptation part."""

    stage: str
    person: int
    seed: int
    method: str
    rank: int
    lr: float
    steps: int
    share: float = 0.0


def read_rows(path: Path) -> pd.DataFrame:
    """A file's rows, none where there is no file. Columns of numbers are int or float, NaN where a row has none."""
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=_TYPES.get(name, str)) for name in FIELDS})
    return typed(pd.read_csv(path, dtype=str, keep_default_na=False))


def typed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of text with the numbers of :func:`read_rows` in their columns."""
    columns = {name: rows[name].replace("", "nan").astype(float) for name in NUMBERS if name in rows}
    columns |= {name: rows[name].astype(int) for name in INTEGERS if name in rows}
    return rows.assign(**columns)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to the file, which is created with its header if it does not exist; a missing column stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = pd.DataFrame([{name: spelled(row.get(name, "")) for name in FIELDS}])
    text.to_csv(path, mode="a", header=not path.is_file(), index=False)


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's identity as the file spells it."""
    return tuple(spelled(row[name]) for name in KEY)


def spelled(value: object) -> str:
    """A value as it is written into the file."""
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)
