"""``python -m benchmarks.orin``: what the compiler makes of every kernel for Orin (sm_87), and the time that a model predicts.

Needs nvcc, a disassembler (the triton wheel has one) and a C++ compiler, but no GPU and no ``lora_edge._C``. Writes to
``results/orin/``: ``kernels.csv`` (one row per kernel), ``main_launches.csv`` (one row per op on a layer: its main launch),
``README.md``, and ``launches.csv`` (one row per launch and power mode, and the sum where an op has several; 1.2 MB, not
committed). Returns 1 if a kernel spills, uses local memory or fits fewer than 8 warps per SM. A missed bound on the predicted
time over the floor is reported on the page. The files are written in every case.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.orin import orin, sass
from lora_edge.environment.machine import describe_machine
from lora_edge.files.output import write_text

from .. import RESULTS, write_rows
from ..layers import Layer, layers_of
from ..workloads import WORKLOADS
from .page import page
from .predict import Case, Kernel, PredictedLaunch, predict
from .traces import runner

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "orin"
FLAGS = ("-std=c++17", "-O3", "-arch=sm_87", "-cubin", "-Xptxas", "-v")
PROCESSES = 2
FEWEST_WARPS = 8
PRECISIONS = {
    "tt_fuse_forward": ("fp32", "half"),
    "tt_fuse_backward": ("fp32", "half"),
    "tt_block_forward": ("fp32", "tf32", "half"),
    "tt_block_backward": ("fp32", "tf32", "half"),
}
FUSE_BOUND, FUSE_BYTES = 1.3, 64 * 1024  # of weights
BLOCK_BOUND, BLOCK_WORKLOADS, BLOCK_PRECISIONS = 1.6, ("W1", "W3"), ("fp32", "tf32")


@dataclass(frozen=True)
class Row:
    """One case at one layer's place in a workload."""

    workload: str
    name: str
    case: Case
    launches: tuple[PredictedLaunch, ...]

    def bound(self) -> float | None:
        """The most that the predicted time may be over the floor, if there is a bound."""
        case = self.case
        if case.is_fuse:
            return FUSE_BOUND if case.layer.weight * case.itemsize >= FUSE_BYTES else None
        bounded = self.workload in BLOCK_WORKLOADS and case.precision in BLOCK_PRECISIONS
        return BLOCK_BOUND if bounded else None

    def main(self) -> PredictedLaunch:
        """The launch that the bound is for: not those that compose the kernel before it or add partial sums after it."""
        return max(self.launches, key=lambda launch: launch.is_main)

    def over_floor(self, mode: orin.Mode, l2_bytes: float = orin.L2_BYTES) -> float:
        return self.main().launch.seconds(mode, l2_bytes)[0] / self.case.floor(mode)


