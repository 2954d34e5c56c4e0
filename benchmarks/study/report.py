"""``python -m benchmarks.study.report ROWS.csv ...``: the study's tables as Markdown, and its picture.

A method's row: its runs (people times seeds) and their rates; mean and spread of the people's macro-F1, each the mean of its
seeds; the differences to full fine-tuning and to LoRA-Edge on the same seeds with their 95 % intervals, paired by person, and
for how many people it is ahead of the first and behind the second; and the time to 95 % of the F1 that full fine-tuning reaches
on that person and seed: steps until an evaluation shows it, times the median seconds of a step, and what the method does before
the first step. Where some people and seeds do not reach it, the column says how many did. The last columns are full
fine-tuning's time over the method's, of those that reach it: the median where the untouched model is not there before either
begins, and the ratio of all runs' time together. A method at the rate that it names itself, whatever the search says, is a row
of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import numpy as np

from lora_edge.har.report import TARGET_SHARE
from lora_edge.methods import methods

from .runs import WITH_CURVES, WITHOUT_TRAINING, read_rows

MARKS = ("<!-- results -->", "<!-- end of results -->")
HEADINGS = {
    "watch_A": "A new user (watch, protocol A)",
    "watch_B": "A new user's other wrist (watch, protocol B)",
    "watch_mobilenet_v2_on_windows_B": "The other wrist, MobileNetV2",
    "watch_resnet18_on_windows_B": "The other wrist, ResNet-18",
    "spsw_watch_B": "From other people's phones to one's watch",
    "spsw_phone_B": "From other people's watches to one's phone",
    "digits_50": "SVHN's network, 50 MNIST digits",
    "digits_500": "SVHN's network, 500 MNIST digits",
}
OWN_RATE = ", no search"  # in the title of a method at the rate that it names itself
TITLES = {"zero_shot": "zero-shot", "mirrored": "mirrored input"}
RateRuns = dict[float, dict[tuple[int, int], float]]  # F1 by rate, then by person and seed


@dataclass
class Summary:
    """One method's rows of a stage with curves at one rank; ``f1`` and ``steps`` to the target F1 by person and seed."""

    name: str
    note: str = ""
    f1: dict[tuple[int, int], float] = field(default_factory=dict)
    steps: dict[tuple[int, int], int | None] = field(default_factory=dict)
    setup_seconds: float = 0.0
    step_seconds: float | None = None
    step_over_full: float | None = None
    rates: set[float] = field(default_factory=set)
    trainable: int = 0
    share_percent: float = 0.0
    saved_bytes: int = 0

    @property
    def title(self) -> str:
        return (TITLES.get(self.name) or methods()[self.name].title) + self.note

    def seconds(self) -> list[float]:
        """Seconds to the target F1 where it was reached; empty without rows of the stage ``speed``."""
        if self.step_seconds is None:
            return []
        return [self.setup_seconds + steps * self.step_seconds for steps in self.steps.values() if steps is not None]

    def steps_beside(self, full: Summary) -> list[tuple[int, float]]:
        """Full fine-tuning's steps to the target F1 and this method's time in such steps, of each run that reached it."""
        if self.step_over_full is None or full.step_seconds is None:
            return []
        setup = self.setup_seconds / full.step_seconds
        pairs = [(full.steps[key], steps) for key, steps in self.steps.items()]
        return [(most, setup + steps * self.step_over_full) for most, steps in pairs if most is not None and steps is not None]

    def times_shorter(self, full: Summary) -> list[float]:
        """Full fine-tuning's time to the target F1 over this method's, of each person and seed that reached it.

        Where the untouched model is there, full fine-tuning's time is none and there is nothing to shorten.
        """
        return [most / max(own, 1e-9) for most, own in self.steps_beside(full) if most]

    def shorter_in_total(self, full: Summary) -> float:
        """The same of all runs' time together, those too where the untouched model is there and the set-up was for nothing."""
        both = self.steps_beside(full)
        return sum(most for most, _ in both) / max(sum(own for _, own in both), 1e-9)

    def by_person(self) -> dict[int, float]:
        """Mean of a person's seeds."""
        return _by_person(self.f1)

    def minus(self, other: Summary) -> dict[int, float]:
        """Mean difference to another method by person, on the seeds that both have."""
        return _by_person({key: f1 - other.f1[key] for key, f1 in self.f1.items() if key in other.f1})


