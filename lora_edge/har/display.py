"""Show a report: the table in the terminal and the picture of F1 against time."""

from __future__ import annotations

from pathlib import Path

from lora_edge.environment.extras import require
from lora_edge.files.output import whole_file
from lora_edge.har.report import Report


def print_table(report: Report) -> None:
    """Print the table of a run, with the rows' remarks below it."""
    require("the table")
    from rich.console import Console
    from rich.table import Table

    target = "-" if report.target_f1 is None else f"{report.target_f1:.3f}"
    table = Table(title=_title(report))
    for column in ("method", "macro-F1", "trainable", "share", "saved for backward", f"seconds to F1 {target}"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in report.rows:
        if row.f1 is None:
            cells = ["-"] * 5
        elif row.curve is None:
            cells = [f"{row.f1:.3f}", "0", "-", "-", "-"]
        else:
            to_target = "not reached" if row.seconds_to_target is None else f"{row.seconds_to_target:.2f}"
            saved = f"{(row.saved_bytes or 0) / 1e6:.2f} MB"
            cells = [f"{row.f1:.3f}", f"{row.trainable:,}", f"{row.share_percent:.2f} %", saved, to_target]
        table.add_row(row.title, *cells)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    for row in report.rows:
        if row.remark is not None:
            why = row.remark.removeprefix(f"{row.title}: ")
            console.print(f"{row.title}{' does not apply' if row.f1 is None else ''}: {why}", markup=False)
    if any(row.name == "mirrored" for row in report.rows):
        console.print(
            "Mirrored input: the left wrist is mostly a mirror image of the right, so negating (ax, wy, wz) alone recovers "
            "much of the loss. It uses knowledge that the other methods are not given."
        )
    if any(row.name == "full_turned" for row in report.rows):
        axes = " ".join(report.row("lora_edge").axes or [])
        console.print(f"Axes turned: LoRA-Edge found that {axes} minimises the source model's cross-entropy.")


def draw(report: Report, path: Path) -> None:
    """Write a PNG of macro-F1 on the test windows against seconds of set-up and training, one line per method."""
    require("the picture")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colours = plt.get_cmap("tab10")
    for k, row in enumerate(report.rows):
        if row.f1 is None:
            continue
        if row.curve is None:
            axes.axhline(
                row.f1, color="0.55", linestyle=":" if row.name == "zero_shot" else "-.", linewidth=1.2, label=row.title
            )
        else:
            emphasis = row.name == report.settings["method"]
            axes.plot(
                row.curve.seconds, row.curve.f1, color=colours(k % 10), linewidth=2.6 if emphasis else 1.5,
                marker="o", markersize=3.5, label=f"{row.title} ({row.trainable:,} parameters)", zorder=3 if emphasis else 2,
            )  # fmt: skip
    if report.target_f1 is not None:
        axes.axhline(report.target_f1, color="0.2", linestyle="--", linewidth=0.9, label="95 % of full fine-tuning")
    axes.set(
        xlabel="seconds of set-up and training", ylabel="macro-F1 on the test windows", ylim=(0, 1.02), title=_title(report)
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)
    finally:
        plt.close(figure)


def _title(report: Report) -> str:
    s, w = report.settings, report.windows
    return (
        f"person {s['target_subject']}, protocol {s['protocol']}: adapted on {w['adapt']} windows, tested on {w['test']} "
        f"(rank {s['rank']}, {s['steps']} steps)"
    )
