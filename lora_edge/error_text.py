"""What an exception says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line that is not blank, without the quotes of a KeyError; the exception's class where it says nothing."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def in_words(error: BaseException) -> str:
    """:func:`first_line`, after the class where the exception is not of a kind whose text stands for itself."""
    line = first_line(error)
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) or line == type(error).__name__:
        return line
    return f"{type(error).__name__}: {line}"
