"""The CUDA kernels on the CPU: builds csrc against the emulator (csrc/emulator) and runs jobs on it.

    results = run([Job("plain", "tt_block_forward", problem(x, weight, ...), inputs, outputs, scratch=("packed",))])

A job is one launcher of csrc/plan.h on tensors. It runs under `seeds` schedules, whose outputs must be bit-identical, in an
executable of its own with the address and undefined-behaviour sanitizers; every buffer holds exactly the bytes that its tensor
spans.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PRECISIONS = {"fp32": 0, "tf32": 1, "half": 2}
ACTIVATIONS = {None: 0, "relu": 1, "clamp": 2}
STRIDED = ("x", "residual", "y", "dy", "dx", "dresidual")

_COMMON = ["-std=c++17", "-Wall", "-Wextra", "-g1", "-fPIC", "-DLORA_EDGE_EMULATOR"]
_SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
_TIMEOUT = 3600.0


class EmulatorError(AssertionError):
    """What the emulator found: a race, an access out of bounds, a divergent barrier, a schedule that changes the result."""


class RefusedError(ValueError):
    """The kernels do not support the problem; the text is `refusal`'s."""


@dataclass
class Job:
    """One op on tensors.

    inputs: by field name; any strides, the storage between a view's first and last element is what the kernel may read.
    outputs: by field name; shape, dtype, strides and alignment are used, values are not.
    scratch: names of scratch buffers, with the sizes of `scratch` in csrc/plan.h; or names with bytes.
    fields: numbers by field name (`problem`); the strides of x, y, ... are added from the tensors.
    """

    name: str
    op: str
    fields: Mapping[str, int | float]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    scratch: Sequence[str] | Mapping[str, int] = ()
    seeds: int = 20
    first_seed: int = 1


@dataclass
class Result:
    """`outputs` like the job's, or the `error` that ended it; `refused` where the kernels do not support the problem."""

    job: Job
    outputs: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None
    refused: str | None = None
    answer: str | None = None


@dataclass
class Trace:
    """Launches and traced blocks as csrc/emulator/trace.h describes them, and the records of sectors of all blocks."""

    launches: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    buffers: list[str]
    sectors: Path


