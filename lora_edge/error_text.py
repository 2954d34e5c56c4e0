"""An exception's message in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of the message, without a KeyError's quotes; the class name if there is no message."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def in_words(error: BaseException) -> str:
    """Return :func:`first_line`, after the class name unless it is an exception whose message is clear without it."""
    line = first_line(error)
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) or line == type(error).__name__:
        return line
    return f"{type(error).__name__}: {line}"
