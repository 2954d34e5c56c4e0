"""The CUDA engine on this machine: whether the compiled extension works, and if not, why. The first call imports ``_C``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lora_edge.environment.extension import load
from lora_edge.environment.extension import reason as _extension_reason
from lora_edge.environment.torch_private import constant_when_traced, current_stream_reader


class Runtime(NamedTuple):
    """What a launch needs of the machine. The tests put the emulator and CPU tensors here.

    Attributes:
        module: the extension.
        device_type: type of the devices whose tensors it supports.
        stream: address of the current stream of a device, by the device's index.
    """

    module: Any
    device_type: str
    stream: Callable[[int], int]


@functools.cache
def runtime() -> Runtime | str:
    """The runtime, or the reason why the extension does not work here, such as "not built: ..."."""
    why = _extension_reason()
    if why is not None:
        return why
    module = load()
    if module.build_info()["cuda"] is None:
        return "built without CUDA: put nvcc on PATH and install lora_edge again with LORA_EDGE_CUDA=1"
    found = module.device_info()
    if found["error"] is not None or not found["devices"]:
        return f"without a device: {found['error'] or 'the driver finds none'}"
    reasons = [_not_covered(index, module) for index in range(len(found["devices"]))]
    if all(reasons):
        return str(reasons[0])
    if not torch.cuda.is_available():
        return f"without a torch that has CUDA: this one is {torch.__version__}"
    return Runtime(module, "cuda", current_stream_reader())


def device_type() -> str:
    """Type of the devices whose tensors the kernels support, where the extension works."""
    return runtime().device_type  # type: ignore[union-attr]


@constant_when_traced
def reason(device: torch.device | None = None) -> str | None:
    """Why the extension's kernels do not run here (on this device), None where they do."""
    return _reason(runtime(), device)


@functools.cache
def _reason(found: Runtime | str, device: torch.device | None) -> str | None:
    if isinstance(found, str):
        return found
    if device is None:
        return None
    if device.type != found.device_type:
        return f"its tensors are on {device}; the kernels support tensors on {found.device_type}"
    return None if device.type != "cuda" else _not_covered(device.index, found.module)


def covers(capability: str, architectures: str) -> bool:
    """Whether a build runs on a device: machine code for its generation, not newer than it, or PTX that is not newer.

    Args:
        capability: such as "8.7".
        architectures: in the form of TORCH_CUDA_ARCH_LIST, such as "8.0;8.7+PTX"; +PTX is in addition to machine code.
    """
    device = _version(capability)
    for text, only_here, ptx in re.findall(r"(\d+\.\d+)([af]?)(\+PTX)?", architectures):
        built = _version(text)
        if built == device or (built < device and not only_here and (ptx or built[0] == device[0])):
            return True
    return False


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _not_covered(index: int, module: Any) -> str | None:
    """Why the build does not run on a device, None if it does."""
    device, architectures = module.device_info()["devices"][index], module.build_info()["architectures"]
    if covers(device["capability"], architectures):
        return None
    return (
        f"not built for this device: {device['name']} has capability {device['capability']}, the build {architectures}; "
        f"install lora_edge again with TORCH_CUDA_ARCH_LIST={device['capability']}"
    )
