"""The settings of one run of the main job, and its progress callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]  # progress(title, done, total)


@dataclass(frozen=True)
class Settings:
    """The options of one run, as on the command line."""

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
