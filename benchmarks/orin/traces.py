"""What the kernels do on a layer, from the emulator: the launches of an op, and what chosen blocks ask of the machine."""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers import Layer
from .l2 import Touches
from .sass import short_name

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "half": torch.float16}
LAYOUTS = {"channels-last": torch.channels_last, "channels-first": torch.contiguous_format}
_BARRIER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Block:
    """What one block did: counts by the names of csrc/emulator/trace.h, and the sectors that it touched."""

    index: int
    counts: dict[str, float]
    touches: Touches


@dataclass(frozen=True)
class TracedLaunch:
    """One launch with the blocks that were traced."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    traced: tuple[Block, ...]
    tensors: tuple[str, ...]  # by the numbers of Touches.tensor; the last one is any other memory


@functools.cache
def emulator() -> ModuleType:
    """``tests/helpers/emulator.py`` of the clone."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    return importlib.import_module("helpers.emulator")


@functools.cache
def runner() -> Path:
    """The emulator with the kernels, compiled where something changed."""
    return emulator().build(sanitize=False)


def traced_launches(
    layer: Layer, op: str, precision: str, layout: str, samples: int, choose: Callable[[dict[str, Any]], Iterable[int]]
) -> list[TracedLaunch]:
    """The launches of an op.

    Args:
        layer: the sizes.
        op: "tt_fuse_forward", "tt_fuse_backward", "tt_block_forward" or "tt_block_backward".
        precision: "fp32", "tf32" or "half".
        layout: of the maps, "channels-last" or "channels-first".
        samples: the maps hold only these first samples; the chosen blocks touch no others.
        choose: gives the blocks to trace of a launch, a dict with "launch", "kernel", "blocks", "threads" and "shared_bytes".
    """
    job = _job(layer, op, precision, layout, samples)
    with tempfile.TemporaryDirectory() as folder:
        trace = emulator().trace(job, choose, Path(folder), runner())
        records = np.fromfile(trace.sectors, dtype="<u8")
    tensors = (*trace.buffers, "other")
    launches, at = [], 0
    for launch in trace.launches:
        blocks = []
        for row in trace.blocks:
            if row["launch"] == launch["launch"]:
                blocks.append(Block(row["block"], _counts(row), _touches(records[at : at + row["sectors"]], len(tensors))))
                at += row["sectors"]
        kernel = short_name(launch["kernel"])
        launches.append(
            TracedLaunch(kernel, launch["blocks"], launch["threads"], launch["shared_bytes"], tuple(blocks), tensors)
        )
    return launches


def _counts(row: dict[str, Any]) -> dict[str, float]:
    if "read_global_bytes" not in row:
        raise RuntimeError(f"the emulator's trace has {sorted(row)}; it must count read_global_bytes and its like")
    counts = {name: float(value) for name, value in row.items() if isinstance(value, int)}
    return {**counts, "mma": counts["mma_tf32"] + counts["mma_f16"] + counts["mma_bf16"]}


def _touches(records: NDArray[np.uint64], tensors: int) -> Touches:
    records = records[records != _BARRIER]
    tensor = np.minimum(records >> np.uint64(56), np.uint64(tensors - 1)).astype(np.int32)
    written = (records >> np.uint64(55) & np.uint64(1)).astype(bool)
    sector = (records & np.uint64(2**55 - 1)).astype(np.int64)
    # tensors lie far apart, so that moving one never reaches another
    return Touches(sector + (tensor.astype(np.int64) << 34), written, tensor)


def _job(layer: Layer, op: str, precision: str, layout: str, samples: int) -> Any:
    dtype = DTYPES[precision]
    new_job = functools.partial(emulator().Job, op, op, seeds=1)

    def map_of(channels: int, size: tuple[int, int]) -> Tensor:
        return torch.zeros(samples, channels, *size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])

    def vector() -> Tensor:
        return torch.zeros(layer.outputs, dtype=dtype)

    fields = emulator().problem(
        batch=layer.batch, channels=layer.channels, outputs=layer.outputs, size=layer.in_size, kernel=layer.kernel,
        groups=layer.groups, rank=layer.rank, stride=layer.stride, padding=layer.pad, padding_end=_padding_end(layer),
        dilation=layer.dilation, dtype=dtype, precision=precision,
        activation=None if layer.activation is None else "relu" if layer.activation == "relu" else "clamp", high=6.0,
    )  # fmt: skip
    inner = layer.channels // layer.groups
    inputs: dict[str, Tensor] = {"weight": torch.zeros(layer.outputs, inner, *layer.kernel, dtype=dtype)}
    if layer.rank:
        inputs["core"] = torch.zeros(layer.outputs, layer.rank, dtype=dtype)
        inputs["suffix"] = torch.zeros(layer.rank, inner, *layer.kernel, dtype=dtype)
    if op == "tt_fuse_forward":
        return new_job(fields, inputs, {"out": inputs["weight"]})
    if op == "tt_fuse_backward":
        weight, core = inputs.pop("weight"), inputs.pop("core")
        return new_job(fields, inputs | {"dout": weight}, {"dcore": core}, ("partial",))

    h = torch.zeros(samples, *layer.out_size, layer.groups * layer.rank, dtype=dtype) if layer.rank else None
    bits = torch.zeros(samples, *layer.out_size, layer.octets, dtype=torch.uint8) if layer.has_bits else None
    x, y = map_of(layer.channels, layer.in_size), map_of(layer.outputs, layer.out_size)
    residual = y if layer.has_residual else None
    scale = vector() if layer.has_affine else None
    residual_scale = vector() if layer.has_residual_affine else None
    if op == "tt_block_forward":
        more = {
            "x": x, "bias": vector() if layer.has_bias else None, "affine_scale": scale, "affine_shift": scale,
            "residual": residual, "residual_scale": residual_scale, "residual_shift": residual_scale,
        }  # fmt: skip
        return new_job(fields, inputs | _given(more), _given({"y": y, "h": h, "bits": bits}), ("packed",))
    more = {"dy": y, "h": h, "bits": bits, "affine_scale": scale, "residual_scale": residual_scale}
    outputs = {
        "dx": x if layer.needs_dx else None,
        "dcore": inputs.get("core"),
        "dresidual": y if layer.needs_dresidual else None,
    }
    return new_job(fields, inputs | _given(more), _given(outputs), ("packed", "partial"))


def _given(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _padding_end(layer: Layer) -> tuple[int, ...]:
    """Zeros behind the input, which are fewer than none where the last positions are not reached."""
    return tuple(
        (out - 1) * stride + dilation * (kernel - 1) + 1 - size - pad
        for out, stride, dilation, kernel, size, pad in zip(
            layer.out_size, layer.stride, layer.dilation, layer.kernel, layer.in_size, layer.pad, strict=True
        )
    )
