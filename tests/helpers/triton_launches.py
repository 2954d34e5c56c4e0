"""Run launches of the case matrix (kernel_cases.py) on the Triton kernels: interpreted on the CPU, or on a CUDA device."""

# Argument lists are spliced into calls here, and mypy does not know their lengths.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import torch
from torch import Tensor

from helpers.kernel_cases import Launch
from lora_edge.ops.engines.triton.kernels import dora_fuse, tt_block, tt_fuse
from lora_edge.ops.engines.triton.kernels.calls import Backward, Forward
from lora_edge.ops.engines.triton.plan import Plan

DORA = ("weight", "core", "suffix", "magnitude")


def run(launch: Launch, device: str) -> dict[str, Tensor]:
    """The launch's outputs, which were poisoned with NaN or set bits first."""
    plan = Plan(**launch.fields)
    assert plan.refusal(launch.op.removesuffix("_forward").removesuffix("_backward")) is None
    t = {
        name: _alike(value, device).copy_(value) if _fills(value) else value.to(device) for name, value in launch.inputs.items()
    }
    out = {name: _poisoned(value, device) for name, value in launch.outputs.items()}
    factors = [t[name] for name in ("suffix", "core2", "core3", "core4") if name in t]
    if launch.op == "tt_fuse_forward":
        tt_fuse.forward(plan, t["weight"], t["core"], factors, out["out"])
    elif launch.op == "tt_fuse_backward":
        tt_fuse.backward(plan, t["dout"], factors, out["dcore"])
    elif launch.op == "dora_fuse_forward":
        dora_fuse.forward(plan, *(t[name] for name in DORA), out["out"], out["norms"])
    elif launch.op == "dora_fuse_backward":
        gradients = map(out.get, ("dcore", "dsuffix", "dmagnitude"))
        dora_fuse.backward(plan, t["dout"], *(t[name] for name in DORA), t["norms"], *gradients)
    elif launch.op == "tt_block_forward":
        names = ("bias", "affine_scale", "affine_shift", "residual", "residual_scale", "residual_shift")
        call = Forward(t["x"], *map(t.get, names), out["y"], out.get("h"), out.get("bits"))
        tt_block.forward(plan, t["weight"], t.get("core"), factors, call)
    else:
        names = ("h", "bits", "affine_scale", "residual_scale")
        gradients = map(out.get, ("dx", "dresidual", "dcore", "dbias"))
        tt_block.backward(plan, t["weight"], t.get("core"), factors, Backward(t["dy"], *map(t.get, names), *gradients))
    return {name: value.cpu() for name, value in out.items()}


def _fills(value: Tensor) -> bool:
    """Whether no two elements share memory, so that a copy can have the same strides and distance from alignment."""
    return all(stride > 0 or size == 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def _alike(value: Tensor, device: str) -> Tensor:
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    storage = torch.empty(value.storage_offset() + span, dtype=value.dtype, device=device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def _poisoned(value: Tensor, device: str) -> Tensor:
    return _alike(value, device).fill_(float("nan") if value.is_floating_point() else 255)
