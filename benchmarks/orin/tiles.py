"""The tiles of the implicit GEMM (csrc/cuda/tt_conv_gemm.cuh): which blocks are alike, and where a block's tile begins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..layers import Layer

ROWS, COLUMNS, EXTRA = 128, 64, 8  # columns per half
TOGETHER, STAYING = 16, 1 << 20  # for the order of the blocks: halves that run at once, bytes that stay in the L2


@dataclass(frozen=True)
class Phase:
    """One GEMM: ``rows = batch * size`` positions, ``first + step * u`` along each axis of the target, and its length of k."""

    first: tuple[int, int]
    step: tuple[int, int]
    size: tuple[int, int]
    k: int


@dataclass(frozen=True)
class Kind:
    """Blocks that a traced one represents."""

    phase: int
    row: int  # tiles of the traced block
    column: int
    blocks: float  # that it represents


@dataclass(frozen=True)
class Tiles:
    """Phase, row tile, group and column tile of each block, each ``(blocks,)``."""

    phase: NDArray[np.int64]
    row: NDArray[np.int64]
    group: NDArray[np.int64]
    column: NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """The grid of one launch. Blocks count the row tiles of a set, then its column tiles, groups and phases, then the sets."""

    batch: int
    groups: int
    tiles_n: int
    extra: bool  # the last column tile has one more n8 fragment
    rows_together: int  # row tiles per set
    phases: tuple[Phase, ...]
    halves: int = 1  # per block; each has its own columns

    @property
    def columns(self) -> int:
        """Columns per block, without the extra fragment."""
        return self.halves * COLUMNS

    def row_tiles(self, phase: int) -> int:
        return -(-self.batch * math.prod(self.phases[phase].size) // ROWS)

    @property
    def tiles_m(self) -> int:
        """Row tiles of the largest phase. The others have tiles without rows."""
        return max(map(self.row_tiles, range(len(self.phases))))

    def blocks(self) -> int:
        return self.tiles_m * len(self.phases) * self.groups * self.tiles_n

    def index(self, phase: int, row: int, column: int) -> int:
        """The block of a tile, of the first group."""
        place = phase * self.groups * self.tiles_n + column
        first = row - row % self.rows_together
        return first * self._across + place * min(self.rows_together, self.tiles_m - first) + row - first

    @property
    def _across(self) -> int:
        return len(self.phases) * self.groups * self.tiles_n

    def tiles(self) -> Tiles:
        block = np.arange(self.blocks())
        first = block // (self.rows_together * self._across) * self.rows_together
        place, row = np.divmod(block - first * self._across, np.minimum(self.rows_together, self.tiles_m - first))
        row += first
        rest, column = np.divmod(place, self.tiles_n)
        phase, group = np.divmod(rest, self.groups)
        return Tiles(phase, row, group, column)

    def traced_rows(self, phase: int) -> dict[int, float]:
        """Row tiles that represent all of a phase, and how many each represents.

        All tiles until their boundaries coincide with an image's again, if these are at most three; otherwise an image's
        first, an inner and its last one, or the first two if images are smaller than that.
        """
        size, tiles = math.prod(self.phases[phase].size), self.row_tiles(phase)
        an_image, until_again = -(-size // ROWS), math.lcm(size, ROWS) // ROWS
        if until_again > 3 and an_image > 3:
            images = tiles / an_image
            return {0: images, an_image // 2: tiles - 2 * images, an_image - 1: images}
        rows = range(min(tiles, until_again if until_again <= 3 else 2))
        return {row: tiles / len(rows) for row in rows}

    def kinds(self) -> Iterator[Kind]:
        """The kinds of blocks: in each phase the traced rows, with the first, an inner and the last column tile."""
        for phase in range(len(self.phases)):
            columns = (
                {0: 1, 1: self.tiles_n - 2, self.tiles_n - 1: 1} if self.tiles_n > 2 else dict.fromkeys(range(self.tiles_n), 1)
            )
            for row, of_rows in self.traced_rows(phase).items():
                for column, of_columns in columns.items():
                    yield Kind(phase, row, column, of_rows * of_columns * self.groups)

    def traced_samples(self) -> int:
        """Samples of the batch that the traced blocks touch."""
        needed = [ROWS * (max(self.traced_rows(i)) + 1) // math.prod(p.size) + 2 for i, p in enumerate(self.phases)]
        return min(self.batch, max(needed))

    def multiply_adds(self, kind: Kind) -> int:
        """A lower bound of a block's multiply-adds: all of its rows and columns, without the padding of the last k tile."""
        extra = EXTRA if self.extra and kind.column == self.tiles_n - 1 else 0
        return ROWS * (self.columns + extra) * self.phases[kind.phase].k

    def first_positions(self) -> NDArray[np.int64]:
        """``(blocks, 3)``: sample, h and w in the target of each block's first row."""
        tiles = self.tiles()
        places = np.zeros((self.blocks(), 3), np.int64)
        for i, phase in enumerate(self.phases):
            here = tiles.phase == i
            sample, rest = np.divmod(tiles.row[here] * ROWS, math.prod(phase.size))
            h, w = np.divmod(rest, phase.size[1])
            places[here] = np.stack([sample, phase.first[0] + h * phase.step[0], phase.first[1] + w * phase.step[1]], axis=1)
        return places


