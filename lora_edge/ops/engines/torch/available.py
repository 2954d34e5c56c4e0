"""The engine in plain torch: it works wherever torch does, on every device."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Runtime(NamedTuple):
    """What a call needs of the machine.

    Attributes:
        device_type: the fastest device of torch here; the engine supports tensors on any.
    """

    device_type: str


def runtime() -> Runtime:
    """The runtime; the engine always works."""
    return Runtime("cuda" if torch.cuda.is_available() else "cpu")


def reason(device: torch.device | None = None) -> str | None:
    """None: the engine runs on every device."""
    return None


def device_type() -> str:
    """Type of the fastest device of torch here."""
    return runtime().device_type
