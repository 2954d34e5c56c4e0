"""``python -m benchmarks.kernels``, also ``lora-edge bench``: each op on each layer of the workloads, backend beside backend.

On a CUDA device the torch backend is cuDNN's convolution with everything else around it. The backends take turns in rounds
within one process; a row has p20, p50 and p80 in microseconds, the median over rounds of the ratio to torch, and the ratio of
the median to the floor of docs/design.md, section 5, at the bandwidth and the matrix product's rate measured on this device
beforehand. On a CUDA device these are device times without Python's launches, from replayed CUDA graphs of ten calls, with a
warm L2; ``launched_us`` is the median of a call as Python makes it.
A backend is timed only if it agrees with torch; a call that it leaves to torch has the reason in its row. Rows go to
``results/<device>/kernels.csv``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_edge.cli import OneLineParser
from lora_edge.environment.machine import describe_machine
from lora_edge.error_text import first_line
from lora_edge.files.output import check_file, make_folder
from lora_edge.ops import tt_fuse
from lora_edge.ops.activation import Activation
from lora_edge.ops.backends import AVAILABLE, state
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.dispatch import REFUSED
from lora_edge.ops.engines import registry as engines
from lora_edge.ops.tt_block import run_block

from . import write_rows
from .device import results_folder, title
from .layers import BATCH, Layer, layers_of
from .workloads import WORKLOADS

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "half": torch.float16}
LAYOUTS = {"channels-last": torch.channels_last, "channels-first": torch.contiguous_format}
AGREE = {"fp32": 1e-4, "tf32": 3e-3, "half": 2e-2}  # ||a - b|| / ||b||
CORNER, SIX = 0.05, 6.0
REPEATS = 10  # of a call in a CUDA graph
OPS = ("tt_fuse_forward", "tt_block_forward", "tt_block_backward")

Call = Callable[[], Sequence[Tensor]]


class Timer:
    """Seconds of a call on a device; on a CUDA device by its own clock, on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        call()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def without_launches(self, call: Call) -> Callable[[], float]:
        """Seconds of a call on a CUDA device without Python's launches, from a captured graph of several calls."""
        if not self.cuda:
            return lambda: self(call)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(REPEATS):
                call()
        return lambda: self(graph.replay) / REPEATS


def rates(device: torch.device, precision: str, size: int) -> tuple[float, float]:
    """Bytes per second of a copy, and multiply-adds per second of a ``size x size`` matrix product, each the best of ten."""
    timer, dtype = Timer(device), DTYPES[precision]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.empty_like(a)
    copy = min(timer(lambda: b.copy_(a)) for _ in range(10))
    product = min(timer(lambda: torch.mm(a, a, out=b)) for _ in range(10))
    return 2 * a.numel() * a.element_size() / copy, size**3 / product


