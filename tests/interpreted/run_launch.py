"""Runs a launch of the case matrix (tests/kernel_cases.py) by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_cases import Launch
from lora_edge.ops.triton_kernels import tt_block, tt_fuse
from lora_edge.ops.triton_kernels.calls import Backward, Forward
from lora_edge.ops.triton_plan import Plan


def poisoned(value: Tensor, device: str) -> Tensor:
    """An output of the same strides that holds what no kernel may leave there: NaN, or all bits set."""
    storage = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype, device=device)
    storage.fill_(float("nan") if value.is_floating_point() else 255)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def run(launch: Launch, device: str = "cpu") -> dict[str, Tensor]:
    """The launch's outputs."""
    plan = Plan(**launch.fields)
    assert plan.refusal("tt_fuse" if "fuse" in launch.op else "tt_block") is None
    t = {name: value.to(device) for name, value in launch.inputs.items()}
    out = {name: poisoned(value, device) for name, value in launch.outputs.items()}
    factors = [t[name] for name in ("suffix", "core2", "core3", "core4") if name in t]
    if launch.op == "tt_fuse_forward":
        tt_fuse.forward(plan, t["weight"], t["core"], factors, out["out"])
    elif launch.op == "tt_fuse_backward":
        tt_fuse.backward(plan, t["dout"], factors, out["dcore"])
    elif launch.op == "tt_block_forward":
        names = ("bias", "affine_scale", "affine_shift", "residual", "residual_scale", "residual_shift")
        call = Forward(t["x"], *map(t.get, names), out["y"], out.get("h"), out.get("bits"))
        tt_block.forward(plan, t["weight"], t.get("core"), factors, call)
    else:
        names = ("h", "bits", "affine_scale", "residual_scale")
        gradients = map(out.get, ("dx", "dresidual", "dcore", "dbias"))
        tt_block.backward(plan, t["weight"], t.get("core"), factors, Backward(t["dy"], *map(t.get, names), *gradients))
    return {name: value.cpu() for name, value in out.items()}
