"""The emulator itself: broken kernels are detected by what they do, and a warp's units compute what PTX specifies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import emulator
from helpers.emulator import EmulatorError, Job

KERNELS = Path(__file__).parent / "emulator_kernels"

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Every kernel and the error that is reported; None for a correct kernel.
VERDICTS = {
    "exchange": None,
    "warp_exchange": None,
    "warp_exchange_twice": None,
    "neighbours_in_a_word": None,
    "writer_after_all_readers": None,
    "async": None,
    "async_own_bytes": None,
    "async_two_groups": None,
    "poisoned": None,
    "read_after_write": "race (",
    "write_after_read": "race (",
    "write_after_write": "race (write after write)",
    "counter": "race (",
    "missing_sync_warp": "race (",
    "sync_warp_across_warps": "race (",
    "shuffle_orders_nothing": "race (read after write)",
    "matrix_orders_nothing": "race (write after read)",
    "matrix_of_an_own_row": "race (read after write)",
    "one_writer_many_readers": "race (",
    "async_wait_for_an_older_group": "race (async copy)",
    "async_without_wait": "race (async copy)",
    "async_without_commit": "race (async copy)",
    "async_without_barrier": "race (",
    "async_over_readers": "race (",
    "async_never_waited_for": "ended with an async copy that it did not wait for",
    "divergent_barrier": "divergent barrier: 40 of 64 threads wait at sync_block, and thread 40 has ended",
    "barriers_in_two_places": "divergent barrier: other threads wait at the sync_block of ordering.cu",
    "barrier_against_shuffle": "divergent",
    "exited_lane": "divergent warp: 31 lanes of warp 0 wait at shuffle_xor, and thread 5 has ended",
    "two_collectives": "divergent warp: a lane comes to",
    "shared_past_the_array": "writes 4 bytes at byte 252 of an array of 252 bytes",
    "shared_before_the_array": "writes 4 bytes at byte -4 of an array of 256 bytes",
    "shared_past_the_block": "an array of bytes 0 to 4100, but the block has 4096",
    "shared_misaligned": "which is not aligned to them",
    "shared_array_misaligned": "an array at byte 2, which is not aligned to its elements of 4 bytes",
    "matrix_misaligned": "a matrix row reads 16 bytes at byte",
    "global_past_the_end": "reads 4 bytes at byte 256 of `x`, which has 256",
    "global_before_the_view": "reads 4 bytes at byte -4 of `x`",
    "global_misaligned": "reads 16 bytes of `x` at an address that is not aligned to them",
    "async_past_the_end": "reads 16 bytes at byte 1024 of `x`, which has 1024",
    "stored_twice": "of `y` is written twice, before by block 0, thread",
    "input_written": "writes to the input `x`",
    "read_in_the_launch_that_writes": "of `y`, which block 0, thread",
    "stored_in_part": "byte 160 of `y` is never written",
    "overflow": "signed integer overflow",
}
X_ELEMENTS = {"global_past_the_end": 64, "async_past_the_end": 256}
Y_ELEMENTS = {"read_in_the_launch_that_writes": 128}
N = {"stored_in_part": 40, "overflow": 2**31 - 8}
pytestmark = pytest.mark.slow  # about 30 s


@pytest.fixture(scope="module")
def runner() -> Path:
    return emulator.build(True, [f"-I{KERNELS}"], sorted(KERNELS.glob("*.cu")))


def job(name: str, x: Tensor | None = None, y: Tensor | None = None, seeds: int = 20, **fields: int) -> Job:
    x = torch.arange(X_ELEMENTS.get(name, 1024), dtype=torch.float32) if x is None else x
    y = torch.empty(Y_ELEMENTS.get(name, 64)) if y is None else y
    return Job(name, name, {"n": N.get(name, 64), **fields}, {"x": x}, {"y": y}, seeds=seeds)


@pytest.fixture(scope="module")
def verdicts(runner: Path) -> dict[str, str | None]:
    return {result.job.name: result.error for result in emulator.run([job(name) for name in VERDICTS], runner)}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(verdicts: dict[str, str | None], name: str) -> None:
    expected = VERDICTS[name]
    if expected is None:
        assert verdicts[name] is None
    else:
        assert expected in (verdicts[name] or "nothing")


def test_a_race_names_its_place_and_both_threads(verdicts: dict[str, str | None]) -> None:
    error = verdicts["missing_sync_warp"]
    assert error is not None
    assert error.startswith("seed 1: ordering.cu:")
    assert ": block 0, thread " in error
    assert " what thread " in error
    assert " in line " in error


def test_results(runner: Path) -> None:
    t = torch.arange(64)
    expected = {
        "exchange": t + 1,
        "warp_exchange": (t ^ 31) + 1,
        "warp_exchange_twice": t + 1,
        "writer_after_all_readers": 2.0 + 1 + (t >= 32),
        "async": 255 - t,
        "async_own_bytes": 4 * t + 3,
        "async_two_groups": 8 * t,
    }
    for result in emulator.check([job(name) for name in expected], runner):
        assert torch.equal(result.outputs["y"], expected[result.job.name].float()), result.job.name


def test_every_schedule_finds_the_race(runner: Path) -> None:
    """The race is recorded whichever thread comes first."""
    names = ["one_writer_many_readers", "missing_sync_warp", "write_after_read", "async_without_barrier", "counter"]
    jobs = [job(name, seeds=1) for name in names for _ in range(30)]
    for seed, each in enumerate(jobs):
        each.first_seed = seed
    errors = [result.error or "" for result in emulator.run(jobs, runner)]
    assert all("race (" in error for error in errors)
    assert all(any(f"race ({kind})" in error for error in errors) for kind in ("read after write", "write after read"))


def test_shared_memory_and_outputs_begin_poisoned(runner: Path) -> None:
    poisoned = emulator.check([job("poisoned")], runner)[0].outputs["y"]
    assert poisoned.isnan().all()


def test_two_blocks_that_store_one_element(runner: Path) -> None:
    assert emulator.run([job("stored_by_two_blocks")], runner)[0].error is None
    error = emulator.run([job("stored_by_two_blocks", blocks=2)], runner)[0].error
    assert error is not None
    assert "is written twice, before by block" in error


def test_zero_fill_touches_nothing(runner: Path) -> None:
    x = torch.arange(40, dtype=torch.float32)
    result = emulator.check([job("zero_fill", x, torch.empty(256), n=10)], runner)[0]
    assert torch.equal(result.outputs["y"], torch.cat([x, torch.zeros(216)]))


def test_views_keep_their_alignment_and_end(runner: Path) -> None:
    aligned, shifted = torch.zeros(1024), torch.arange(1025, dtype=torch.float32)[1:]
    assert emulator.run([job("copy", aligned, torch.empty(256))], runner)[0].error is None
    error = emulator.run([job("copy", shifted, torch.empty(256))], runner)[0].error
    assert error is not None
    assert "not aligned" in error
    error = emulator.run([job("copy", aligned[:252], torch.empty(256))], runner)[0].error
    assert error is not None
    assert "reads 16 bytes at byte 1008 of `x`, which has 1008" in error


def test_a_crash_is_one_job_s_error(runner: Path) -> None:
    """The sanitizer sees what bypasses the interface, and the following jobs still run."""
    results = emulator.run([job("exchange"), job("crash", n=64), job("exchange")], runner)
    assert [result.error is None for result in results] == [True, False, True]
    assert "heap-buffer-overflow" in (results[1].error or "")


def test_check_raises_by_name(runner: Path) -> None:
    with pytest.raises(EmulatorError, match=r"^counter \(counter\): seed 1: ordering\.cu:\d+: block 0"):
        emulator.check([job("counter")], runner)
    with pytest.raises(EmulatorError, match="no op is called `nothing`"):
        emulator.check([job("nothing")], runner)


def a_fragment(matrix: np.ndarray, packed: int) -> np.ndarray:
    """Registers (32, 4) of A (16, K), each with `packed` adjacent values of k; the layout is the PTX manual's."""
    k_half = matrix.shape[1] // 2
    registers = np.zeros((32, 4, packed), dtype=matrix.dtype)
    for lane in range(32):
        row, k = lane // 4, lane % 4 * packed
        for i, (down, right) in enumerate([(0, 0), (8, 0), (0, k_half), (8, k_half)]):
            registers[lane, i] = matrix[row + down, k + right : k + right + packed]
    return registers.view(np.uint32).reshape(32, 4)


