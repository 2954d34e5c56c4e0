"""What a study's rows say of each method: F1 by person, differences with their 95 % intervals, time to a target F1."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
from scipy import stats

from lora_edge.har.report import TARGET_SHARE
from lora_edge.methods import methods

from .rows import WITHOUT_TRAINING
from .stages import WITH_CURVES

OWN_RATE = ", no search"  # in the title of a method at its own rate
TITLES = {"zero_shot": "zero-shot", "mirrored": "mirrored input"}
RUN = ["person", "seed"]


def _no_runs() -> pd.Series:
    return pd.Series(dtype=float, index=pd.MultiIndex.from_tuples([], names=RUN))


@dataclass
class Summary:
    """One method's rows of the stages with curves, at one rank.

    Attributes:
        note: what tells it from the method's other rows: another rank, or its own rate instead of a searched one.
        f1, curve: by person and seed; ``curve`` as its row has it.
        steps: to the target F1, by person and seed; NaN where it was not reached.
        setup_seconds, step_seconds, step_over_full: of the stage ``speed``; None without it.
        rates: learning rates of its runs.
    """

    name: str
    note: str = ""
    f1: pd.Series = field(default_factory=_no_runs)
    curve: pd.Series = field(default_factory=_no_runs)
    steps: pd.Series = field(default_factory=_no_runs)
    setup_seconds: float = 0.0
    step_seconds: float | None = None
    step_over_full: float | None = None
    rates: tuple[float, ...] = ()
    trainable: int = 0
    share_percent: float = 0.0
    saved_bytes: int = 0

    @property
    def title(self) -> str:
        return title_of(self.name) + self.note

    @property
    def mean(self) -> float:
        """Mean F1 of the people, each the mean of its seeds."""
        return float(self.by_person().mean())

    def by_person(self) -> pd.Series:
        """Mean F1 of each person's seeds."""
        return by_person(self.f1)

    def minus(self, other: Summary) -> pd.Series:
        """Mean difference in F1 to another method by person, on the seeds that both have."""
        return by_person(self.f1 - other.f1)

    def points(self, other: Summary) -> tuple[float, float]:
        """:func:`interval` of the difference in points."""
        return interval(100 * self.minus(other))

    def seconds(self) -> pd.Series:
        """Seconds to the target F1 of the runs that reached it; empty without rows of the stage ``speed``."""
        if self.step_seconds is None:
            return _no_runs()
        return self.setup_seconds + self.steps.dropna() * self.step_seconds

    def steps_beside(self, full: Summary) -> pd.DataFrame:
        """Full fine-tuning's steps to the target F1 (``full``) and this method's time in such steps (``own``).

        One row per run in which both reached it.
        """
        if self.step_over_full is None or full.step_seconds is None:
            return pd.DataFrame({"full": _no_runs(), "own": _no_runs()})
        own = self.setup_seconds / full.step_seconds + self.steps * self.step_over_full
        return pd.DataFrame({"full": full.steps, "own": own}).dropna()

    def times_shorter(self, full: Summary) -> pd.Series:
        """Full fine-tuning's time to the target F1 over this method's, of the runs that reached it.

        Runs in which the untouched model is already there are left out: full fine-tuning needs no time to be shortened.
        """
        both = self.steps_beside(full)
        both = both[both["full"] > 0]
        return both["full"] / both["own"].clip(lower=1e-9)

    def shorter_in_total(self, full: Summary) -> float:
        """The same ratio of the time of all runs together, including those in which the untouched model is already there."""
        both = self.steps_beside(full)
        return both["full"].sum() / max(both["own"].sum(), 1e-9)


def title_of(name: str) -> str:
    """A method's title; also of the rows that need no training."""
    return TITLES.get(name) or methods()[name].title


def by_person(values: pd.Series) -> pd.Series:
    """Mean of each person's seeds, without missing ones, of values by person and seed."""
    return values.dropna().groupby("person").mean()


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the half is NaN for fewer than two values."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def summaries(rows: pd.DataFrame) -> dict[str, Summary]:
    """Each method's summary in the order of the rows, a method at its own rate after the same one at a searched rate.

    A name is the method's and its note, which has the rank where most rows have another one.
    """
    trained = ~rows["method"].isin(WITHOUT_TRAINING)
    with_curves = rows["stage"].isin(WITH_CURVES)
    usual = rows.loc[with_curves & trained, "rank"].mode().max()
    note = (", rank " + rows["rank"].astype(str)).where(trained & (rows["rank"] != usual), "")
    rows = rows.assign(
        searched=rows["method"] + note, note=note + (rows["stage"] == "own_rate").map({True: OWN_RATE, False: ""})
    )
    found: dict[str, Summary] = {}
    for _, of_base in rows[with_curves].groupby("searched", sort=False):
        for note, of_method in of_base.groupby("note", sort=False):
            summary = _summary(of_method, str(note))
            found[summary.name + summary.note] = summary
    for _, row in rows[rows["stage"] == "speed"].iterrows():
        for name in (row["searched"], row["searched"] + OWN_RATE):
            if name in found:
                found[name].setup_seconds, found[name].step_seconds = row["setup_seconds"], row["step_seconds"]
                found[name].step_over_full = row["step_over_full"]
    if "full" in found:
        for summary in found.values():
            target = (TARGET_SHARE * found["full"].f1).reindex(summary.curve.index).dropna()
            summary.steps = pd.Series(
                [steps_to(f1, summary.curve[run]) for run, f1 in target.items()], target.index, dtype=float
            )
    return found


def _summary(rows: pd.DataFrame, note: str) -> Summary:
    """The summary of rows of one method, rank and kind of rate."""
    last = rows.iloc[-1]
    by_run = rows.set_index(RUN)
    if last["method"] in WITHOUT_TRAINING:
        return Summary(last["method"], note, by_run["f1"])
    return Summary(
        last["method"], note, by_run["f1"], by_run["curve"], rates=tuple(sorted(rows["lr"].unique())),
        trainable=int(last["trainable"]), share_percent=last["share_percent"], saved_bytes=int(last["saved_bytes"]),
    )  # fmt: skip


def points_of(curve: str) -> dict[int, float]:
    """F1 by step, of a row's curve such as ``"0:0.5 2:0.75"``."""
    pairs = [point.split(":") for point in curve.split()]
    return {int(step): float(f1) for step, f1 in pairs}


def steps_to(f1: float, curve: str) -> float:
    """The first step at which a curve is at ``f1`` or above; NaN if there is none."""
    return next((float(step) for step, reached in points_of(curve).items() if reached >= f1), float("nan"))
