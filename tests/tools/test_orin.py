"""The sm_87 table: the parsers on small texts, the model of Orin and its L2 on launches that can be counted by hand."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import layers
from benchmarks.orin import orin, page, sass, table, tiles, traces
from benchmarks.orin.predict import Case, PredictedLaunch

SASS = """
	code for sm_87
		Function : _ZN9lora_edge4gemmINS_4Tf32ELi128EEEvPKf
	.headerflags	@"EF_CUDA_SM87 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM87)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a0000017a02 */
                                                                            /* 0x000fe40000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64], P0 ;  /* 0x0000000002077fae */
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;            /* 0x0000000000007b1d */
        /*0030*/              @!P0 BRA 0xd0 ;                               /* 0x000000b000008947 */
        /*0040*/                   LDSM.16.M88.4 R4, [R20] ;                /* 0x000000001404783b */
        /*0050*/                   HMMA.1688.F32.TF32 R8, R4, R12, R8 ;     /* 0x0000000c0408723c */
        /*0060*/               @P1 BRA 0x90 ;                               /* 0x0000006000001947 */
        /*0070*/                   FFMA R0, R1, R2, R0 ;                    /* 0x0000000201007223 */
        /*0080*/                   BRA P2, 0x70 ;                           /* 0xfffffff000007947 */
        /*0090*/                   IADD3 R3, R3, 0x1, RZ ;                  /* 0x0000000103037810 */
        /*00a0*/              @!P3 BRA 0x20 ;                               /* 0xffffff7000008947 */
        /*00b0*/                   STG.E.128 [R2.64], R8 ;                  /* 0x0000000802007986 */
        /*00c0*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00d0*/                   IADD3 R3, R3, 0x2, RZ ;                  /* 0x0000000203037810 */
        /*00e0*/                   BRA 0xb0 ;                               /* 0xffffffc000007947 */
        /*00f0*/                   BRA 0xf0;                                /* 0xfffffff000007947 */
		Function : spilled
        /*0000*/                   STL.64 [R1], R2 ;                        /* 0x0000000201007387 */
        /*0010*/                   EXIT ;                                   /* 0x000000000000794d */
"""

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_87'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_87'
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 376 bytes cmem[0]
"""


def test_sass_instructions_and_loops():
    code = sass.parse(SASS)["_ZN9lora_edge4gemmINS_4Tf32ELi128EEEvPKf"]
    assert len(code.instructions) == 15  # the jump to itself at the end is padding
    assert code.count(sass.is_async_copy) == code.count(sass.is_tensor) == code.count(sass.is_barrier) == 1
    assert code.count(sass.is_wide) == 3
    assert [(loop.head, len(loop.instructions)) for loop in code.loops] == [(0x20, 9), (0x70, 2)]
    # the block at 0xd0 is after the exit and jumps back, but is not a loop
    assert code.innermost is not None
    assert code.outermost is not None
    assert code.innermost.head == code.outermost.head == 0x20
    assert sass.parse(SASS)["spilled"].count(sass.is_local) == 1
    assert sass.parse(SASS)["spilled"].innermost is None


def test_ptxas_resources():
    found = sass.parse_resources(PTXAS)
    assert found["_Z1av"] == sass.Resources(28, 0, 0, 0, 0)
    assert found["_Z1bv"] == sass.Resources(255, 16, 12, 8, 2048)


def test_short_names():
    assert sass.short_name("void lora_edge::(anonymous namespace)::k<lora_edge::Fp32, (lora_edge::Access)0>(lora_edge::P)") == (
        "k<Fp32, (Access)0>"
    )
    assert sass.short_name("lora_edge::k(int (*)(float))") == "k"


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (128, 32, 0, 12),  # 48 warps
        (32, 32, 0, 16),  # at most 16 blocks
        (128, 128, 0, 4),
        (128, 129, 0, 3),  # 136 registers per thread are allocated
        (128, 255, 0, 2),
        (128, 32, 57600, 2),
        (128, 32, 81 * 1024, 2),  # and 1 KB per block for the system
        (128, 32, 82 * 1024, 1),
        (128, 32, 163 * 1024, 1),
        (128, 32, 163 * 1024 + 1, 0),
        (1024, 65, 0, 0),  # 72 * 1024 registers
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, blocks: int):
    assert orin.blocks_per_sm(threads, registers, shared) == blocks


def launch(**changes) -> orin.Launch:
    counts = {
        "dram_bytes": 0.0,
        "l2_bytes": 0.0,
        "l2_bytes_with_l1": 0.0,
        "multiply_adds": 0.0,
        "instructions": 0.0,
        "wavefronts": 0.0,
    }
    return orin.Launch(**{"blocks": 16, "warps": 4, "resident": 2, "unit": "fp32", **counts, **changes})