def compile_kernels() -> dict[str, Kernel]:
    """Every kernel of csrc/cuda/*.cu as sm_87 code, by short name; the emulator is compiled at the same time.

    Raises:
        RuntimeError: no nvcc or no disassembler, or a file does not compile; the message has the compiler's.
    """
    home = os.environ.get("CUDA_HOME", "")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not CSRC.is_dir():
        raise RuntimeError("no csrc beside benchmarks: run it in a clone")
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or in CUDA_HOME: install a CUDA toolkit of 12.6 or newer")
    sass.disassembler()
    folder = BUILD / digest_of([nvcc, *FLAGS], [*CSRC.glob("*.h"), *CSRC.glob("cuda/*")])
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> list[Kernel]:
        cubin, log = folder / f"{source.stem}.cubin", folder / f"{source.stem}.log"
        if not log.exists():
            run = subprocess.run([nvcc, *FLAGS, f"-I{CSRC}", str(source), "-o", str(cubin)], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{source.name} does not compile for sm_87:\n{run.stderr}")
            write_text(log, run.stderr)
        resources = sass.parse_resources(log.read_text())
        code = sass.disassemble(cubin) if resources else {}
        names = sass.demangle(code)
        return [Kernel(source.name, names[symbol], code[symbol], resources[symbol]) for symbol in code]

    with ThreadPoolExecutor(PROCESSES) as pool:
        sources = sorted(
            CSRC.glob("cuda/*.cu"), key=lambda path: "conv_backward" not in path.name
        )  # the one that takes longest first
        compiled = pool.map(compile_one, sources)
        pool.submit(runner).result()
        return {kernel.name: kernel for kernels in compiled for kernel in kernels}


def digest_of(texts: Iterable[str], paths: Iterable[Path]) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cases_of(layers: Mapping[str, Mapping[str, Layer]], layouts: Sequence[str]) -> list[tuple[str, str, Case]]:
    """Workload, layer and case of every op that a training step runs."""
    found = []
    for workload, by_name in layers.items():
        for name, layer in by_name.items():
            for op, precisions in PRECISIONS.items():
                is_fuse = op.startswith("tt_fuse")
                if (is_fuse and layer.rank == 0) or (op == "tt_block_backward" and not layer.needs_backward):
                    continue
                for precision in precisions:
                    for layout in layouts[:1] if is_fuse else layouts:
                        found.append((workload, name, Case(layer, op, precision, layout)))
    return found


def predict_all(cases: Iterable[Case], kernels: Mapping[str, Kernel]) -> dict[Case, tuple[PredictedLaunch, ...]]:
    """Predict each distinct case once, in two processes; predictions from the same sources are cached in build/."""
    ours = [path for path in Path(__file__).parent.glob("*.*") if path.suffix in (".py", ".cpp")]
    compiled = [repr((kernel.name, kernel.resources, len(kernel.code.instructions))) for kernel in kernels.values()]
    cache = (
        BUILD / "predicted" / digest_of(compiled, [*ours, *CSRC.glob("*.*"), *CSRC.glob("cuda/*"), *CSRC.glob("emulator/*")])
    )
    cache.mkdir(parents=True, exist_ok=True)
    traced_as = {case: case.traced_as() for case in cases}
    different = list(dict.fromkeys(traced_as.values()))
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), _begin_worker, (dict(kernels), cache)) as pool:
        predicted = dict(zip(different, pool.map(_predicted, different), strict=True))
    return {case: predicted[other] for case, other in traced_as.items()}


_kernels: dict[str, Kernel] = {}  # of this worker process
_cache = Path()


def _begin_worker(kernels: dict[str, Kernel], cache: Path) -> None:
    global _cache
    _kernels.update(kernels)
    _cache = cache


def _predicted(case: Case) -> tuple[PredictedLaunch, ...]:
    path = _cache / f"{hashlib.sha256(repr(case).encode()).hexdigest()[:24]}.pickle"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(pickle.dumps(tuple(predict(case, _kernels))))
        unfinished.rename(path)
    return pickle.loads(path.read_bytes())


