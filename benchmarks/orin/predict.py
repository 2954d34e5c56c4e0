"""The predicted time of an op on a layer: its launches as the host layer runs them, scaled to the grid, on a model of Orin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.orin import orin

from ..layers import Layer
from .executed import executed, executions
from .l2 import NOTHING, dram_sectors
from .sass import Code, Resources
from .tiles import Grid, Kind, backward_grid, forward_grid
from .traces import Block, TracedLaunch, traced_launches

GEMMS = ("tt_block_forward_kernel", "tt_block_backward_kernel")
MOST_TRACED = 16  # blocks of a launch that is no GEMM
POSITIONS_TRACED = 1500  # of a depthwise layer
_MMA = {"mma_tf32": 16 * 8 * 8, "mma_f16": 16 * 8 * 16, "mma_bf16": 16 * 8 * 16}
_ITEMSIZE = {"fp32": 4, "tf32": 4, "half": 2}


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel."""

    file: str
    name: str
    code: Code
    resources: Resources


@dataclass(frozen=True)
class PredictedLaunch:
    """A launch on the machine model, and how it was launched."""

    kernel: str
    threads: int
    shared_bytes: int  # dynamic
    launch: orin.Launch

    @property
    def is_main(self) -> bool:
        """Not a launch that composes the kernel first or adds partial sums after."""
        return not self.kernel.startswith(("fuse_packed", "sum_tiles", "fuse_plain<float, float"))


@dataclass(frozen=True)
class Case:
    """One op on one layer."""

    layer: Layer
    op: str  # "tt_fuse_forward", "tt_fuse_backward", "tt_block_forward" or "tt_block_backward"
    precision: str  # "fp32", "tf32" or "half"
    layout: str  # "channels-last" or "channels-first"

    @property
    def is_fuse(self) -> bool:
        return self.op.startswith("tt_fuse")

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.precision]

    def traced_as(self) -> Case:
        """The case that makes the same launches: a depthwise op in float32 has no tensor cores to use."""
        is_alike = self.layer.is_depthwise and self.precision == "tf32"
        return dataclasses.replace(self, precision="fp32") if is_alike else self

    def floor(self, mode: orin.Mode) -> float:
        """Seconds: DESIGN, section 5."""
        itemsize = self.itemsize
        if self.is_fuse:
            return self.layer.fuse_bytes(itemsize, self.op) / mode.bandwidth
        if self.op == "tt_block_forward":
            multiply_adds, bytes_ = self.layer.multiply_adds, self.layer.forward_bytes(itemsize)
        else:
            multiply_adds, bytes_ = self.layer.backward_multiply_adds(), self.layer.backward_bytes(itemsize)
        return max(multiply_adds / mode.peak(self.precision), bytes_ / mode.bandwidth)


def predict(case: Case, kernels: Mapping[str, Kernel]) -> list[PredictedLaunch]:
    """The launches of a case.

    Args:
        case: the op.
        kernels: by their short name.
    """
    if case.layer.is_depthwise and not case.is_fuse:
        return _of_fewer_samples(case, kernels)
    backward = case.op == "tt_block_backward"
    grid = backward_grid(case.layer, case.itemsize) if backward else forward_grid(case.layer, case.itemsize, case.layout)
    chosen = [grid.index(kind.phase, kind.row, kind.column) for kind in grid.kinds()]

    def choose(launch: dict) -> list[int]:  # type: ignore[type-arg]
        is_gemm = any(name in launch["kernel"] for name in GEMMS)
        return chosen if is_gemm else list(range(min(launch["blocks"], MOST_TRACED)))

    layer = case.layer
    launches = traced_launches(layer, case.op, case.precision, case.layout, grid.traced_samples(), choose)
    found = []
    for launch in launches:
        if not launch.blocks:
            continue
        kernel = _kernel_of(launch, kernels)
        if launch.kernel.split("<")[0] in GEMMS:
            found.append(_predicted_gemm(launch, kernel, case, grid))
        else:
            found.append(_predicted(launch, kernel, launch.blocks / len(launch.traced), launch.blocks))
    return found


