"""The generated part of docs/methods.md: sources from the methods' files, and the papers' claims beside what was measured."""

from __future__ import annotations

import re

from lora_edge.methods import methods_by_file

from ..markdown import table
from .equal import Equal, claims_table
from .text import paragraph


def sources_table() -> str:
    """A row per file of methods that names its source: the paragraph of its docstring from there on."""
    lines = []
    for module, of_file in methods_by_file():
        text = (module.__doc__ or "").partition("Source: ")[2].partition("\n\n")[0]
        if text:
            lines.append([", ".join(f"`{method.name}`" for method in of_file), _markdown(text)])
    return table(("method", "source, what was read there and what is inferred"), lines)


def _markdown(docstring: str) -> str:
    """Docstring text on one line, with Markdown's code marks (but for other people's files) and links to arXiv."""
    text = " ".join(docstring.split()).replace("``", "`").replace("|", "\\|")
    text = re.sub(r":\w+:`[~.]?([^`]+)`", r"`\1`", text)
    text = re.sub(r"`([\w./]+\.py|[\w./]+/[\w./]+)`", r"\1", text)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def methods_part(equal: Equal) -> str:
    """The text between the marks of docs/methods.md."""
    return "\n\n".join(
        (
            "## Where they come from",
            sources_table(),
            "## What their papers claim",
            paragraph(
                """Restated for this task, and compared at equal trained count on the watch data
                ([the table](results.md#every-method-at-equal-trained-count)), in points of macro-F1 with 95 % intervals, paired
                by person, for a new user (A) and the other wrist (B). Confirmed: in both the whole interval is at or above what
                the claim asks for. Not confirmed: in one of them the whole interval is below it."""
            ),
            claims_table(equal),
        )
    )