def _by_person(values: dict[tuple[int, int], float]) -> dict[int, float]:
    seeds: dict[int, list[float]] = defaultdict(list)
    for (person, _), value in values.items():
        seeds[person].append(value)
    return {person: mean(seeds[person]) for person in sorted(seeds)}


def summaries(rows: list[dict[str, str]]) -> dict[str, Summary]:
    """Each method's summary, in the order of the rows; one at another rank than most rows have has it in its name."""
    ranks = [row["rank"] for row in rows if row["stage"] in WITH_CURVES and row["method"] not in WITHOUT_TRAINING]
    usual = max(ranks, key=ranks.count, default="")
    found: dict[str, Summary] = {}
    curves: dict[tuple[str, int, int], list[tuple[int, float]]] = {}
    for row in rows:
        note = "" if row["rank"] == usual or row["method"] in WITHOUT_TRAINING else f", rank {row['rank']}"
        note += OWN_RATE if row["stage"] == "own_rate" else ""
        name = row["method"] + note
        for timed in (name, name + OWN_RATE) if row["stage"] == "speed" else ():
            if timed in found:
                summary = found[timed]
                summary.setup_seconds, summary.step_seconds = float(row["setup_seconds"]), float(row["step_seconds"])
                summary.step_over_full = float(row["step_over_full"])
        if row["stage"] not in WITH_CURVES:
            continue
        summary = found.setdefault(name, Summary(row["method"], note))
        key = (int(row["person"]), int(row["seed"]))
        summary.f1[key] = float(row["f1"])
        if row["method"] in WITHOUT_TRAINING:
            continue
        summary.rates.add(float(row["lr"]))
        summary.trainable, summary.share_percent = int(row["trainable"]), float(row["share_percent"])
        summary.saved_bytes = int(row["saved_bytes"])
        points = [point.split(":") for point in row["curve"].split()]
        curves[name, key[0], key[1]] = [(int(step), float(f1)) for step, f1 in points]
    for (name, person, seed), curve in curves.items():
        best = found["full"].f1.get((person, seed)) if "full" in found else None
        if best is not None:
            found[name].steps[person, seed] = next((step for step, f1 in curve if f1 >= TARGET_SHARE * best), None)
    searched = [name.removesuffix(OWN_RATE) for name in found]
    return {name: found[name] for name in sorted(found, key=lambda name: searched.index(name.removesuffix(OWN_RATE)))}


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the half is NaN for fewer than two."""
    from scipy.stats import t

    if len(differences) < 2:
        return mean(differences), float("nan")
    spread = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    return mean(differences), float(t.ppf(0.975, len(differences) - 1)) * spread


def table(found: dict[str, Summary]) -> str:
    """The table of a study in Markdown."""
    lines = [
        "| method | runs | rate | trainable | saved | macro-F1 | spread | minus full, points | ahead of full "
        "| minus LoRA-Edge, points | behind LoRA-Edge | s to 95 % | times shorter | in total |",
        "|---" * 14 + "|",
    ]
    for summary in found.values():
        scores = list(summary.by_person().values())
        spread = f"{np.std(scores, ddof=1):.3f}" if len(scores) > 1 else "-"
        cells = [summary.title, str(len(summary.f1)), "-", "-", "-", f"{mean(scores):.3f}", spread, *["-"] * 7]
        if summary.rates:
            cells[2] = " / ".join(f"{rate:g}" for rate in sorted(summary.rates))
            cells[3] = f"{summary.trainable:,} ({summary.share_percent:.2f} %)"
            cells[4] = f"{summary.saved_bytes / 1e6:.2f} MB"
        for place, other, sign in ((7, "full", 1), (9, "lora_edge", -1)):
            if other in found and summary is not found[other]:
                differences = list(summary.minus(found[other]).values())
                middle, half = interval([100 * difference for difference in differences])
                cells[place] = f"{middle:+.1f} ± {half:.1f}"
                cells[place + 1] = f"{sum(sign * difference > 0 for difference in differences)} of {len(differences)}"
        reached = sum(steps is not None for steps in summary.steps.values())
        count = f" ({reached} of {len(summary.steps)})" if reached < len(summary.steps) else ""
        if seconds := summary.seconds():
            cells[11] = f"{median(seconds):.2f}{count}"
        if "full" in found and (ratios := summary.times_shorter(found["full"])):
            cells[12] = f"{median(ratios):.2f}"
            cells[13] = f"{summary.shorter_in_total(found['full']):.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def people_table(found: dict[str, Summary]) -> str:
    """Each person's F1 by method, in Markdown."""
    people = sorted({person for summary in found.values() for person, _ in summary.f1})
    lines = ["| person | " + " | ".join(map(str, people)) + " |", "|---" * (len(people) + 1) + "|"]
    for summary in found.values():
        scores = summary.by_person()
        lines.append(f"| {summary.title} | " + " | ".join(f"{scores[p]:.3f}" if p in scores else "-" for p in people) + " |")
    return "\n".join(lines)


