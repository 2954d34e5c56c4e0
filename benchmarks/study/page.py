"""docs/results.md and the README's table of results, generated from the rows."""

from __future__ import annotations

from collections.abc import Mapping

from lora_edge.har import frame
from lora_edge.har.training import BATCH
from lora_edge.methods import methods
from lora_edge.methods.parts.backbone import SOURCE_SAMPLES

from ..markdown import table
from .comparisons import BATCH_MODE, DEFAULTS, aims_table, comparison_tables, steps_and_labels_table
from .equal import Equal, equal_rows, equal_table
from .problems import SEARCH_PEOPLE
from .stages import RATE_FACTORS, STEPS
from .studies import WATCH, StudyRows
from .tables import methods_table, other_stages, people_table, rates_table, signed
from .text import paragraph

PICTURE_TEXT = (
    "macro-F1 of six methods beside full fine-tuning on a new user and on the other wrist, and bytes stored for backward"
)
EQUAL_TEXT = "points of macro-F1 beside LoRA-Edge of every method at equal trained count, on a new user and on the other wrist"
# the README's lines: a title, and the method in each of WATCH
HEADLINE: tuple[tuple[str, tuple[str, str]], ...] = (
    ("full fine-tuning", ("full", "full")),
    ("**LoRA-Edge, defaults**", (DEFAULTS, DEFAULTS)),
    ("LoRA-Edge, BatchNorm in batch mode", (BATCH_MODE["watch_A"], BATCH_MODE["watch_B"])),
    ("LoRA-Edge, as published", ("lora_edge_paper", "lora_edge_paper")),
    ("DoRA, rank 1", ("dora, rank 1", "dora, rank 1")),
    ("conv LoRA, rank 1", ("conv_lora, rank 1", "conv_lora, rank 1")),
    ("BN only", ("bn_only", "bn_only")),
    ("head only", ("head_only", "head_only")),
)


def tables_of(study: StudyRows) -> str:
    """The tables of one study under its heading; empty where there is a search alone."""
    if not study.found:
        return ""
    parts = (f"### {study.heading}", methods_table(study.found), people_table(study.found), other_stages(study.rows))
    return "\n\n".join(part for part in parts if part)


def all_tables(studies: Mapping[str, StudyRows]) -> str:
    """The tables of all studies, and LoRA-Edge's rates."""
    rates = rates_table({study.heading: study.rows for study in studies.values()})
    return "\n\n".join(part for part in (*map(tables_of, studies.values()), rates) if part)


def results_page(studies: Mapping[str, StudyRows]) -> str:
    """The text of docs/results.md, of the studies of WATCH and any others."""
    _check_needed(studies)
    a, b = (studies[name] for name in WATCH)
    return "\n\n".join(
        (
            "# Results",
            "Written by `make results` from the rows in `benchmarks/results/cpu/`; do not edit.",
            paragraph(_how()),
            f"![{PICTURE_TEXT}](study.png)",
            "## Aims",
            aims_table(a, b),
            paragraph(_cost(a, b)),
            "## Comparisons",
            paragraph(
                """Differences in points of macro-F1 with their 95 % intervals, paired by person, and for how many people
                the method in bold is ahead. A study has a column where it has rows of both methods. "No search" is a method
                at its own learning rate; the others have searched rates."""
            ),
            comparison_tables(studies),
            "### More steps, few steps, few labels",
            "At searched rates; at least one window of each recording is labelled.",
            steps_and_labels_table(studies),
            *_equal_part(equal_rows(studies)),
            "## Tables",
            all_tables(studies),
        )
    ) + "\n"  # fmt: skip


def _equal_part(equal: Equal) -> list[str]:
    """The section on all methods at equal trained count; empty without rows."""
    if not equal.names:
        return []
    own = int(equal.row("lora_edge")["trainable"]) if "lora_edge" in equal.names else 0
    return [
        "## Every method at equal trained count",
        paragraph(
            f"""Each method has the rank at which its trained count, and so its adapter's bytes, is nearest to LoRA-Edge's
            {own:,}, {STEPS} steps, one seed, axes turned in both protocols. A method's rate is its own: the best of
            {len(RATE_FACTORS)} for two new users (A), which are among the ten, found once and then kept. BatchNorm is what each
            method leaves it at. Sorted by the mean F1 of both protocols."""
        ),
        f"![{EQUAL_TEXT}](methods.png)",
        equal_table(equal),
    ]


