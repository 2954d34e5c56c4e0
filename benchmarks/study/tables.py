"""The study's tables in Markdown.

A method's row: its runs (people times seeds) and their rates; mean and spread of the people's macro-F1, each the mean of its
seeds; the differences to full fine-tuning and to LoRA-Edge on the same seeds with their 95 % intervals, paired by person, and
for how many people it is ahead of the first and behind the second; and the time to 95 % of the F1 that full fine-tuning reaches
on that person and seed: steps until an evaluation shows it, times the median seconds of a step, plus the method's set-up. Where
some people and seeds do not reach it, the column says how many did. The last columns are full fine-tuning's time over the
method's, of those that reach it: the median where the untouched model is not already there, and the ratio of the time of all
runs together. A method at its own rate instead of a searched one has a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lora_edge.methods import methods

from ..markdown import table
from .summary import RUN, Summary, by_person, interval, title_of


def signed(middle: float, half: float) -> str:
    """A difference and its interval, in points."""
    return f"{middle:+.1f} ± {half:.1f}"


def methods_table(found: Mapping[str, Summary]) -> str:
    """One row per method of a study."""
    head = (
        "method", "runs", "rate", "trainable", "saved", "macro-F1", "spread", "minus full, points", "ahead of full",
        "minus LoRA-Edge, points", "behind LoRA-Edge", "s to 95 %", "times shorter", "in total",
    )  # fmt: skip
    return table(head, (_method_cells(summary, found) for summary in found.values()))


def _method_cells(summary: Summary, found: Mapping[str, Summary]) -> list[str]:
    scores = summary.by_person()
    spread = f"{scores.std():.3f}" if len(scores) > 1 else "-"
    cells = [summary.title, str(len(summary.f1)), "-", "-", "-", f"{scores.mean():.3f}", spread, *["-"] * 7]
    if summary.rates:
        cells[2] = " / ".join(f"{rate:g}" for rate in summary.rates)
        cells[3] = f"{summary.trainable:,} ({summary.share_percent:.2f} %)"
        cells[4] = f"{summary.saved_bytes / 1e6:.2f} MB"
    for place, other, sign in ((7, "full", 1), (9, "lora_edge", -1)):
        if other in found and summary is not found[other]:
            differences = summary.minus(found[other])
            cells[place] = signed(*interval(100 * differences))
            cells[place + 1] = f"{(sign * differences > 0).sum()} of {len(differences)}"
    seconds, reached = summary.seconds(), summary.steps.count()
    if len(seconds):
        cells[11] = f"{seconds.median():.2f}" + (
            f" ({reached} of {len(summary.steps)})" if reached < len(summary.steps) else ""
        )
    if "full" in found and len(ratios := summary.times_shorter(found["full"])):
        cells[12] = f"{ratios.median():.2f}"
        cells[13] = f"{summary.shorter_in_total(found['full']):.2f}"
    return cells


def people_table(found: Mapping[str, Summary]) -> str:
    """Each person's F1 by method."""
    scores = pd.DataFrame({name: summary.by_person() for name, summary in found.items()})
    lines = [[found[name].title, *map(_cell, scores[name])] for name in found]
    return table(["person", *scores.index], lines)


def other_stages(rows: pd.DataFrame) -> str:
    """The long and the few-shot runs: mean F1 of the people by method; empty without such rows."""
    rows = rows[rows["stage"].isin(["long", "few_shot"])]
    if rows.empty:
        return ""
    percent = (100 * rows["share"]).map("{:g} %".format)
    column = percent.where(rows["stage"] == "few_shot", rows["steps"].astype(str) + " steps")
    means = rows["f1"].groupby([rows["method"], column], sort=False).mean().unstack(sort=False)
    return table(["method", *means.columns], ([title_of(name), *map(_cell, f1)] for name, f1 in means.T.items()))


def _cell(f1: float) -> str:
    return "-" if pd.isna(f1) else f"{f1:.3f}"


def rate_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """LoRA-Edge's runs at each rate: of the stage ``rates``, of the search for a method and rank without that stage."""
    own = rows[rows["method"].isin(["lora_edge", "lora_edge_as_worn"]) & rows["stage"].isin(["rates", "search"])]
    kind = ["method", "rank"]
    has_rates = (own["stage"] == "rates").groupby([own[name] for name in kind]).transform("any")
    return own[(own["stage"] == "rates") | ~has_rates.astype(bool)]


def rates_table(studies: Mapping[str, pd.DataFrame]) -> str:
    """LoRA-Edge's mean F1 at each rate and rank, with its heading; empty where there are no such rows.

    The last column is the method's own rate minus the best one, paired by person with its 95 % interval. The best is chosen on
    the same runs, so it is flattered.

    Args:
        studies: rows by a study's heading.
    """
    runs = {
        (heading, *kind): of_kind.pivot_table(index=RUN, columns="lr", values="f1")
        for heading, rows in studies.items()
        for kind, of_kind in rate_runs(rows).groupby(["method", "rank"])
    }
    if not runs:
        return ""
    rates = sorted({rate for by_rate in runs.values() for rate in by_rate})
    lines = []
    for (heading, name, rank), by_rate in runs.items():
        best = best_rate(by_rate)
        cells = {rate: _cell(by_rate[rate].mean()) if rate in by_rate else "-" for rate in rates}
        cells[best] = f"**{cells[best]}**"
        behind = own_minus_best(by_rate, methods()[name].lr)
        lines.append(
            [heading, title_of(name), rank, by_rate[best].count(), *cells.values(), signed(*behind) if behind else "-"]
        )
    head = ["study", "method", "rank", "runs", *(f"{rate:g}" for rate in rates), "own minus best, points"]
    return f"### LoRA-Edge's rate, by rank\n\n{table(head, lines)}"


def best_rate(by_rate: pd.DataFrame) -> float:
    """The rate with the best mean F1 of all runs, a column each."""
    return float(by_rate.mean().idxmax())


def own_minus_best(by_rate: pd.DataFrame, own: float) -> tuple[float, float] | None:
    """Points and interval of the rate ``own`` beside the best; None where it is the best or was not run."""
    best = best_rate(by_rate)
    if own == best or own not in by_rate:
        return None
    return interval(100 * by_person(by_rate[own] - by_rate[best]))