def test_predicted_time_is_the_largest_term():
    mode = orin.MODES[0]
    assert launch(dram_bytes=68e9).seconds(mode) == (1.0, "dram")
    assert launch(multiply_adds=8 * 128 * 625e6).seconds(mode) == (1.0, "multiply-adds")
    assert launch(multiply_adds=8 * 128 * 625e6, unit="tf32").seconds(mode)[0] == 0.25
    assert launch(instructions=8 * 4 * 625e6).seconds(mode) == (1.0, "instructions")
    assert launch(wavefronts=8 * 625e6, instructions=8 * 625e6).seconds(mode) == (1.0, "shared")
    assert launch(l2_bytes=8 * 64 * 625e6).seconds(mode, 64.0) == (1.0, "l2")


def test_last_wave():
    assert launch(blocks=16).uneven() == 1
    assert launch(blocks=17).uneven() == pytest.approx(3 * 8 / 17)
    assert launch(blocks=8, warps=2, resident=8).uneven() == 2  # two warps use two of four schedulers
    assert launch(blocks=16, warps=2, resident=8).uneven() == 1


def test_peaks_are_those_of_the_design():
    assert [2 * orin.MODES[0].peak(unit) / 1e12 for unit in ("fp32", "tf32", "half")] == pytest.approx([1.28, 5.12, 10.24])


def layer_of(channels: int, outputs: int, in_size, out_size, kernel, stride, pad, batch: int = 64) -> layers.Layer:
    return layers.Layer(
        batch, channels, outputs, 1, 2, in_size, out_size, kernel, stride, pad, (1, 1), False, True, True, False, "relu",
        needs_dx=True, needs_backward=True, needs_dresidual=True,
    )  # fmt: skip


def test_floor_of_a_layer():
    layer = layer_of(8, 16, (1, 10), (1, 5), (1, 1), (1, 2), (0, 0), batch=2)
    assert layer.multiply_adds == 10 * 18 * 8
    assert layer.read_positions == 10  # of 20: stride 2
    assert layer.bits_bytes == 10 * 2
    assert layer.forward_bytes(4) == 4 * (10 * 8 + 2 * 10 * 16 + 10 * 2 + 16 * 8 + 2 * 8) + 20
    assert layer.backward_bytes(4) == 4 * (2 * 10 * 16 + 10 * 2 + 20 * 8 + 16 * 8 + 16 * 2) + 20
    assert layer.fuse_bytes(4, "tt_fuse_forward") == 2 * layer.fuse_bytes(4, "tt_fuse_backward") == 2 * 4 * 16 * 8