def _how() -> str:
    """What was done, with the figures of the code that does it."""
    turns, own = len(frame.turns(["ax", "ay", "az"])), methods()["lora_edge"]
    return f"""Each person is left out once: the others pre-train the model, the person's first windows adapt it in {STEPS}
    steps of Adam at batch {BATCH}, the last ones test it. A searched rate is the best of {len(RATE_FACTORS)} on
    {len(SEARCH_PEOPLE[0])} other people; "no search" is LoRA-Edge at its own rate, {own.lr:g}: those are the defaults.
    `runs` are people times seeds; a method with fewer runs than others had fewer seeds. `s to 95 %` is the time, set-up
    included, to 95 % of the F1 that full fine-tuning reaches. ± is always the 95 % interval. Full fine-tuning, BN only and
    "BN in batch mode" move BatchNorm's statistics as they train; LoRA-Edge moves them once before, to the target's, with
    the source's counted as {SOURCE_SAMPLES} more windows. Only "LoRA-Edge" and methods called "axes turned" have their axes
    turned: of the {turns} ways to lay three axes along three, {frame.SAMPLES} labelled windows choose one by the source
    model's cross-entropy."""


def _cost(a: StudyRows, b: StudyRows) -> str:
    """Bytes and time on the watch data, and the untouched model."""
    own, full, batch = (b.found[name] for name in (DEFAULTS, "full", BATCH_MODE[b.name]))
    assert own.step_over_full is not None
    assert batch.step_over_full is not None
    there = a.found["full"].steps == 0
    return f"""On the other wrist LoRA-Edge's defaults save {own.saved_bytes / 1e6:.2f} MB for backward, full fine-tuning
    {full.saved_bytes / 1e6:.2f} MB; a step takes {own.step_over_full:.2f} of full fine-tuning's time, in batch mode
    {batch.step_over_full:.2f}, with {batch.saved_bytes / own.saved_bytes:.0f} times the saved bytes of the defaults. The
    untouched model's macro-F1 is {b.found["zero_shot"].mean:.3f} there. For a new user it is
    {a.found["zero_shot"].mean:.3f}, and in {there.sum()} of {len(there)} runs it is at the target before any training: the
    median of the times leaves these runs out, the ratio in total includes them."""


def readme_part(studies: Mapping[str, StudyRows]) -> str:
    """The README's table of results, and its picture."""
    _check_needed(studies)
    both = [studies[name] for name in WATCH]
    lines = []
    for title, names in HEADLINE:
        found = [study.found[name] for study, name in zip(both, names, strict=True)]
        cells = [title, f"{found[1].trainable:,}", f"{found[1].saved_bytes / 1e6:.2f} MB"]
        for study, summary in zip(both, found, strict=True):
            full = study.found["full"]
            cells += [f"{summary.mean:.3f}", "-" if summary is full else signed(*summary.points(full))]
        lines.append(cells)
    head = ("", "trained", "stored for backward", "A: macro-F1", "minus full, points", "B: macro-F1", "minus full, points")
    people, seeds = (len(both[1].found["full"].f1.index.unique(level)) for level in ("person", "seed"))
    text = f"""A: a new user; B: a new user's other wrist; T-ResNet, {people} people of the watch data left out in turn,
    {seeds} seeds. Trained parameters and bytes are those of B; ± is the 95 % interval, paired by person. LoRA-Edge has
    rank 2. The defaults and batch mode use the library's learning rate, {methods()["lora_edge"].lr:g}; every other row uses
    the best of {len(RATE_FACTORS)} rates, found on {len(SEARCH_PEOPLE[0])} other people. The defaults first align the
    target's sensor axes with the source's ([turned axes](docs/har.md#turned-axes)); so does batch mode in B.
    [All results](docs/results.md)."""
    return "\n\n".join((f"![{PICTURE_TEXT}](docs/study.png)", table(head, lines), paragraph(text)))


def _check_needed(studies: Mapping[str, StudyRows]) -> None:
    missing = [f"study_{name}.csv" for name in WATCH if name not in studies]
    if missing:
        raise ValueError(f"the page needs the rows of {' and '.join(missing)}; give these files too")