def b_fragment(matrix: np.ndarray, packed: int) -> np.ndarray:
    """Registers (32, 2) of B (K, 8)."""
    k_half = matrix.shape[0] // 2
    registers = np.zeros((32, 2, packed), dtype=matrix.dtype)
    for lane in range(32):
        column, k = lane // 4, lane % 4 * packed
        for i in range(2):
            registers[lane, i] = matrix[k + i * k_half : k + i * k_half + packed, column]
    return registers.view(np.uint32).reshape(32, 2)


def from_d_fragment(registers: np.ndarray) -> np.ndarray:
    """D (16, 8) of registers (32, 4)."""
    d = np.zeros((16, 8), dtype=np.float32)
    for lane in range(32):
        for i in range(4):
            d[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = registers[lane, i]
    return d


def bits(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The bits of the values as integers."""
    return values.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()


def multiply(runner: Path, op: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> np.ndarray:
    """a (times, 16, K) b (times, K, 8), summed over times."""
    packed = 1 if dtype == torch.float32 else 2
    fragments = [np.stack([fragment(m, packed) for m in bits(x, dtype)]) for fragment, x in ((a_fragment, a), (b_fragment, b))]
    inputs = {name: torch.from_numpy(x.view(np.int32).copy()) for name, x in zip("ab", fragments, strict=True)}
    result = emulator.check([Job(op, op, {"times": len(a)}, inputs, {"y": torch.empty(32, 4)}, seeds=3)], runner)[0]
    return from_d_fragment(result.outputs["y"].numpy())


@pytest.mark.parametrize(
    ("op", "k", "dtype"), [("mma_tf32", 8, torch.float32), ("mma_f16", 16, torch.float16), ("mma_bf16", 16, torch.bfloat16)]
)
def test_mma_is_a_matrix_product(runner: Path, op: str, k: int, dtype: torch.dtype) -> None:
    """Small whole numbers are exact in every type, so a misplaced lane shows."""
    torch.manual_seed(0)
    a, b = torch.randint(-9, 10, (3, 16, k)).float(), torch.randint(-9, 10, (3, k, 8)).float()
    assert np.array_equal(multiply(runner, op, a, b, dtype), (a @ b).sum(0).numpy())


def test_mma_in_half_precision_keeps_every_product(runner: Path) -> None:
    """Sums are float32, and subnormals are not flushed."""
    torch.manual_seed(0)
    for op, dtype, least in (("mma_f16", torch.float16, 2.0**-24), ("mma_bf16", torch.bfloat16, 2.0**-100)):
        a, b = torch.randn(1, 16, 16).to(dtype), torch.randn(1, 16, 8).to(dtype)
        a[0, :, 0], b[0, 0] = 0, 0
        product = (a.double() @ b.double())[0].numpy()
        assert np.allclose(multiply(runner, op, a.float(), b.float(), dtype), product, rtol=1e-5, atol=1e-5)
        a[:], b[:] = 0, 1
        a[0, 3, 5] = least
        assert multiply(runner, op, a.float(), b.float(), dtype)[3].tolist() == [least] * 8


def test_mma_cuts_tf32_and_round_tf32_rounds(runner: Path) -> None:
    """1 + 3 * 2^-12 rounds to 1 + 2^-10; the unit by itself truncates it to 1."""
    value = 1 + 3 * 2.0**-12
    a, b = torch.zeros(1, 16, 8), torch.zeros(1, 8, 8)
    a[0, 0, 0], b[0, 0, 0] = value, 1
    assert multiply(runner, "mma_tf32", a, b, torch.float32)[0, 0] == 1
    x = torch.tensor([value, -value, 1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-23, 0.0, float("inf")])
    rounded = emulator.check([job("convert", x, torch.empty(4, 6), n=6)], runner)[0].outputs["y"][0]
    up = 1 + 2.0**-10
    assert rounded.tolist() == [up, -up, up, 1, 0, float("inf")]


def test_conversions_round_to_nearest_even(runner: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (4000,), generator=generator).to(torch.int32).view(torch.float32)
    halfway = torch.tensor(
        [2049.0, 2051.0, 65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25, 2.0**-14 - 2.0**-26, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    )
    x = torch.cat([anything, torch.randn(200, generator=generator), halfway, -halfway, torch.arange(0, 3000, 7).float()])
    y = emulator.check([job("convert", x, torch.empty(4, len(x)), n=len(x), seeds=1)], runner)[0].outputs["y"]
    for row, dtype in ((1, torch.float16), (2, torch.bfloat16)):
        assert torch.equal(y[row].nan_to_num(nan=1e38), x.to(dtype).float().nan_to_num(nan=1e38)), dtype
    whole = (x >= 0) & (x < 2**31)
    assert torch.equal(y[3][whole], (x[whole].long() // 7).float())


def test_load_matrix(runner: Path) -> None:
    """Lane l holds words l % 4 of row l / 4 of each 8 x 8 matrix of halves."""
    x = torch.arange(128, dtype=torch.float32)
    for matrices in (4, 2):
        y = torch.empty(matrices, 32)
        name = f"load_matrix{matrices}"
        result = emulator.check([Job(name, name, {}, {"x": x}, {"y": y}, seeds=3)], runner)[0]
        assert torch.equal(result.outputs["y"].flatten(), x[: 32 * matrices])


def test_shuffle(runner: Path) -> None:
    x = torch.arange(64, dtype=torch.float32)
    sums = emulator.check([job("butterfly", x)], runner)[0].outputs["y"]
    assert torch.equal(sums.view(2, 32), x.view(2, 32).sum(1, keepdim=True).expand(2, 32))


def test_trace_counts(runner: Path, tmp_path: Path) -> None:
    """Bank conflicts, sectors and blocks that can be counted by hand."""
    blocks = []

    def choose(launch: dict[str, object]) -> list[int]:
        blocks.append(launch["blocks"])
        assert str(launch["kernel"]).endswith("banks")
        assert (launch["threads"], launch["shared_bytes"]) == (64, 4096)
        return [1]

    trace = emulator.trace(job("banks", blocks=3), choose, tmp_path, runner)
    assert blocks == [3]
    (row,) = trace.blocks
    assert row["block"] == 1
    assert row["shared_wavefronts"] == (1 + 32) + (4 + 32) + (4 + 32)
    assert row["shared_wavefronts_ideal"] == (1 + 1) + (4 + 4) + (4 + 4)
    assert row["global_read_sectors"] == 4 + 16
    assert row["global_read_distinct"] == 16
    records = np.fromfile(trace.sectors, dtype="<u8")
    assert records.tolist() == [0, 1, 2, 3, *range(16)]
    assert trace.buffers[0] == "x"
    assert json.dumps(row)
