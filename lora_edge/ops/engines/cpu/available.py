"""The CPU engine on this machine: whether the compiled extension is there."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from lora_edge.environment.extension import load
from lora_edge.environment.extension import reason as _extension_reason


class Machine(NamedTuple):
    """What a run needs to know.

    Attributes:
        module: the extension.
        device_type: type of the devices whose tensors it takes.
    """

    module: Any
    device_type: str


@functools.cache
def machine() -> Machine | str:
    """The machine, or the reason why the engine does not work on it."""
    return _extension_reason() or Machine(load(), "cpu")


def reason(device: torch.device | None = None) -> str | None:
    """Why the engine does not run here (on this device), None where it does."""
    found = machine()
    if isinstance(found, str):
        return found
    if device is None or device.type == found.device_type:
        return None
    return f"its tensors are on {device}; the engine takes tensors on {found.device_type}"


def device_type() -> str:
    """Type of the devices whose tensors the engine takes, where it works."""
    found = machine()
    assert not isinstance(found, str)
    return found.device_type
