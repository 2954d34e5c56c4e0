"""The study's pictures: six methods by name with their saved bytes, and every method at equal trained count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .comparisons import DEFAULTS
from .equal import OWN, TITLES, Equal
from .studies import StudyRows
from .summary import title_of

PANELS = {"watch_A": "A new user", "watch_B": "A new user's other wrist"}
NAMES = {  # from the top
    "full": "full fine-tuning",
    DEFAULTS: "LoRA-Edge",
    "dora, rank 1": "DoRA",
    "conv_lora, rank 1": "conv LoRA",
    "bn_only": "BN only",
    "head_only": "head only",
}
GREY, RED, BLUE = "#555555", "#d1495b", "#2e6f95"  # full fine-tuning, LoRA-Edge, the others
COLOURS = {"full": GREY, DEFAULTS: RED, OWN: RED}


def _pyplot(font_size: int) -> Any:
    """Return ``matplotlib.pyplot`` without a display, in the pictures' style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": font_size, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw(studies: Mapping[str, StudyRows], path: Path) -> None:
    """Write the PNG: a line per method, a panel per protocol, and one of the bytes saved for backward."""
    plt = _pyplot(11)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), sharey=True, width_ratios=(4, 4, 2.4), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS.items(), strict=False):
        _points(axis, studies[name])
        axis.set_title(title, fontweight="bold")
        axis.set_xlabel("points of macro-F1 beside full fine-tuning (95 %)")
    axes[0].sharex(axes[1])
    _bytes(axes[2], studies["watch_B"])
    found = studies["watch_B"].found
    labels = [f"{title}\n{found[name].trainable:,} trained" for name, title in NAMES.items()]
    axes[0].set_yticks(range(len(NAMES)), labels)
    axes[0].set_ylim(len(NAMES) - 0.4, -0.6)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    for label, name in zip(axes[0].get_yticklabels(), NAMES, strict=True):
        label.set_color(COLOURS.get(name, BLUE))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _points(axis: Any, study: StudyRows) -> None:
    """Each method's difference to full fine-tuning with its interval, and its F1."""
    full = study.found["full"]
    axis.axvline(0, color=COLOURS["full"], linewidth=1)
    axis.grid(axis="x", alpha=0.25)
    for place, name in enumerate(NAMES):
        summary, colour = study.found[name], COLOURS.get(name, BLUE)
        middle, half = (0.0, 0.0) if name == "full" else summary.points(full)
        axis.errorbar(middle, place, xerr=half or None, fmt="o", color=colour, markersize=8, capsize=4, linewidth=2)
        axis.annotate(
            f"{summary.mean:.3f}", (middle, place), (0, 8), textcoords="offset points", ha="center", color=colour,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}, zorder=3,
        )  # fmt: skip


def _bytes(axis: Any, study: StudyRows) -> None:
    """Each method's bytes saved for backward as a bar with its figure."""
    for place, name in enumerate(NAMES):
        megabytes, colour = study.found[name].saved_bytes / 1e6, COLOURS.get(name, BLUE)
        axis.barh(place, megabytes, height=0.45, color=colour)
        axis.annotate(f"{megabytes:.2f}", (megabytes, place), (4, 0), textcoords="offset points", va="center", color=colour)
    axis.set_title("Saved for backward", fontweight="bold")
    axis.set_xlabel("MB at batch 64")
    axis.set_xlim(0, 80)


def draw_equal(equal: Equal, path: Path) -> None:
    """Write the PNG: each method's points beside LoRA-Edge with their 95 % intervals, a panel per protocol."""
    plt, names = _pyplot(10), equal.names
    size = (11, 1.2 + 0.24 * len(names))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for place, (axis, title) in enumerate(zip(axes, TITLES, strict=True)):
        axis.axvline(0, color=RED, linewidth=1)
        axis.grid(axis="x", alpha=0.25)
        for line, name in enumerate(names):
            middle, half = (0.0, 0.0) if name == OWN else equal.minus(name, OWN)[place]
            colour = COLOURS.get(name, BLUE)
            axis.errorbar(middle, line, xerr=half or None, fmt="o", color=colour, markersize=5, capsize=2, linewidth=1.5)
        axis.set_title(title, fontweight="bold")
        axis.set_xlabel("points of macro-F1 beside LoRA-Edge (95 %)")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(names)), [f"{title_of(name)} ({int(equal.row(name)['trainable']):,})" for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
