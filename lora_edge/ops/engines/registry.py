"""The engines: sets of kernels for the same calls, ``cuda`` and ``cpu`` (the compiled extension) and ``triton``.

They share the checks, the rule of what is taken, the plans, autograd and the operators of torch. An engine is a module with
:class:`Engine`'s functions, imported when it is first asked for, and a word on whether it works on a machine.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from lora_edge.environment.torch_private import constant_when_traced
from lora_edge.ops.engines.cpu import available as cpu_machine
from lora_edge.ops.engines.cuda import available as extension
from lora_edge.ops.engines.triton import available as triton_machine

if TYPE_CHECKING:
    from lora_edge.ops.plan import BlockPlan, FusePlan

ENGINES = ("cuda", "triton", "cpu")  # "auto" takes the first that works
_MACHINES = {"cuda": extension, "triton": triton_machine, "cpu": cpu_machine}
_LAUNCHES = {
    "cuda": "lora_edge.ops.engines.cuda.launch",
    "triton": "lora_edge.ops.engines.triton.launch",
    "cpu": "lora_edge.ops.engines.cpu.launch",
}


class Engine(Protocol):
    """What a set of kernels offers. Outputs and scratch come from torch's allocator; nothing waits for the device."""

    def __hash__(self) -> int:
        """Plans are cached by it; a module has one."""

    def plan_type(self) -> Any:
        """A class of plans, ``Plan(**fields)`` of csrc/problem.h, with ``refusal(op)`` and ``scratch()``, on this machine."""

    def block_forward(
        self,
        plan: BlockPlan,
        x: Tensor,
        weight: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        factors: Sequence[Tensor],
        a: Tensor | None,
        b: Tensor | None,
        residual_a: Tensor | None,
        residual_b: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``y``, and what backward needs as one buffer of bytes, None where it needs nothing."""

    def block_backward(
        self,
        plan: BlockPlan,
        dy: Tensor,
        saved: Tensor | None,
        weight: Tensor,
        core: Tensor | None,
        factors: Sequence[Tensor],
        a: Tensor | None,
        residual_a: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, core, bias and residual, each None where ``needs`` says so. ``dy`` may have any strides."""

    def fuse_forward(self, plan: FusePlan, weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """``W + scale * B S``, dense."""

    def fuse_backward(self, plan: FusePlan, dout: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """``scale * dW' S^T``, the gradient of the core."""


@functools.cache
def engine(name: str) -> Engine:
    """The engine's module."""
    return cast(Engine, importlib.import_module(_LAUNCHES[name]))


@constant_when_traced
def reason(name: str, device: torch.device | None = None) -> str | None:
    """Why an engine's kernels do not run here (on this device), None where they do."""
    return _MACHINES[name].reason(device)


def device_type(name: str) -> str:
    """Type of the devices whose tensors an engine that works takes."""
    return _MACHINES[name].device_type()


@constant_when_traced
def chosen(backend: str, device: torch.device) -> str:
    """The engine that a backend stands for: under "auto" the first that works on the device, else the first."""
    if backend != "auto":
        return backend
    return next((name for name in ENGINES if reason(name, device) is None), ENGINES[0])