def kernel_rows(kernels: Mapping[str, Kernel], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per kernel. A kernel that no workload launches gets the threads and shared memory of similar ones."""
    launched: dict[str, list[PredictedLaunch]] = {}
    for row in rows:
        for launch in row.launches:
            for name in _alike(launch.kernel):
                launched.setdefault(name, []).append(launch)
    found = []
    for kernel in sorted(kernels.values(), key=lambda k: (k.file, k.name)):
        launches = next((launched[name] for name in _alike(kernel.name) if name in launched), [])
        threads = max((launch.threads for launch in launches), default=0)
        dynamic = max((launch.shared_bytes for launch in launches), default=0)
        resident = (
            orin.blocks_per_sm(threads, kernel.resources.registers, dynamic + kernel.resources.static_shared) if threads else 0
        )
        found.append(
            {
                "file": kernel.file, "kernel": kernel.name, "launched": kernel.name in launched, "threads": threads,
                "registers": kernel.resources.registers, "stack_bytes": kernel.resources.stack,
                "spill_store_bytes": kernel.resources.spill_stores, "spill_load_bytes": kernel.resources.spill_loads,
                "local_instructions": kernel.code.count(sass.is_local), "static_shared_bytes": kernel.resources.static_shared,
                "dynamic_shared_bytes": dynamic, "blocks_per_sm": resident, "warps_per_sm": resident * threads // 32,
                "instructions": len(kernel.code.instructions),
                **_loop_columns("innermost", kernel.code.innermost), **_loop_columns("main_loop", kernel.code.outermost),
            }
        )  # fmt: skip
    return found


def _alike(kernel: str) -> tuple[str, str, str]:
    """Keys of similar kernels: its name, its name without the type (the first argument), and its template's."""
    template, _, arguments = kernel.partition("<")
    return kernel, f"{template}<{arguments.partition(', ')[2]}", template


def _loop_columns(prefix: str, loop: sass.Loop | None) -> dict[str, int | str]:
    kinds = {"hmma": sass.is_tensor, "ffma": sass.is_fma, "cp_async": sass.is_async_copy, "16_byte": sass.is_wide}
    counts: dict[str, int | str] = {f"{prefix}_instructions": len(loop.instructions) if loop else ""}
    return counts | {f"{prefix}_{name}": loop.count(kind) if loop else "" for name, kind in kinds.items()}


def alike(rows: Sequence[Row]) -> list[tuple[dict[str, str], Row]]:
    """One row per workload and case, with the columns that identify it; ``layers`` names all layers that are alike."""
    names: dict[tuple[str, Case], list[str]] = {}
    for row in rows:
        names.setdefault((row.workload, row.case), []).append(row.name)
    return [
        (
            {
                "workload": row.workload, "layers": " ".join(names[key]), "op": row.case.op,
                "precision": row.case.precision, "layout": row.case.layout,
            },
            row,
        )
        for key, row in {(row.workload, row.case): row for row in rows}.items()
    ]  # fmt: skip


def main_launch_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per op for the layers that are alike: its main launch, its predicted time over the floor, and what limits it."""
    found = []
    for about, row in alike(rows):
        launch = row.main()
        columns: dict[str, Any] = {
            "launch": launch.kernel, "threads": launch.threads, "shared_bytes": launch.shared_bytes,
            "blocks_per_sm": launch.launch.resident,
        }  # fmt: skip
        for mode in orin.MODES:
            columns |= {
                f"over_floor_{_suffix(mode)}": f"{row.over_floor(mode):.3f}",
                f"limit_{_suffix(mode)}": launch.launch.seconds(mode)[1],
            }
        found.append({**about, **columns})
    return found


def _suffix(mode: orin.Mode) -> str:
    return mode.name.replace(" ", "").lower()


def launch_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per launch and mode for the layers that are alike, and one for the sum of an op's launches, in microseconds."""
    found: list[dict[str, Any]] = []
    for about_case, row in alike(rows):
        for mode in orin.MODES:
            floor = row.case.floor(mode)
            about = {**about_case, "mode": mode.name, "floor_us": _microseconds(floor)}
            for launch in row.launches:
                columns = _launch_columns(launch, mode, floor)
                found.append({**about, "launch": launch.kernel, "main": launch is row.main(), **columns})
            if len(row.launches) > 1:
                total = sum(launch.launch.seconds(mode)[0] for launch in row.launches)
                sums = {"predicted_us": _microseconds(total), "over_floor": f"{total / floor:.3f}"}
                found.append({**about, "launch": "sum", **sums})
    return found


def _launch_columns(launch: PredictedLaunch, mode: orin.Mode, floor: float) -> dict[str, Any]:
    work = launch.launch
    seconds, limit = work.seconds(mode)
    at_low_l2, _ = work.seconds(mode, orin.L2_BYTES_LOW)
    with_l1, _ = dataclasses.replace(work, l2_bytes=work.l2_bytes_with_l1).seconds(mode)
    terms = {f"{name.replace('-', '_')}_us": _microseconds(term) for name, term in work.terms(mode).items()}
    return {
        "blocks": work.blocks, "threads": launch.threads, "shared_bytes": launch.shared_bytes, "blocks_per_sm": work.resident,
        "dram_bytes": round(work.dram_bytes), "l2_bytes": round(work.l2_bytes), "multiply_adds": round(work.multiply_adds),
        "warp_instructions": round(work.instructions), "wavefronts": round(work.wavefronts), "uneven": f"{work.uneven():.3f}",
        **terms, "predicted_us": _microseconds(seconds), "limit": limit, "over_floor": f"{seconds / floor:.3f}",
        "over_floor_at_low_l2": f"{at_low_l2 / floor:.3f}", "over_floor_with_l1": f"{with_l1 / floor:.3f}",
    }  # fmt: skip


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"


def failures(kernels: Sequence[Mapping[str, Any]]) -> list[str]:
    """A message for everything that makes the run fail: spills, local memory, too few warps."""
    found = []
    for k in kernels:
        if k["spill_store_bytes"] or k["spill_load_bytes"] or k["local_instructions"] or k["stack_bytes"]:
            spilled = f"{k['spill_store_bytes']} + {k['spill_load_bytes']} bytes spilled"
            found.append(
                f"{k['kernel']}: {spilled}, {k['local_instructions']} local accesses, {k['stack_bytes']} bytes of stack"
            )
        if k["threads"] and k["warps_per_sm"] < FEWEST_WARPS:
            found.append(f"{k['kernel']}: {k['warps_per_sm']} warps per SM, at least {FEWEST_WARPS} must fit")
    return found


def missed(rows: Sequence[Row]) -> list[str]:
    """A message for every bound that a prediction misses."""
    found = []
    for row in rows:
        bound = row.bound()
        for mode in orin.MODES:
            over = row.over_floor(mode)
            if bound is not None and over > bound:
                limit = row.main().launch.seconds(mode)[1]
                what = f"{row.workload} {row.name} {row.case.op} {row.case.precision} {row.case.layout} at {mode.name}"
                found.append(f"{what}: {over:.2f} x the floor by {limit}, bound {bound}")
    return found


def worst(rows: Sequence[Row]) -> list[str]:
    """One line per op, precision and layout: the layer whose main launch is furthest over its floor."""
    groups: dict[tuple[str, str, str], list[tuple[float, str, str]]] = {}
    for row in rows:
        for mode in orin.MODES:
            place = f"{row.workload} {row.name} at {mode.name}"
            limit = row.main().launch.seconds(mode)[1]
            groups.setdefault((row.case.op, row.case.precision, row.case.layout), []).append(
                (row.over_floor(mode), place, limit)
            )
    found = []
    for (op, precision, layout), members in sorted(groups.items()):
        most, place, limit = max(members)
        found.append(f"worst {op} {precision} {layout}: {most:.2f} x the floor by {limit}, {place}")
    return found


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the versions that they were made with."""
    about = {"device": "sm_87 model", **{key: describe_machine()[key] for key in ("date", "lora_edge")}}
    fields = list(dict.fromkeys([*about, *(key for row in rows for key in row)]))
    write_rows(path, fields, ({**about, **row} for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orin", description=__doc__)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--layout", nargs="+", choices=["channels-last", "channels-first"], default=["channels-last", "channels-first"]
    )
    parser.add_argument("--layer", nargs="+", help="only these layers, by name")
    parser.add_argument("--out", type=Path, default=RESULTS / "orin", help="folder of the results")
    options = parser.parse_args()
    try:
        kernels = compile_kernels()
        layers = {w: layers_of(w) for w in options.workload}
        if options.layer:
            layers = {w: {name: layer for name, layer in of.items() if name in options.layer} for w, of in layers.items()}
        cases = cases_of(layers, options.layout)
        predicted = predict_all([case for *_, case in cases], kernels)
    except RuntimeError as error:
        print(f"benchmarks.orin: {error}", file=sys.stderr)
        return 2
    rows = [Row(workload, name, case, predicted[case]) for workload, name, case in cases]
    table = kernel_rows(kernels, rows)
    failed, over = failures(table), missed(rows)
    write_csv(options.out / "kernels.csv", table)
    write_csv(options.out / "main_launches.csv", main_launch_rows(rows))
    write_csv(options.out / "launches.csv", launch_rows(rows))
    write_text(options.out / "README.md", page(table, rows, [*failed, *over]))
    print(f"{len(table)} kernels, {len(rows)} ops on layers: {options.out}")
    for line in [*worst(rows), *(f"missed: {line}" for line in over), *(f"failed: {line}" for line in failed)]:
        print(line)
    return 1 if failed else 0
