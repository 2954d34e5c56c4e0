"""The studies of several files together, by name, and runs of their stages without curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from .rows import read_rows
from .summary import RUN, Summary, interval, points_of, summaries

HEADINGS = {  # of a study's own tables, and of its column beside others
    "watch_A": ("A new user (watch, protocol A)", "A: new user"),
    "watch_B": ("A new user's other wrist (watch, protocol B)", "B: other wrist"),
    "spsw_phone_B": ("From other people's watches to one's phone", "watches to phone"),
    "spsw_watch_B": ("From other people's phones to one's watch", "phones to watch"),
    "digits_50": ("SVHN's network, 50 MNIST digits", "50 digits"),
    "digits_500": ("SVHN's network, 500 MNIST digits", "500 digits"),
    "watch_mobilenet_v2_on_windows_B": ("The other wrist, MobileNetV2", "B, MobileNetV2"),
    "watch_resnet18_on_windows_B": ("The other wrist, ResNet-18", "B, ResNet-18"),
}
WATCH = ("watch_A", "watch_B")  # the studies of the README's table, the pictures, the aims and the comparison at equal count


@dataclass(frozen=True)
class StudyRows:
    """One file's rows and what they say."""

    name: str
    rows: pd.DataFrame

    @property
    def heading(self) -> str:
        return HEADINGS.get(self.name, (self.name.replace("_", ", "),))[0]

    @property
    def column(self) -> str:
        return HEADINGS.get(self.name, (self.name.replace("_", ", "),))[-1]

    @cached_property
    def found(self) -> dict[str, Summary]:
        """Summaries by method; empty where there is a search alone."""
        return summaries(self.rows)

    def f1(self, stage: str, method: str, share: float = 0.0) -> pd.Series:
        """F1 by person and seed of the runs of a stage without curves."""
        rows = self.rows
        return rows[(rows["stage"] == stage) & (rows["method"] == method) & (rows["share"] == share)].set_index(RUN)["f1"]

    def f1_after(self, name: str, step: int) -> pd.Series:
        """F1 by person and seed after so many steps, read from the curves."""
        return self.found[name].curve.map(lambda curve: points_of(curve)[step])

    def best_of(self, own: str, others: Sequence[str]) -> tuple[str, tuple[float, float]]:
        """Of ``others`` the one whose mean difference to ``own`` is largest, and the interval of that difference."""
        points = {name: interval(100 * self.found[name].minus(self.found[own])) for name in others}
        best = max(points, key=lambda name: points[name][0])
        return best, points[best]


def read_studies(files: Sequence[Path]) -> dict[str, StudyRows]:
    """The studies of files by name, in their order.

    Raises:
        ValueError: no file has rows of a study.
    """
    studies = {name: StudyRows(name, read_rows(path)) for path in files for name in [path.stem.removeprefix("study_")]}
    if not any(study.found for study in studies.values()):
        raise ValueError(f"{', '.join(map(str, files))}: no rows of the stage study; run benchmarks.study first")
    return studies


def committed(folder: Path) -> list[Path]:
    """A folder's files of rows in the order of the headings, those without one last."""
    names = list(HEADINGS)
    files = {path.stem.removeprefix("study_"): path for path in sorted(folder.glob("study_*.csv"))}
    return [files[name] for name in sorted(files, key=lambda name: names.index(name) if name in names else len(names))]