def calls(layer: Layer, precision: str, layout: str, device: torch.device) -> dict[str, Callable[[str], Call]]:
    """By op, a function that makes its call on a backend; the call returns the tensors that must agree."""
    dtype = DTYPES[precision]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def one_map(channels: int, size: tuple[int, int]) -> Tensor:
        return normal(layer.batch, channels, *size).contiguous(memory_format=LAYOUTS[layout])

    fan_in = layer.channels // layer.groups * layer.kernel[0] * layer.kernel[1]
    weight = normal(layer.outputs, layer.channels // layer.groups, *layer.kernel) / fan_in**0.5
    adapted = layer.rank > 0
    core = (normal(layer.outputs, layer.rank) / 4).requires_grad_() if adapted else None
    suffix = normal(layer.rank, *weight.shape[1:]) / fan_in**0.5 if adapted else None
    x = one_map(layer.channels, layer.in_size).requires_grad_(layer.needs_dx)
    affine = (torch.ones(layer.outputs, device=device), torch.zeros(layer.outputs, device=device)) if layer.has_affine else None
    residual = one_map(layer.outputs, layer.out_size).requires_grad_(layer.needs_dresidual) if layer.has_residual else None
    high = [
        (n - 1) * s + d * (k - 1) + 1 - i - p
        for n, s, d, k, i, p in zip(
            layer.out_size, layer.stride, layer.dilation, layer.kernel, layer.in_size, layer.pad, strict=True
        )
    ]
    padding = tuple((p, max(0, h)) for p, h in zip(layer.pad, high, strict=True))
    args = ConvArgs(layer.stride, padding, layer.dilation, layer.groups)
    activation = None if layer.activation is None else Activation(layer.activation)
    dy = one_map(layer.outputs, layer.out_size)
    if activation is not None:  # near its corners rounding flips the derivative, and no two backends would agree
        with torch.no_grad():
            before = run_block(
                x, weight, core, suffix, None, args, 1.0, affine, residual, None, None, None, backend="torch"
            )  # fmt: skip
            off_zero, off_six = before.abs() > CORNER, (before - SIX).abs() > CORNER
            dy = dy.where(off_zero & off_six if layer.activation == "relu6" else off_zero, 0.0)

    def block(backend: str) -> Tensor:
        return run_block(
            x, weight, core, suffix, None, args, 1.0, affine, residual, None, activation, None, backend=backend
        )  # fmt: skip

    def forward(backend: str) -> Call:
        return lambda: [block(backend)]

    def backward(backend: str) -> Call:
        y = block(backend)
        wanted = [t for t in (x, core, residual) if t is not None and t.requires_grad]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    found: dict[str, Callable[[str], Call]] = {"tt_block_forward": forward}
    if layer.needs_backward:
        found["tt_block_backward"] = backward
    if core is not None and suffix is not None:
        found["tt_fuse_forward"] = lambda backend: lambda: [tt_fuse(weight, core, suffix, backend=backend)]
    return found


def floor(layer: Layer, op: str, itemsize: int, bandwidth: float, multiply_adds: float) -> float:
    """The floor in seconds: docs/design.md, section 5."""
    if op == "tt_fuse_forward":
        return layer.fuse_bytes(itemsize, op) / bandwidth
    if op == "tt_block_forward":
        return max(layer.multiply_adds / multiply_adds, layer.forward_bytes(itemsize) / bandwidth)
    return max(layer.backward_multiply_adds() / multiply_adds, layer.backward_bytes(itemsize) / bandwidth)


def agree(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> bool:
    return all((a - b).float().norm() <= tolerance * b.float().norm() for a, b in zip(got, want, strict=True))


def rounds(by_backend: dict[str, Call], timer: Timer, count: int) -> dict[str, list[float]]:
    """Seconds of each backend's call in ``count`` interleaved rounds, after two that are discarded."""
    timed = {name: timer.without_launches(call) for name, call in by_backend.items()}
    seconds: dict[str, list[float]] = {name: [] for name in by_backend}
    for _ in range(count + 2):
        for name, take in timed.items():
            seconds[name].append(take())
    return {name: values[2:] for name, values in seconds.items()}


def rows_of(
    workload: str, name: str, layer: Layer, op: str, make: Callable[[str], Call], names: Sequence[str], fixed: dict[str, Any],
    timer: Timer, count: int, least: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one op on one layer: one per backend, torch first."""
    right = {"torch": make("torch")}
    want = [t.detach().clone() for t in right["torch"]()]
    refused: dict[str, str] = {}
    for backend in names[1:]:
        try:
            call = make(backend)
            if agree(call(), want, AGREE[fixed["precision"]]):
                right[backend] = call
        except RuntimeError as error:
            if REFUSED not in str(error):
                raise
            refused[backend] = str(error).partition(f"{REFUSED}: ")[2]
    seconds = rounds(right, timer, count)
    rows = []
    for backend in names:
        row = {**fixed, "workload": workload, "layer": name, "op": op, "backend": backend}
        row |= {"refused": refused[backend]} if backend in refused else {"agrees": backend in right}
        if backend in seconds:
            p20, p50, p80 = np.percentile(seconds[backend], [20, 50, 80]) * 1e6
            ratio = np.median(np.array(seconds[backend]) / np.array(seconds["torch"]))
            row |= {"us_p20": round(p20, 2), "us_p50": round(p50, 2), "us_p80": round(p80, 2), "over_torch": round(ratio, 3)}
            row |= {"launched_us": round(np.median([timer(right[backend]) for _ in range(count)]) * 1e6, 2)}
            row |= {"floor_us": round(least * 1e6, 2), "over_floor": round(p50 / (least * 1e6), 2)}
        rows.append(row)
    return rows


FIELDS = (
    "device", "lora_edge", "torch", "date", "precision", "layout", "batch", "workload", "layer", "op", "backend", "agrees",
    "refused", "us_p20", "us_p50", "us_p80", "over_torch", "launched_us", "floor_us", "over_floor",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the table; returns 1 if a backend does not agree with torch."""
    parser = OneLineParser(prog="lora-edge bench", description=__doc__)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=["channels-last"])
    parser.add_argument("--backend", nargs="+", choices=engines.WITH_KERNELS, default=engines.WITH_KERNELS, help="beside torch")
    parser.add_argument("--layer", nargs="+", help="only these layers, by name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name of the device")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=4096, help="size of the matrices that measure the device's rates")
    parser.add_argument("--out", type=Path, help="the table; default results/<device>/kernels.csv")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.size) < 1:
        raise ValueError(f"--rounds is {options.rounds} and --size {options.size}; give integers of at least 1")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own message, for example where it is built without CUDA
        raise ValueError(f"--device is {options.device!r}; give one that is here, such as cpu ({first_line(error)})") from None
    known = {name for workload in options.workload for name in layers_of(workload)} if options.layer else set()
    if unknown := set(options.layer or ()) - known:
        raise ValueError(f"--layer {min(unknown)!r} is not in {', '.join(options.workload)}; give some of {', '.join(known)}")
    path = options.out or results_folder(device) / "kernels.csv"
    make_folder(path.parent)
    check_file(path)
    timer = Timer(device)
    names = ["torch"]
    for backend in options.backend:
        if state(backend) != AVAILABLE:
            print(f"without {backend}: it is {state(backend)}", file=sys.stderr)
        elif engines.device_type(backend) != device.type:
            print(f"without {backend}: it runs on {engines.device_type(backend)}, not on {device.type}", file=sys.stderr)
        else:
            names.append(backend)
    about = {"device": title(device), **{key: describe_machine()[key] for key in ("lora_edge", "torch", "date")}}
    rows: list[dict[str, Any]] = []
    side = torch.cuda.stream(torch.cuda.Stream(device)) if timer.cuda else nullcontext()  # graph capture needs its own stream
    with side:
        for precision in options.precision:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            bandwidth, multiply_adds = rates(device, precision, options.size)
            for workload in options.workload:
                for name, layer in layers_of(workload).items():
                    if options.layer and name not in options.layer:
                        continue
                    for layout in options.layout:
                        fixed = {**about, "precision": precision, "layout": layout, "batch": BATCH}
                        for op, make in calls(layer, precision, layout, device).items():
                            least = floor(layer, op, DTYPES[precision].itemsize, bandwidth, multiply_adds)
                            rows += rows_of(workload, name, layer, op, make, names, fixed, timer, options.rounds, least)
                            found = (
                                f"{r['backend']} {r.get('us_p50', r.get('refused', 'wrong'))}" for r in rows[-len(names) :]
                            )
                            print(*found, workload, name, op)
    write_rows(path, FIELDS, rows)
    print(f"{len(rows)} rows in {path}")
    return 0 if all(row.get("agrees", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