def test_grid_of_a_strided_layer():
    layer = layer_of(64, 128, (32, 32), (16, 16), (3, 3), (2, 2), (1, 1))
    forward, backward = tiles.forward_grid(layer, 4, "channels-last"), tiles.backward_grid(layer, 4)
    assert (forward.tiles_n, forward.extra, forward.rows_together, forward.blocks()) == (2, True, 1, 2 * 64 * 256 // 128)
    assert (backward.tiles_n, backward.extra, backward.rows_together, backward.blocks()) == (1, False, 1, 4 * 64 * 256 // 128)
    assert [phase.k for phase in backward.phases] == [128, 256, 256, 512]
    for grid in (
        forward,
        backward,
        dataclasses.replace(backward, rows_together=16),
        dataclasses.replace(forward, rows_together=100),
    ):
        assert sum(kind.blocks for kind in grid.kinds()) == pytest.approx(grid.blocks())
        block = grid.index(len(grid.phases) - 1, 3, grid.tiles_n - 1)
        found = grid.tiles()
        assert (found.phase[block], found.row[block], found.column[block]) == (len(grid.phases) - 1, 3, grid.tiles_n - 1)
    # the second row tile of the phase of even rows and odd columns
    assert backward.first_positions()[backward.index(1, 1, 0)].tolist() == [0, 16, 1]
    assert forward.multiply_adds(tiles.Kind(0, 0, 1, 1)) == 128 * 72 * 576


def test_wide_blocks_where_a_stride_leaves_out_half_of_each_sector():
    wide = tiles.forward_grid(layer_of(64, 128, (32, 32), (16, 16), (3, 3), (2, 2), (1, 1)), 4, "channels-first")
    assert (wide.tiles_n, wide.columns, wide.extra, wide.blocks()) == (1, 128, True, 64 * 256 // 128)
    assert wide.multiply_adds(tiles.Kind(0, 0, 0, 1)) == 128 * 136 * 576
    for outputs, batch, stride in ((64, 64, 2), (192, 64, 2), (128, 64, 1), (128, 3, 2)):
        layer = layer_of(64, outputs, (32, 32), (16, 16), (3, 3), (stride, stride), (1, 1), batch)
        assert tiles.forward_grid(layer, 4, "channels-first").columns == 64


def test_phases_of_an_odd_map_have_tiles_without_rows():
    grid = tiles.backward_grid(layer_of(8, 8, (33, 9), (17, 5), (3, 3), (2, 2), (1, 1)), 4)
    assert [grid.row_tiles(i) for i in range(4)] == [43, 34, 40, 32]
    assert grid.blocks() == 4 * 43
    assert sum(kind.blocks for kind in grid.kinds()) == pytest.approx(43 + 34 + 40 + 32)


@pytest.mark.parametrize("size", [(1, 60), (49, 30), (32, 32), (25, 15), (4, 4), (16, 16)])
def test_traced_rows_stand_for_all(size: tuple[int, int]):
    grid = tiles.forward_grid(layer_of(8, 16, size, size, (1, 1), (1, 1), (0, 0)), 4, "channels-last")
    rows = grid.traced_rows(0)
    assert sum(rows.values()) == pytest.approx(grid.row_tiles(0))
    assert len(rows) <= 3
    assert (max(rows) + 1) * tiles.ROWS <= grid.traced_samples() * size[0] * size[1]


def test_workload_layers():
    found = layers.layers_of("W1")
    first, last = found["block1.conv1"], found["block3.conv3"]
    assert (first.channels, first.outputs, first.kernel, first.pad, first.needs_dx) == (97, 64, (1, 8), (0, 3), False)
    assert (last.has_residual, last.has_residual_affine, last.activation, last.needs_dx) == (True, True, "relu", True)


def stream(first: int, count: int, written: bool = False, tensor: int = 0):
    from benchmarks.orin.l2 import Touches

    return Touches(np.arange(first, first + count), np.full(count, written), np.full(count, tensor, np.int32))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_l2_traffic():
    from benchmarks.orin.l2 import dram_sectors

    one = np.zeros(1, np.int32)
    still = np.zeros((4, 1), np.int64)
    # four blocks read the same 1 MB, which stays in the cache; nothing of 8 MB stays
    assert dram_sectors([stream(0, 1 << 15)], np.zeros(4, np.int32), still, 1) == (1 << 15, 0)
    assert dram_sectors([stream(0, 1 << 18)], np.zeros(4, np.int32), still, 1) == (4 << 18, 0)
    # blocks that run at once share even that
    assert dram_sectors([stream(0, 1 << 18)], np.zeros(4, np.int32), still, 4) == (1 << 18, 0)
    # moved blocks, on tensors that move with them and on others
    moved = np.arange(4)[:, None] * np.array([[1000, 0]])
    both = stream(0, 1000)
    both = type(both)(
        *(np.concatenate(pair) for pair in zip(vars(both).values(), vars(stream(1 << 30, 500, False, 1)).values(), strict=True))
    )
    assert dram_sectors([both], np.zeros(4, np.int32), moved, 2) == (4 * 1000 + 500, 0)
    # written sectors are written back once, and not fetched
    assert dram_sectors([stream(0, 1000, True)], one, still[:1], 1) == (0, 1000)


def test_executed_instructions():
    from benchmarks.orin.executed import executed, executions

    code = sass.parse(SASS)["_ZN9lora_edge4gemmINS_4Tf32ELi128EEEvPKf"]
    # a prologue of 2, rounds of 7 without the loop of 2 in them, an end of 2; or straight out by 0xd0
    times = executions(code, {"barriers": 5, "mma": 5})
    assert executed(code, times) == pytest.approx(2 + 5 * 7 + 2)
    times = executions(code, {"barriers": 5, "mma": 5}, at_least={"fma": 15})
    assert executed(code, times) == pytest.approx(2 + 5 * 7 + 15 * 2 + 2)
    assert executed(code, times, "fma") == pytest.approx(15)
    assert executed(code, executions(code, {"barriers": 1, "mma": 0, "read_global_bytes": 16})) == pytest.approx(2 + 2 + 2 + 2)


def test_the_summary_of_launches():
    """Of layers that are alike one row, of the launch that does the op's work; launches.csv has the others too."""
    layer = layer_of(8, 16, (1, 10), (1, 10), (1, 1), (1, 1), (0, 0))
    case = Case(layer, "tt_block_forward", "fp32", "channels-last")
    launches = (
        PredictedLaunch("fuse_packed<Fp32>", 128, 0, launch(dram_bytes=68e9)),
        PredictedLaunch("tt_block_forward_kernel<Fp32>", 256, 4096, launch(dram_bytes=68e9 * 2 * case.floor(orin.MODES[0]))),
    )
    rows = [table.Row("W1", name, case, launches) for name in ("first", "second")]
    (row,) = table.main_launch_rows(rows)
    assert (row["layers"], row["launch"], row["threads"], row["shared_bytes"], row["blocks_per_sm"]) == (
        "first second", "tt_block_forward_kernel<Fp32>", 256, 4096, 2,
    )  # fmt: skip
    assert (row["over_floor_625mhz"], row["limit_625mhz"]) == ("2.000", "dram")
    every = table.launch_rows(rows)
    assert len(every) == 2 * (2 + 1)  # in each mode both launches and their sum
    assert next(r["over_floor"] for r in every if r.get("main")) == row["over_floor_625mhz"]


def test_the_committed_page_and_summary():
    results = Path(page.__file__).parents[1] / "results/orin"
    assert (results / "README.md").read_text().startswith(page._HOW)
    kernels, launches = (list(csv.DictReader((results / name).open())) for name in ("kernels.csv", "main_launches.csv"))
    assert {row["launch"] for row in launches} <= {row["kernel"] for row in kernels}
    assert {row["workload"] for row in launches} == {"W1", "W2", "W3"}


def test_the_traces_use_the_tests_emulator():
    assert {"Job", "build", "trace", "problem"} <= set(vars(traces.emulator()))