def _of_fewer_samples(case: Case, kernels: Mapping[str, Kernel]) -> list[PredictedLaunch]:
    """A depthwise op: all blocks of a smaller batch, scaled to the whole one."""
    layer = case.layer
    fewer = max(1, min(layer.batch, POSITIONS_TRACED // math.prod(layer.out_size)))
    some = dataclasses.replace(layer, batch=fewer)
    launches = traced_launches(some, case.op, case.precision, case.layout, fewer, lambda of: range(of["blocks"]))
    whole = traced_launches(layer, case.op, case.precision, case.layout, 1, lambda of: [])
    found = []
    for launch, of_whole in zip(launches, whole, strict=True):
        scale = layer.batch / fewer if launch.kernel.startswith("depthwise") else of_whole.blocks / launch.blocks
        found.append(_predicted(launch, _kernel_of(launch, kernels), scale, of_whole.blocks))
    return found


def _kernel_of(launch: TracedLaunch, kernels: Mapping[str, Kernel]) -> Kernel:
    if launch.kernel not in kernels:
        raise RuntimeError(f"the host layer launches {launch.kernel}, which is not among the compiled {sorted(kernels)}")
    return kernels[launch.kernel]


def _predicted(launch: TracedLaunch, kernel: Kernel, scale: float, blocks: int) -> PredictedLaunch:
    """A launch whose traced blocks are neighbours, each of which stands for ``scale`` blocks."""
    work = _work(_mean(launch.traced), launch, kernel, 0)
    totals = {name: scale * len(launch.traced) * value for name, value in work.items()}
    resident = _resident(launch, kernel)
    patterns = [block.touches for block in launch.traced]
    still = np.zeros((len(patterns), len(launch.tensors)), np.int64)
    read, written = dram_sectors(patterns, np.arange(len(patterns), dtype=np.int32), still, resident * orin.SMS)
    return _on_the_machine(launch, totals, blocks, resident, scale * (read + written), "fp32")


def _predicted_gemm(launch: TracedLaunch, kernel: Kernel, case: Case, grid: Grid) -> PredictedLaunch:
    if grid.blocks() != launch.blocks:
        raise RuntimeError(f"{launch.kernel} has {launch.blocks} blocks where benchmarks/orin/tiles.py counts {grid.blocks()}")
    multiplies = case.op == "tt_block_forward" or case.layer.needs_dx
    traced = {block.index: block for block in launch.traced}
    alike: dict[tuple[int, int], list[Kind]] = {}
    for kind in grid.kinds():
        alike.setdefault((kind.phase, kind.column), []).append(kind)
    totals: dict[str, float] = {}
    for kinds in alike.values():
        blocks = [traced[grid.index(kind.phase, kind.row, kind.column)] for kind in kinds]
        weights = [kind.blocks for kind in kinds]
        known = grid.multiply_adds(kinds[0]) if multiplies and case.precision == "fp32" else 0
        for name, value in _work(_mean(blocks, weights), launch, kernel, known).items():
            totals[name] = totals.get(name, 0.0) + sum(weights) * value
    resident = _resident(launch, kernel)
    pattern_of, shift = _moves(launch, case, grid)
    patterns = [*(b.touches for b in launch.traced), NOTHING]
    read, written = dram_sectors(patterns, pattern_of, shift, resident * orin.SMS)
    return _on_the_machine(launch, totals, launch.blocks, resident, read + written, case.precision)


def _mean(blocks: Sequence[Block], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The mean of each count."""
    return {name: float(np.average([b.counts[name] for b in blocks], weights=weights)) for name in blocks[0].counts}


def _work(block: Mapping[str, float], launch: TracedLaunch, kernel: Kernel, multiply_adds: int) -> dict[str, float]:
    """What a block with these counts does. ``multiply_adds``: by single FMAs, at least."""
    warps = launch.threads // 32
    counts = {
        name: value / (1 if name == "barriers" else warps)
        for name, value in block.items()
        if name in ("mma", "barriers", "load_matrix", "shuffle_xor") or name.endswith(("_bytes", "_wide"))
    }
    times = executions(kernel.code, counts, {"fma": multiply_adds / launch.threads})
    tensor = sum(size * block[name] for name, size in _MMA.items())
    return {
        "instructions": warps * executed(kernel.code, times),
        "multiply_adds": tensor or launch.threads * executed(kernel.code, times, "fma"),
        "l2_bytes": orin.SECTOR * (block["global_read_sectors"] + block["global_write_sectors"]),
        "l2_bytes_with_l1": orin.SECTOR * (block["global_read_distinct"] + block["global_write_sectors"]),
        "wavefronts": block["shared_wavefronts"],
    }


def _resident(launch: TracedLaunch, kernel: Kernel) -> int:
    shared = launch.shared_bytes + kernel.resources.static_shared
    resident = orin.blocks_an_sm(launch.threads, kernel.resources.registers, shared)
    if resident == 0:
        raise RuntimeError(
            f"a block of {launch.kernel} does not fit an SM: {kernel.resources}, {shared} bytes of shared memory"
        )
    return resident


def _on_the_machine(
    launch: TracedLaunch, totals: Mapping[str, float], blocks: int, resident: int, sectors: float, unit: str
) -> PredictedLaunch:
    work = orin.Launch(blocks, launch.threads // 32, resident, unit, dram_bytes=orin.SECTOR * sectors, **totals)
    return PredictedLaunch(launch.kernel, launch.threads, launch.shared_bytes, work)


def _moves(launch: TracedLaunch, case: Case, grid: Grid) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """For each block the traced one that it is like, and the sectors by which each tensor is moved from there."""
    order = [block.index for block in launch.traced]
    tiles, place = grid.tiles(), grid.first_positions()
    column, group = tiles.column, tiles.group
    like = np.full(grid.blocks(), len(order), np.int32)  # a tile without rows touches nothing
    for i in range(len(grid.phases)):
        rows = list(grid.traced_rows(i))
        inner = rows[len(rows) // 2]
        here = (tiles.phase == i) & (tiles.row < grid.row_tiles(i))
        columns = np.where(column[here] == 0, 0, np.where(column[here] == grid.tiles_n - 1, grid.tiles_n - 1, 1))
        like[here] = [order.index(grid.index(i, inner, c)) for c in columns]
    source = np.array([*order, 0])[like]

    layer, itemsize = case.layer, case.itemsize
    forward = case.op == "tt_block_forward"
    target = layer.out_size if forward or not layer.needs_dx else layer.in_size
    own = layer.outputs // layer.groups if forward else layer.channels // layer.groups
    at = np.zeros((grid.blocks(), len(launch.tensors)))
    for t, name in enumerate(launch.tensors):
        if name in ("x", "y", "residual", "dx", "dy", "dresidual"):
            channels, size = (layer.channels, layer.in_size) if name in ("x", "dx") else (layer.outputs, layer.out_size)
            # the map's position of the block's first row: the target's times what the map has for each of its positions
            scale = [1.0 if size == target else n / m for n, m in zip(size, target, strict=True)]
            strides = _strides(channels, size, case.layout)
            at[:, t] = place[:, 0] * strides[0] + place[:, 1] * scale[0] * strides[2] + place[:, 2] * scale[1] * strides[3]
            written = name in ("y", "residual", "dx")
            at[:, t] += (group * own + column * grid.columns * written) * strides[1]
            at[:, t] *= itemsize
        elif name in ("h", "bits"):
            each = layer.octets if name == "bits" else layer.groups * layer.rank * itemsize
            scale = [n / m for n, m in zip(layer.out_size, target, strict=True)]
            cells = (
                place[:, 0] * math.prod(layer.out_size) + place[:, 1] * scale[0] * layer.out_size[1] + place[:, 2] * scale[1]
            )
            at[:, t] = cells * each + (column * grid.columns // 8 if name == "bits" and forward else 0)
        elif name == "packed":
            taps = math.prod(layer.kernel) * (layer.channels if forward else layer.outputs) // layer.groups
            at[:, t] = (group * own + column * grid.columns) * taps * itemsize
        elif name == "partial":
            at[:, t] = tiles.row * layer.outputs * layer.rank * 4
    return like, np.round((at - at[source]) / orin.SECTOR).astype(np.int64)


def _strides(channels: int, size: tuple[int, int], layout: str) -> tuple[int, int, int, int]:
    positions = math.prod(size)
    if layout == "channels-last":
        return channels * positions, 1, size[1] * channels, channels
    return channels * positions, positions, size[1], 1
