"""Tables of differences in points of macro-F1, each with its 95 % interval, paired by person, and the aims of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pandas as pd

from ..markdown import table
from .rows import WITHOUT_TRAINING
from .stages import LONG_STEPS, SHARES, STEPS
from .studies import StudyRows
from .summary import OWN_RATE, Summary, by_person, interval
from .tables import signed

DEFAULTS = f"lora_edge{OWN_RATE}"
AS_WORN = f"lora_edge_as_worn{OWN_RATE}"
BATCH_MODE = {"watch_A": f"lora_edge_batch_bn{OWN_RATE}", "watch_B": f"lora_edge_batch_bn_turned{OWN_RATE}"}
PUBLISHED = {"watch_A": "lora_edge_paper", "watch_B": "lora_edge_paper, rank 6"}
MOST_PARAMETERS = 3  # times LoRA-Edge's: the methods that it is compared with most closely

# (question, [(method, other method), ...]) in each study; a line whose methods a study lacks is left out there
COMPARISONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "LoRA-Edge's defaults",
        tuple(
            (DEFAULTS, other) for other in ("full", "target_only", "head_only", "bn_only", "dora, rank 1", "conv_lora, rank 1")
        ),
    ),
    (
        "With a searched rate",
        (("lora_edge", "full"), ("lora_edge", DEFAULTS)),
    ),
    (
        "What turning the axes is worth",
        (
            (DEFAULTS, AS_WORN),
            ("full_turned", "full"),
            ("head_only_turned", "head_only"),
            ("bn_only_turned", "bn_only"),
            ("dora_turned, rank 1", "dora, rank 1"),
        ),
    ),
    (
        "All with axes turned",
        tuple((DEFAULTS, other) for other in ("full_turned", "head_only_turned", "bn_only_turned", "dora_turned, rank 1")),
    ),
    (
        "All with axes as worn",
        ((AS_WORN, "full"), (AS_WORN, "bn_only"), (AS_WORN, "dora, rank 1"), ("full_frozen_bn", "full")),
    ),
    (
        "BatchNorm in batch mode",
        (
            (f"lora_edge_batch_bn{OWN_RATE}", "full"),
            (f"lora_edge_batch_bn_turned{OWN_RATE}", "full"),
            (f"lora_edge_batch_bn_turned{OWN_RATE}", "full_turned"),
            (f"lora_edge_batch_bn_turned{OWN_RATE}", DEFAULTS),
            (f"lora_edge_batch_bn_turned{OWN_RATE}", "head_only"),
            (f"lora_edge_batch_bn_turned{OWN_RATE}", "bn_only"),
        ),
    ),
    (
        "As published",
        (("lora_edge_paper", "full"), ("lora_edge_paper, rank 6", "full")),
    ),
    (
        "The subspace",
        (
            ("lora_edge_gradient", "lora_edge_as_worn"),
            ("lora_edge_gradient", DEFAULTS),
            ("lora_edge_input", "lora_edge_as_worn"),
            ("lora_edge_input", DEFAULTS),
        ),
    ),
    (
        "BatchNorm's statistics",
        (
            ("lora_edge_source_bn", "lora_edge_as_worn"),
            ("lora_edge_source_bn", DEFAULTS),
            ("lora_edge_target_bn", "lora_edge_as_worn"),
            ("lora_edge_target_bn", DEFAULTS),
        ),
    ),
)


def aims_table(a: StudyRows, b: StudyRows) -> str:
    """The aims on the watch data beside what the rows say, in protocols A and B."""
    both = (a, b)
    own = [study.found[DEFAULTS] for study in both]
    full = [study.found["full"] for study in both]
    share = f"{own[0].share_percent:.2f} % of the parameters"

    def cells(value: Callable[[StudyRows, Summary, Summary], str]) -> list[str]:
        return [value(*of_one) for of_one in zip(both, own, full, strict=True)]

    def batch(study: StudyRows, own: Summary, full: Summary) -> str:
        summary = study.found[BATCH_MODE[study.name]]
        return f"{signed(*summary.points(full))} ({'axes turned' if 'turned' in summary.name else 'as worn'})"

    def published(study: StudyRows, own: Summary, full: Summary) -> str:
        summary = study.found[PUBLISHED[study.name]]
        return f"{signed(*summary.points(full))} ({summary.share_percent:.2f} %)"

    def nearest(study: StudyRows, own: Summary, full: Summary) -> str:
        best, points = study.best_of(DEFAULTS, list(peers(study)))
        return f"{study.found[best].title}: {signed(*points)}"

    def times(study: StudyRows, own: Summary, full: Summary) -> str:
        return f"{own.times_shorter(full).median():.1f} / {own.shorter_in_total(full):.1f}"

    def ahead_of_both(study: StudyRows, own: Summary, full: Summary) -> str:
        names = (own.name + own.note, BATCH_MODE[study.name])
        counts = (ahead(study.found[n], study.found[other]) for n in names for other in ("head_only", "bn_only"))
        return "{} and {} / {} and {}".format(*counts)

    return table(
        ("of the watch data", "aim", "a new user (A)", "the other wrist (B)"),
        [
            [f"defaults, {share}, minus full fine-tuning", "at least -1.0", *cells(lambda s, o, f: signed(*o.points(f)))],
            ["the same in batch mode", "at least -1.0", *cells(batch)],
            [
                f"the best other method of up to {MOST_PARAMETERS} times the parameters, minus the defaults",
                "within its interval",
                *cells(nearest),
            ],
            ["as published, at most 1.49 % of the parameters, minus full fine-tuning", "at least -4.7", *cells(published)],
            ["times shorter to 95 % of full fine-tuning's F1: median / in total", "1.4 in both, 3.8 in one", *cells(times)],
            [
                "people for whom it is ahead of head only and of BN only: defaults / batch mode",
                f"{len(own[1].by_person())} and {len(own[1].by_person())} in B",
                *cells(ahead_of_both),
            ],
        ],
    )  # fmt: skip


def peers(study: StudyRows) -> Iterator[str]:
    """Other people's methods with at most three times LoRA-Edge's parameters."""
    most = MOST_PARAMETERS * study.found[DEFAULTS].trainable
    for name, summary in study.found.items():
        if summary.name not in WITHOUT_TRAINING and not name.startswith("lora_edge") and summary.trainable <= most:
            yield name


def ahead(own: Summary, other: Summary) -> int:
    """The number of people for whom ``own`` has the higher F1."""
    return int((own.minus(other) > 0).sum())


def comparison_tables(studies: Mapping[str, StudyRows]) -> str:
    """A table per question, a column per study."""
    parts = []
    for question, pairs in COMPARISONS:
        shown = [study for study in studies.values() if any(own in study.found and o in study.found for own, o in pairs)]
        lines = []
        for own, other in pairs:
            titles = [f"**{s.found[own].title}** minus {s.found[other].title}" for s in shown if {own, other} <= set(s.found)]
            if titles:
                lines.append([titles[0], *(_difference(study.found, own, other) for study in shown)])
        parts.append(f"### {question}\n\n{table(['points of macro-F1', *(study.column for study in shown)], lines)}")
    return "\n\n".join(parts)


def _difference(found: Mapping[str, Summary], own: str, other: str) -> str:
    """Points, interval and for how many people ``own`` is ahead."""
    if own not in found or other not in found:
        return "-"
    points, people = found[own].points(found[other]), len(found[own].minus(found[other]))
    return f"{signed(*points)} ({ahead(found[own], found[other])} of {people})"


def steps_and_labels_table(studies: Mapping[str, StudyRows]) -> str:
    """LoRA-Edge at a searched rate after more steps, after few steps, and with few labels."""
    shown = [studies["watch_A"], studies["watch_B"]]
    lines: list[tuple[str, Callable[[StudyRows], pd.Series]]] = [
        (f"LoRA-Edge minus full fine-tuning, {LONG_STEPS} steps", _long_minus_full),
        (f"LoRA-Edge, {LONG_STEPS} minus {STEPS} steps", partial(_long_minus_short, name="lora_edge")),
        (f"LoRA-Edge, axes as worn, {LONG_STEPS} minus {STEPS} steps", partial(_long_minus_short, name="lora_edge_as_worn")),
    ]
    for share in (SHARES[0], SHARES[-1]):
        for name, title in (("full", "full fine-tuning"), ("head_only", "head only")):
            line = f"LoRA-Edge minus {title}, {100 * share:g} % of each recording"
            lines.append((line, partial(_few_minus, name=name, share=share)))
    for step in (2, 10):
        lines.append(
            (f"the gradient's subspace minus the weight's, after {step} steps", partial(_gradient_minus_weight, step=step))
        )
    return table(
        ["points of macro-F1", *(study.column for study in shown)],
        ([title, *(_paired(difference(study)) for study in shown)] for title, difference in lines),
    )


def _long_minus_full(study: StudyRows) -> pd.Series:
    return study.f1("long", "lora_edge") - study.f1("long", "full")


def _long_minus_short(study: StudyRows, name: str) -> pd.Series:
    """Return the method's F1 after the long runs minus that after the usual ones; empty for a study without long runs of it."""
    long = study.f1("long", name)
    return long - study.found[name].f1 if len(long) else long


def _few_minus(study: StudyRows, name: str, share: float) -> pd.Series:
    return study.f1("few_shot", "lora_edge", share) - study.f1("few_shot", name, share)


def _gradient_minus_weight(study: StudyRows, step: int) -> pd.Series:
    """Return F1 in the gradient's subspace minus that in the weight's after ``step`` steps.

    In B the weight's form is the as-worn one, because the gradient's runs do not turn axes; in A turning is rare.
    """
    weight = {"watch_A": DEFAULTS, "watch_B": "lora_edge_as_worn"}[study.name]
    return study.f1_after("lora_edge_gradient", step) - study.f1_after(weight, step)


def _paired(difference: pd.Series) -> str:
    return signed(*interval(100 * by_person(difference))) if len(difference) else "-"
