"""Triton on this machine: whether its kernels work, and if not, why. The first call imports triton.

A wheel can be imported without a driver, so a small launch decides.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import NamedTuple

import torch

OLDEST = (3, 5)  # the first in which a product may be 8 columns wide
OLDEST_CAPABILITY = (8, 0)  # bfloat16 and TF32
DEVICE_TYPE = "cuda"  # whose tensors the kernels support; the tests put "cpu" here, for the interpreter


class Runtime(NamedTuple):
    """What a launch needs of the machine.

    Attributes:
        device_type: type of the devices whose tensors the kernels support.
    """

    device_type: str


@functools.cache
def runtime() -> Runtime | str:
    """The runtime, or the reason why Triton's kernels do not work here, such as "missing: ..."."""
    if importlib.util.find_spec("triton") is None:
        return "missing: pip install triton, or lora_edge[triton]"
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken wheel raises whatever its own imports do
        return f"not loadable: {_first_line(error)}"
    if _numbers(version) < OLDEST:
        return f"too old: {version}; the kernels need {'.'.join(map(str, OLDEST))} or newer"
    if not torch.cuda.is_available() or torch.cuda.device_count() == 0:
        return "without an active driver: torch finds no CUDA device"
    reasons = [_not_covered(index) for index in range(torch.cuda.device_count())]
    if all(reasons):
        return str(reasons[0])
    try:
        _probe(torch.device("cuda", reasons.index(None)))
    except Exception as error:  # compilers, linkers and drivers that are missing or broken, each with an exception of its own
        return f"not usable: a first launch failed: {_first_line(error)}"
    return Runtime(DEVICE_TYPE)


def device_type() -> str:
    """Type of the devices whose tensors the kernels support."""
    return DEVICE_TYPE


def reason(device: torch.device | None = None) -> str | None:
    """Why Triton's kernels do not run here (on this device), None where they do; triton is not imported for another device."""
    if device is not None and device.type != DEVICE_TYPE:
        return f"its tensors are on {device}; the kernels support tensors on {DEVICE_TYPE}"
    found = runtime()
    if isinstance(found, str):
        return found
    return None if device is None or device.type != "cuda" else _not_covered(device.index)


@functools.cache
def _not_covered(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    name, have, need = torch.cuda.get_device_name(index), *(".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"not for this device: {name} has capability {have}; the kernels need {need} or newer"


def _probe(device: torch.device) -> None:
    from lora_edge.ops.engines.triton.kernels.probe import doubled

    got = doubled(torch.arange(8, dtype=torch.float32, device=device)).tolist()
    if got != [2.0 * i for i in range(8)]:
        raise RuntimeError(f"twice 0 to 7 came out as {got}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
