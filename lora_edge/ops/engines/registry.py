"""The engines by name: which work here, which one runs a call, and their modules (:mod:`lora_edge.ops.engines.protocol`)."""

from __future__ import annotations

import functools
import importlib
from typing import cast

import torch

from lora_edge.environment.torch_private import constant_when_traced
from lora_edge.ops.engines.protocol import Available, Engine

WITH_KERNELS = ("cuda", "triton", "cpu")  # "auto" chooses the first that works
TORCH = "torch"  # supports every call, so it comes last
ENGINES = (*WITH_KERNELS, TORCH)

_AVAILABLE = {name: cast(Available, importlib.import_module(f"lora_edge.ops.engines.{name}.available")) for name in ENGINES}
_LEAVING = {name: module for name, module in _AVAILABLE.items() if hasattr(module, "leaves")}


@functools.cache
def engine(name: str) -> Engine:
    """The launch module of an engine with kernels, imported at the first call."""
    return cast(Engine, importlib.import_module(f"lora_edge.ops.engines.{name}.launch"))


@constant_when_traced
def reason(name: str, device: torch.device | None = None) -> str | None:
    """Why an engine does not run here (on this device), None where it does."""
    return _AVAILABLE[name].reason(device)


@constant_when_traced
def leaves(name: str, op: str, by_name: bool, traced: bool) -> str | None:
    """Why an engine leaves an op to torch whatever its sizes, None where it does not."""
    return _LEAVING[name].leaves(op, by_name, traced) if name in _LEAVING else None


def device_type(name: str) -> str:
    """Type of the devices whose tensors an engine supports, where it works."""
    return _AVAILABLE[name].device_type()


@constant_when_traced
def chosen(backend: str, device: torch.device, op: str = "tt_block", traced: bool = False) -> str:
    """The engine that a backend stands for: under "auto" the first that works on the device and has the op."""
    if backend != "auto":
        return backend
    for name in WITH_KERNELS:
        if _AVAILABLE[name].reason(device) is None and (
            name not in _LEAVING or _LEAVING[name].leaves(op, False, traced) is None
        ):
            return name
    return TORCH