def other_stages(rows: list[dict[str, str]]) -> str:
    """The long and the few-shot runs: mean F1 of the people by method, in Markdown."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["stage"] == "long":
            scores["long", f"{row['steps']} steps"][row["method"]].append(float(row["f1"]))
        elif row["stage"] == "few_shot":
            scores["few_shot", f"{100 * float(row['share']):g} %"][row["method"]].append(float(row["f1"]))
    if not scores:
        return ""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    lines = ["| method | " + " | ".join(title for _, title in scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for name in names:
        cells = [f"{mean(found[name]):.3f}" if found.get(name) else "-" for found in scores.values()]
        lines.append(f"| {methods()[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_runs(rows: list[dict[str, str]]) -> dict[tuple[str, int], RateRuns]:
    """LoRA-Edge's runs at each rate by method and rank: of the stage ``rates``, else of the search."""
    found: dict[tuple[str, int], RateRuns] = {}
    for stage in ("search", "rates"):
        of_stage: dict[tuple[str, int], RateRuns] = defaultdict(lambda: defaultdict(dict))
        for row in rows:
            if row["stage"] == stage and row["method"] in ("lora_edge", "lora_edge_as_worn"):
                run = int(row["person"]), int(row["seed"])
                of_stage[row["method"], int(row["rank"])][float(row["lr"])][run] = float(row["f1"])
        found |= of_stage
    return found