def problem(
    *,
    batch: int,
    channels: int,
    outputs: int,
    size: Sequence[int],
    kernel: Sequence[int],
    groups: int = 1,
    rank: int = 0,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    padding_end: Sequence[int] | int | None = None,
    dilation: Sequence[int] | int = 1,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    core_dtype: torch.dtype | None = None,
    suffix_dtype: torch.dtype | None = None,
    saved_dtype: torch.dtype | None = None,
    affine_dtype: torch.dtype | None = None,
    precision: str | None = None,
    activation: str | None = None,
    low: float = 0.0,
    high: float = 0.0,
    scale: float = 1.0,
    bonds: Sequence[int] = (),
) -> dict[str, int | float]:
    """The fields of Problem for `nn.Conv{1,2}d` numbers; one-dimensional ones get a height of 1.

    size, kernel, stride, padding, dilation: one number an axis. padding_end: zeros after the input where they differ.
    bonds: (r2,) or (r2, r3) where the frozen cores are given instead of the suffix. Other types default to `dtype`.
    """

    def pair(value: Sequence[int] | int, other: int) -> tuple[int, int]:
        values = [value] * len(size) if isinstance(value, int) else list(value)
        return (other, values[0]) if len(values) == 1 else (values[0], values[1])

    (in_h, in_w), (kernel_h, kernel_w) = pair(size, 1), pair(kernel, 1)
    (stride_h, stride_w), (dilation_h, dilation_w) = pair(stride, 1), pair(dilation, 1)
    (pad_h, pad_w), (end_h, end_w) = pair(padding, 0), pair(padding if padding_end is None else padding_end, 0)
    fields: dict[str, int | float] = {
        "batch": batch, "channels": channels, "outputs": outputs, "groups": groups, "rank": rank, "in_h": in_h, "in_w": in_w,
        "out_h": (in_h + pad_h + end_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1,
        "out_w": (in_w + pad_w + end_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1,
        "kernel_h": kernel_h, "kernel_w": kernel_w, "stride_h": stride_h, "stride_w": stride_w,
        "pad_h": pad_h, "pad_w": pad_w, "dilation_h": dilation_h, "dilation_w": dilation_w,
    }  # fmt: skip
    dtypes = {"type": dtype, "weight_type": weight_dtype, "core_type": core_dtype, "suffix_type": suffix_dtype,
              "saved_type": saved_dtype, "affine_type": affine_dtype}  # fmt: skip
    fields |= {name: TYPES[given if given is not None else dtype] for name, given in dtypes.items()}
    fields["precision"] = PRECISIONS[precision or ("fp32" if dtype == torch.float32 else "half")]
    fields |= {"activation": ACTIVATIONS[activation], "low": low, "high": high, "scale": scale}
    fields["cores"] = len(bonds) + 1 if bonds else 0
    fields |= {"bond2": 0, "bond3": 0} | {f"bond{i + 2}": bond for i, bond in enumerate(bonds)}
    return fields


def missing() -> str | None:
    """Why the emulator cannot be built on this machine, or None."""
    return None if shutil.which(CXX) else f"the emulator needs a C++17 compiler: {CXX} is not on PATH"


def kernel_sources() -> list[Path]:
    """The kernels and what runs problems on them."""
    return [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "emulator" / "problem_ops.cpp"]


def build(
    sanitize: bool = True, flags: Sequence[str] = (), sources: Sequence[Path] | None = None, include: Path = CSRC
) -> Path:
    """The runner with `sources` (the kernels, unless given), compiled where something changed; two compilers at a time.

    include: the folder of the headers: `csrc` or a copy of it.
    """
    sources = kernel_sources() if sources is None else list(sources)
    how = [*_COMMON, *(_SANITIZED if sanitize else ["-O2"]), *flags, f"-I{include}"]
    layer = [path for path in sorted((CSRC / "emulator").glob("*.cpp")) if path.name != "problem_ops.cpp"]
    objects = _compile([(path, how) for path in sources] + [(path, _engine(sanitize, include)) for path in layer])
    return _link("run", objects, ["-fsanitize=address,undefined"] if sanitize else [])


def _engine(sanitize: bool, include: Path) -> list[str]:
    """The emulator's own objects, without instrumentation: it is fast, checks its input and announces its fiber switches."""
    return [*_COMMON, "-O3", *(["-DLORA_EDGE_ASAN"] if sanitize else []), f"-I{include}"]


@functools.cache
def extension() -> ModuleType:
    """csrc/module.cpp with the kernels on the emulator: the module `_C_emulator`, for CPU tensors' addresses."""
    import pybind11

    flags = [*_COMMON, "-O2", f"-I{CSRC}", "-fvisibility=hidden"]
    module = [*flags, "-DLORA_EDGE_MODULE=_C_emulator", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    machine = [path for path in sorted((CSRC / "emulator").glob("*.cpp")) if path.name not in ("run.cpp", "problem_ops.cpp")]
    parts = [
        (path, flags) for path in [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("cpu/*.cpp")), CSRC / "without_cuda.cpp"]
    ]
    objects = _compile([(CSRC / "module.cpp", module), *parts, *((path, _engine(False, CSRC)) for path in machine)])
    library = _link("_C_emulator" + sysconfig.get_config_var("EXT_SUFFIX"), objects, ["-shared"])
    spec = importlib.util.spec_from_file_location("_C_emulator", library)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def run(
    jobs: Iterable[Job], runner: Path | None = None, timeout: float = _TIMEOUT, env: Mapping[str, str] | None = None
) -> list[Result]:
    """Run the jobs in one process, or in more where one crashes, and return a result for each.

    timeout: seconds for all of them; the job that is under way then gets an error, those after it are not run and say so.
    """
    jobs = list(jobs)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with (path / "jobs").open("wb") as file:
            for job in jobs:
                file.write(_text_of(job))
        while len(results) < len(jobs):
            first = len(results)
            lines, crash = _execute(
                [str(runner or build()), str(path / "jobs"), str(path / "outputs"), str(first)], timeout, env
            )
            assert crash is not None or len(lines) >= 2 * (len(jobs) - first), "the runner left jobs out"
            results += _read_results(jobs[first:], lines, (path / "outputs").read_bytes(), crash)
            if crash is not None and crash.startswith("timeout"):
                results += [Result(job, error="not run: the time was up") for job in jobs[len(results) :]]
    return results


def check(jobs: Iterable[Job], runner: Path | None = None) -> list[Result]:
    """`run` that raises every error: EmulatorError, or RefusedError for a problem that the kernels do not support."""
    results = run(jobs, runner)
    for result in results:
        if result.refused is not None:
            raise RefusedError(f"{result.job.name}: {result.refused}")
        if result.error is not None:
            raise EmulatorError(f"{result.job.name} ({result.job.op}): {result.error}")
    return results


def refusal(fields: Mapping[str, int | float], op: str) -> str | None:
    """Why the kernels do not support a problem as "tt_fuse" or "tt_block", or None."""
    return run([Job("refusal", f"refusal of {op}", fields)])[0].refused


def scratch(fields: Mapping[str, int | float]) -> dict[str, int]:
    """The fields of Scratch in csrc/plan.h, in bytes."""
    answer = check([Job("scratch", "scratch", fields)])[0].answer
    assert answer is not None
    names = ("packed_forward", "packed_backward", "partial", "fuse_partial", "h", "bits")
    return dict(zip(names, map(int, answer.split()), strict=True))


def trace(job: Job, choose: Callable[[dict[str, Any]], Iterable[int]], folder: Path, runner: Path | None = None) -> Trace:
    """Run the blocks that `choose` picks of each launch (a dict with launch, kernel, blocks, threads, shared_bytes), recorded.

    The outputs mean nothing. The records of sectors (csrc/emulator/trace.h) are left in `folder`.
    """
    runner = runner or build(sanitize=False)
    launches = _traced(job, {0: []}, folder, runner).launches
    return _traced(job, {launch["launch"]: list(choose(launch)) for launch in launches}, folder, runner)


def _traced(job: Job, blocks: Mapping[int, Sequence[int]], folder: Path, runner: Path) -> Trace:
    folder.mkdir(parents=True, exist_ok=True)
    chosen = "".join(f"trace {launch} {' '.join(map(str, ids))}\n" for launch, ids in blocks.items())
    (folder / "jobs").write_bytes(_text_of(job, chosen))
    arguments = [str(runner), *(str(folder / name) for name in ("jobs", "outputs")), "0", str(folder / "trace")]
    lines, crash = _execute(arguments, _TIMEOUT, None)
    result = _read_results([job], lines, b"", crash)[0]
    if result.error is not None or result.refused is not None:
        raise EmulatorError(f"{job.name} ({job.op}): {result.error or result.refused}")
    rows = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    names = _kernel_names(runner)
    for row in rows:
        if "kernel" in row:
            row["kernel"] = names.get(row["kernel"], row["kernel"])
    launches, traced = [row for row in rows if "kernel" in row], [row for row in rows if "block" in row]
    return Trace(launches, traced, [name for name, *_ in _buffers(job)], folder / "trace.sectors")


@functools.cache
def _kernel_names(runner: Path) -> dict[str, str]:
    """Kernels by their address in the executable."""
    symbols = subprocess.run(["nm", "-C", str(runner)], check=True, capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in symbols.splitlines() if " t " in line.lower() or " w " in line.lower()]
    return {f"{int(row[0], 16):#x}": _short(row[2]) for row in rows if len(row) == 3}


def _short(symbol: str) -> str:
    """A function's name without namespaces and parameters."""
    for noise in ("void ", "(anonymous namespace)::", "lora_edge::"):
        symbol = symbol.replace(noise, "")
    depth = 0
    for at, letter in enumerate(symbol):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return symbol[:at]
    return symbol


def _compile(parts: Sequence[tuple[Path, Sequence[str]]]) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda part: _object(*part), parts))


