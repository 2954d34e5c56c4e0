"""The CPU engine on this machine: whether the compiled extension is there."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from lora_edge.environment.extension import load
from lora_edge.environment.extension import reason as _extension_reason


class Runtime(NamedTuple):
    """What a call needs of the machine.

    Attributes:
        module: the extension.
        device_type: type of the devices whose tensors it supports.
    """

    module: Any
    device_type: str


@functools.cache
def runtime() -> Runtime | str:
    """The runtime, or the reason why the engine does not work here."""
    return _extension_reason() or Runtime(load(), "cpu")


def reason(device: torch.device | None = None) -> str | None:
    """Why the engine does not run here (on this device), None where it does."""
    found = runtime()
    if isinstance(found, str):
        return found
    if device is None or device.type == found.device_type:
        return None
    return f"its tensors are on {device}; the engine supports tensors on {found.device_type}"


def device_type() -> str:
    """Type of the devices whose tensors the engine supports, where it works."""
    found = runtime()
    assert not isinstance(found, str)
    return found.device_type


def leaves(op: str, by_name: bool, traced: bool) -> str | None:
    """Why the engine leaves an op to torch whatever its sizes, None where it does not."""
    if op in ("tt_fuse", "dora_fuse"):
        return f"{op} by itself, which torch does at the memory's rate"
    if traced:
        return "it is traced by torch.compile; the CPU engine runs in eager mode"
    if op == "tt_conv" and not by_name:
        return "a convolution by itself, which on torch is bit-identical to the stock layer"
    return None