def rates_table(studies: dict[str, list[dict[str, str]]]) -> str:
    """LoRA-Edge's mean F1 at each rate and rank, in Markdown; empty where there are none.

    The last column is the method's own rate minus the best one, paired by person with its 95 % interval. The best is read off
    the same runs, so it is flattered.

    Args:
        studies: rows by a study's heading.
    """
    found = {(heading, *key): runs for heading, rows in studies.items() for key, runs in sorted(rate_runs(rows).items())}
    rates = sorted({rate for runs in found.values() for rate in runs})
    head = ["study", "method", "rank", "runs", *(f"{rate:g}" for rate in rates), "own minus best, points"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (heading, name, rank), runs in found.items():
        means = {rate: mean(f1.values()) for rate, f1 in runs.items()}
        cells = [f"{means[rate]:.3f}" if rate in means else "-" for rate in rates]
        method, best = methods()[name], max(means, key=lambda rate: means[rate])
        cells[rates.index(best)] = f"**{means[best]:.3f}**"
        behind = "-"
        if best != method.lr and method.lr in runs:
            differences = {run: 100 * (f1 - runs[best][run]) for run, f1 in runs[method.lr].items() if run in runs[best]}
            middle, half = interval(list(_by_person(differences).values()))
            behind = f"{middle:+.1f} ± {half:.1f}"
        lines.append("| " + " | ".join([heading, method.title, str(rank), str(len(runs[best])), *cells, behind]) + " |")
    return "### LoRA-Edge's rate, by rank\n\n" + "\n".join(lines) if found else ""


def draw(studies: dict[str, dict[str, Summary]], path: Path) -> None:
    """Write the PNG: mean F1 against trainable parameters, bytes saved for backward and seconds, a line of panels a study."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, grid = plt.subplots(len(studies), 3, figsize=(14, 3.4 * len(studies)), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(n for found in studies.values() for n in found if n not in WITHOUT_TRAINING))
    colours = [plt.get_cmap(name)(k) for name in ("tab20", "tab20b") for k in range(20)]
    for axes, (title, found) in zip(grid, studies.items(), strict=True):
        for k, name in enumerate(names):
            if name not in found:
                continue
            summary = found[name]
            f1 = mean(summary.by_person().values())
            seconds = summary.seconds()
            marker, size = ("*", 13) if name.startswith("lora_edge") else ("o", 7)
            values = (summary.trainable, summary.saved_bytes / 1e6, median(seconds) if seconds else None)
            for axis, value in zip(axes, values, strict=True):
                if value is not None:
                    axis.plot(value, f1, marker, color=colours[k % len(colours)], markersize=size, label=summary.title)
        axes[0].set(xlabel="trainable parameters", xscale="log", ylabel="macro-F1")
        axes[1].set(xlabel="saved for backward, MB", xscale="log", title=title)
        axes[2].set(xlabel="seconds to 95 % of full fine-tuning's F1", xscale="log")
        axes[2].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[2].xaxis.set_major_formatter("{x:g}")
        axes[2].xaxis.set_minor_formatter(NullFormatter())  # labels of less than a decade run into each other
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.set_visible(bool(axis.lines))
    shown = {label: line for axis in grid[:, 0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(files: list[Path]) -> tuple[str, dict[str, dict[str, Summary]]]:
    """The tables of all files in Markdown, and their summaries by heading; of a search alone a line in the table of rates.

    Raises:
        ValueError: no file has rows of a study.
    """
    studies: dict[str, dict[str, Summary]] = {}
    searches: dict[str, list[dict[str, str]]] = {}
    parts: list[str] = []
    for path in files:
        rows = read_rows(path)
        found = summaries(rows)
        name = path.stem.removeprefix("study_")
        heading = HEADINGS.get(name, name.replace("_", ", "))
        searches[heading] = rows
        if found:
            studies[heading] = found
            parts += [f"### {heading}", table(found), people_table(found), other_stages(rows)]
    if not studies:
        raise ValueError(f"{', '.join(map(str, files))}: no rows of the stage study; run benchmarks.study first")
    parts.append(rates_table(searches))
    return "\n\n".join(part for part in parts if part), studies


def replace_between_marks(page: str, text: str) -> str:
    """The page with ``text`` between its two marks.

    Raises:
        ValueError: the page has not both marks, once each.
    """
    begin, end = MARKS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    return f"{page[: page.index(begin)]}{begin}\n\n{text}\n\n{page[page.index(end) :]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.report", description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path, nargs="+", help="files that benchmarks.study wrote")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    parser.add_argument("--page", type=Path, help=f"a Markdown file whose text between {MARKS[0]} and {MARKS[1]} is replaced")
    options = parser.parse_args()
    try:
        text, studies = report(options.rows)
        if options.page is not None:
            options.page.write_text(replace_between_marks(options.page.read_text(), text))
    except (ValueError, OSError) as error:
        print(f"study_report: error: {error}", file=sys.stderr)
        return 2
    if options.page is None:
        print(text)
    if options.picture is not None:
        draw(studies, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