def _tiles_n(columns: int) -> tuple[int, bool]:
    rest = columns % COLUMNS
    extra = columns > COLUMNS and 0 < rest <= EXTRA
    return (columns // COLUMNS if extra else -(-columns // COLUMNS)), extra


def _padded(k: int, itemsize: int) -> int:
    return -(-k * itemsize // 16) * 16 // itemsize


def forward_grid(layer: Layer, itemsize: int, layout: str) -> Grid:
    tiles_n, extra = _tiles_n(layer.outputs // layer.groups + layer.rank)
    k = layer.channels // layer.groups * math.prod(layer.kernel)
    packed = (layer.outputs + layer.rank) * _padded(k, itemsize)
    source = layer.batch * layer.channels * math.prod(layer.in_size)
    stride = layer.stride[0] * (layer.stride[1] if layout == "channels-last" else 1)  # of what a tap reads; sectors are whole
    phase = Phase((0, 0), (1, 1), layer.out_size, k)
    grid = Grid(layer.batch, layer.groups, tiles_n, extra, 1, (phase,))
    if layout == "channels-first" and layer.stride[1] > 1 and tiles_n % 2 == 0 and grid.blocks() >= TOGETHER:
        grid = replace(grid, tiles_n=tiles_n // 2, halves=2)
    return _ordered(grid, source * itemsize, packed * itemsize, math.prod(layer.kernel) / stride)


def backward_grid(layer: Layer, itemsize: int) -> Grid:
    """The grid of backward. Without dx the rows are dy's own positions, and only ``dcore`` is summed."""
    phases = []
    for h in range(layer.stride[0]):
        for w in range(layer.stride[1]):
            size = tuple(-(-(n - first) // s) for n, first, s in zip(layer.in_size, (h, w), layer.stride, strict=True))
            taps = 1
            for kernel, phase, stride, pad, dilation in zip(
                layer.kernel, (h, w), layer.stride, layer.pad, layer.dilation, strict=True
            ):
                taps *= sum((tap * dilation - pad - phase) % stride == 0 for tap in range(kernel))
            phases.append(Phase((h, w), layer.stride, (size[0], size[1]), taps * layer.outputs // layer.groups))
    packed = layer.channels * sum(_padded(phase.k, itemsize) for phase in phases)
    if not layer.needs_dx:
        alone = Phase((0, 0), (1, 1), layer.out_size, layer.outputs // layer.groups)
        grid = Grid(layer.batch, layer.groups, 1, False, 1, (alone,))
    else:
        grid = Grid(layer.batch, layer.groups, *_tiles_n(layer.channels // layer.groups), 1, tuple(phases))
    source, sweeps = layer.positions * layer.outputs, math.prod(layer.kernel) / math.prod(layer.stride)
    return _ordered(grid, source * itemsize, packed * itemsize, sweeps)


def _ordered(grid: Grid, source: int, packed: int, sweeps: float) -> Grid:
    """The block order of ``set_blocks`` in csrc/cuda/tt_conv_launch.h; ``source`` and ``packed`` in bytes."""
    together = TOGETHER // grid.halves
    waves = -(-grid.blocks() // together)

    def traffic(rows: int) -> float:
        sets = -(-grid.tiles_m // rows)
        part = source / sets
        return (source if part <= STAYING else waves * part * max(1.0, sweeps)) + packed * (1 if packed <= STAYING else sets)

    sizes = [size for size in (1, 2, 4, 8, 16) if size == 1 or size < 2 * min(grid.tiles_m, together)]
    return replace(grid, rows_together=min(sizes, key=traffic))