def _object(source: Path, flags: Sequence[str]) -> Path:
    """Compile `source` unless there is an object of the same bytes, headers included."""
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    read = _command([CXX, *flags, *language, "-MM", str(source)]).partition(":")[2].replace("\\\n", " ").split()
    digest = _digest([*(Path(path).read_bytes() for path in read), " ".join(flags).encode(), _compiler()])
    target = CACHE / f"{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        _command([CXX, *flags, *language, "-c", str(source), "-o", str(part)])
        part.replace(target)
    return target


def _link(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    digest = _digest([*(path.name.encode() for path in objects), name.encode()])
    target = CACHE / digest / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        _command([CXX, "-no-pie" if "-shared" not in flags else "-fPIC", *flags, *map(str, objects), "-o", str(part)])
        part.replace(target)
    return target


@functools.cache
def _compiler() -> bytes:
    return subprocess.run([CXX, "--version"], check=True, capture_output=True).stdout


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _command(arguments: Sequence[str]) -> str:
    """The output of a command; its warnings are shown."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr[-4000:]}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    return done.stdout


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last one of a view."""
    if tensor.numel() == 0:
        return 0
    last: int = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((_span(tensor),), (1,))


def _bytes(tensor: Tensor) -> bytes:
    return _flat(tensor).view(torch.uint8).numpy().tobytes()


def _offset(tensor: Tensor) -> int:
    """How far a view's start in its storage is from 256-byte alignment."""
    return int(tensor.storage_offset()) * tensor.element_size() % 256


def _buffers(job: Job) -> list[tuple[str, str, int, int]]:
    rows = [(name, "in", _span(x) * x.element_size(), _offset(x)) for name, x in job.inputs.items()]
    rows += [(name, "out", _span(x) * x.element_size(), _offset(x)) for name, x in job.outputs.items()]
    sizes = job.scratch if isinstance(job.scratch, Mapping) else dict.fromkeys(job.scratch, -1)
    return rows + [(name, "scratch", size, 0) for name, size in sizes.items()]


def _text_of(job: Job, extra: str = "") -> bytes:
    fields = dict(job.fields)
    for name, tensor in {**job.inputs, **job.outputs}.items():
        if name in STRIDED and tensor.dim() >= 3:
            strides = tensor.stride() if tensor.dim() == 4 else tensor.unsqueeze(2).stride()
            fields |= {f"{name}_{axis}": stride for axis, stride in zip("nchw", strides, strict=True)}
    lines = [f"job {job.name}", f"op {job.op}", f"seeds {job.first_seed} {job.seeds}"]
    lines += [f"set {name} {value}" for name, value in fields.items()]
    lines += [f"buffer {' '.join(map(str, row))}" for row in _buffers(job)]
    if any(_span(tensor) != tensor.numel() for tensor in job.outputs.values()):
        lines.append("partly")
    return ("\n".join(lines) + "\n" + extra + "data\n").encode() + b"".join(map(_bytes, job.inputs.values()))


def _execute(arguments: Sequence[str], timeout: float, env: Mapping[str, str] | None) -> tuple[list[str], str | None]:
    """The runner's lines, and the reason if it died."""
    sanitizers = {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **sanitizers, **(env or {})}
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return out.splitlines(), f"timeout after {timeout:.0f} s"
    if process.returncode == 0:
        return out.splitlines(), None
    return out.splitlines(), f"the runner ended with {process.returncode}\n{err[-6000:]}"


def _read_results(jobs: Sequence[Job], lines: Sequence[str], outputs: bytes, crash: str | None) -> list[Result]:
    """The results of the jobs that were started."""
    results: list[Result] = []
    for line in lines:
        kind, _, rest = line.partition(" ")
        _, _, text = rest.partition(" ")
        if kind == "begin":
            results.append(Result(jobs[len(results)], error="begun"))
            continue
        result = results[-1]
        result.error = text if kind == "error" else None
        result.refused = text if kind == "refused" else None
        result.answer = text if kind == "answer" else None
        if kind == "ok" and outputs:
            result.outputs = _read_outputs(result.job, outputs, int(text))
    if crash is not None:
        if not results or results[-1].error != "begun":
            raise RuntimeError(f"{crash} outside of any job")
        results[-1].error = crash
    return results


def _read_outputs(job: Job, data: bytes, at: int) -> dict[str, Tensor]:
    tensors = {}
    for name, like in job.outputs.items():
        size = _span(like) * like.element_size()
        flat = torch.frombuffer(bytearray(data[at : at + size]), dtype=like.dtype) if size else like.new_empty(0)
        tensors[name] = flat.as_strided(like.shape, like.stride()) if size else torch.empty_like(like)
        at += size
    return tensors
