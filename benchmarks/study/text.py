"""Paragraphs of generated pages, and the marks between which a page's generated part stands."""

from __future__ import annotations

import textwrap

MARKS = ("<!-- results -->", "<!-- /results -->")


def paragraph(text: str) -> str:
    """Text on lines of at most 128 characters."""
    return textwrap.fill(" ".join(text.split()), 128, break_long_words=False, break_on_hyphens=False)


def replace_between_marks(page: str, text: str) -> str:
    """The page with ``text`` between its two marks.

    Raises:
        ValueError: the page does not have both marks once each.
    """
    begin, end = MARKS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    return f"{page[: page.index(begin)]}{begin}\n\n{text}\n\n{page[page.index(end) :]}"
