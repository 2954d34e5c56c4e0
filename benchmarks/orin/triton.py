"""``python -m benchmarks.orin.triton``: what Triton makes of every kernel and configuration, beside the CUDA kernels.

Needs triton but no GPU. Compiles ahead of time what a training step of W1, W2 and W3 would launch: for sm_87 every variant, for
sm_80 and sm_90 one of each kernel, configuration, unit and layout. Writes ``results/orin/triton.csv``, one row per compilation,
and ``results/orin/triton.md``, Triton's and the compiled extension's kernels side by side for each op and layer (the latter
from kernels.csv and main_launches.csv, which ``python -m benchmarks.orin`` writes). Fails if a kernel spills or needs more
shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.orin import orin, sass
from lora_edge.environment.machine import describe_machine
from lora_edge.files.output import write_text
from lora_edge.ops import tt_fuse
from lora_edge.ops.engines.triton import available

from .. import RESULTS, write_rows
from ..kernels import DTYPES, calls
from ..layers import Layer, layers_of
from ..markdown import table
from ..workloads import WORKLOADS
from .triton_aot import Compiled, Variant, compile_variant, is_spilled, recorded, resources

FOLDER = RESULTS / "orin"
CAPABILITIES = (87, 80, 90)
MOST_SHARED = {87: orin.SHARED_MOST, 80: 163 * 1024, 90: 227 * 1024}
LAYOUTS = ("channels-last", "channels-first")
PRECISIONS = {"tt_fuse_forward": ("fp32", "half"), "tt_fuse_backward": ("fp32", "half")}  # all for the other ops
PROCESSES = 2
MAIN = {  # an op's main kernels; the others compose the weight before them or add partial sums after them
    "tt_fuse_forward": ("compose",),
    "tt_fuse_backward": ("core_gradient",),
    "tt_block_forward": ("tt_block_forward", "depthwise_forward"),
    "tt_block_backward": ("tt_block_backward", "depthwise_backward"),
}


@dataclass(frozen=True)
class Use:
    """An op on a layer that launches a variant."""

    workload: str
    layer: str
    op: str
    precision: str
    layout: str


def uses(workloads: Iterable[str], layouts: Iterable[str] = LAYOUTS) -> Iterator[tuple[Use, list[Variant]]]:
    """Every op on every layer, with the variants of all its launches."""
    for workload in workloads:
        for name, layer in layers_of(workload).items():
            for precision in DTYPES:
                for layout in layouts:
                    for op, variants in _ops(layer, precision, layout):
                        if precision in PRECISIONS.get(op, DTYPES) and not (op.startswith("tt_fuse") and layout != LAYOUTS[0]):
                            yield Use(workload, name, op, precision, layout), variants


def _ops(layer: Layer, precision: str, layout: str) -> Iterator[tuple[str, list[Variant]]]:
    """Each op's call on tensors without memory, recorded instead of launched."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        here = mock.patch.multiple(available, DEVICE_TYPE="cpu", runtime=lambda: available.Runtime("cpu"))
        with here, FakeTensorMode():
            for op, make in calls(layer, precision, layout, torch.device("cpu")).items():
                with recorded():
                    call = make("triton")
                with recorded() as variants:
                    call()
                yield op, variants
            if layer.rank:
                yield "tt_fuse_backward", _fuse_backward(layer, DTYPES[precision])
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _fuse_backward(layer: Layer, dtype: torch.dtype) -> list[Variant]:
    shape = (layer.channels // layer.groups, *layer.kernel)
    weight, suffix = (torch.empty(n, *shape, dtype=dtype) for n in (layer.outputs, layer.rank))
    core = torch.empty(layer.outputs, layer.rank, dtype=dtype, requires_grad=True)
    with recorded():
        fused = tt_fuse(weight, core, suffix, backend="triton")
    with recorded() as variants:
        torch.autograd.grad(fused, core, torch.empty_like(fused))
    return variants


def representative(variants: Iterable[Variant]) -> list[Variant]:
    """One variant per kernel, configuration and constants: that with the most aligned arguments, whose accesses are widest."""
    found: dict[Any, Variant] = {}
    for variant in variants:
        key = (variant.name, variant.configuration, variant.constants)
        if key not in found or len(variant.aligned) > len(found[key].aligned):
            found[key] = variant
    return list(found.values())


def one_of_each(variants: Iterable[Variant]) -> list[Variant]:
    """One variant per kernel, configuration, unit and layout."""
    kinds = ("UNIT", "FLAT", "X_LAST", "DY_LAST", "PLAIN")
    return list({(v.name, v.configuration, *map(v.constant, kinds)): v for v in variants}.values())


def compile_all(wanted: Sequence[tuple[Variant, int]], processes: int = PROCESSES) -> list[Compiled]:
    """What the compiler makes of each variant for its capability, in order."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(_compile, wanted, chunksize=4))


def _compile(wanted: tuple[Variant, int]) -> Compiled:
    return resources(compile_variant(*wanted), with_code=wanted[1] == CAPABILITIES[0])


def row_of(variant: Variant, capability: int, found: Compiled) -> dict[str, Any]:
    """A row of the table."""
    loop = found.code.innermost if found.code is not None else None
    kinds = {"hmma": sass.is_tensor, "ffma": sass.is_fma, "cp_async": sass.is_async_copy, "16_byte": sass.is_wide}
    constants = [f"{name}={value}" for name, value in variant.constants if not name.isupper()]
    resident = orin.blocks_per_sm(32 * variant.warps, found.registers, found.shared) if capability == 87 else ""
    return {
        "arch": f"sm_{capability}", "kernel": variant.name, "configuration": variant.configuration,
        "unit": variant.constant("UNIT") or "", "flat": variant.constant("FLAT"),
        "channels_last": variant.constant("X_LAST" if "forward" in variant.name else "DY_LAST"),
        "warps": variant.warps, "registers": found.registers, "spill_bytes": found.stack + found.local,
        "shared_bytes": found.shared, "blocks_per_sm": resident,
        **{f"loop_{name}": loop.count(kind) if loop else "" for name, kind in kinds.items()},
        "loop_instructions": len(loop.instructions) if loop else "", "constants": " ".join(constants),
    }  # fmt: skip


def failures(compiled: Iterable[tuple[Variant, int, Compiled]]) -> list[str]:
    """A message for everything that makes the run fail."""
    found = []
    for variant, capability, made in compiled:
        what = f"{variant.name} {variant.configuration} {variant.constant('UNIT') or ''} on sm_{capability}"
        if is_spilled(made):
            found.append(f"{what}: {made.stack + made.local} bytes spilled")
        if made.shared > MOST_SHARED[capability]:
            found.append(f"{what}: {made.shared} bytes of shared memory, a block may have {MOST_SHARED[capability]}")
    return found


def side_by_side(by_use: Mapping[Use, Variant], compiled: Mapping[Variant, Compiled]) -> str:
    """The table: one line per op on a layer, the compiled extension's kernel and Triton's with its first configuration."""
    kernels = {row["kernel"]: row for row in _rows("kernels.csv")}
    launches = {
        (row["workload"], layer, row["op"], row["precision"]): row
        for row in _rows("main_launches.csv")
        if row["layout"] == LAYOUTS[0]
        for layer in row["layers"].split()
    }
    lines, seen = [], set()
    for use, variant in by_use.items():
        launch = launches.get((use.workload, use.layer, use.op, use.precision))
        if use.layout != LAYOUTS[0] or launch is None:
            continue
        alike = (use.workload, launch["layers"], use.op, use.precision)
        if alike in seen:
            continue
        seen.add(alike)
        first, *others = launch["layers"].split()
        kernel, made = kernels[launch["launch"]], compiled[variant]
        loop = made.code.innermost if made.code is not None else None
        resident = orin.blocks_per_sm(32 * variant.warps, made.registers, made.shared)
        warps = int(launch["threads"]) // 32
        lines.append(
            (use.workload, first + (f" and {len(others)} more" if others else ""), use.op, use.precision,
             kernel["registers"], f"{int(launch['shared_bytes']) / 1024:.1f}",
             f"{launch['blocks_per_sm']}, {int(launch['blocks_per_sm']) * warps}",
             _loop(kernel["innermost_instructions"], kernel["innermost_hmma"], kernel["innermost_ffma"]),
             variant.configuration, made.registers, f"{made.shared / 1024:.1f}", f"{resident}, {resident * variant.warps}",
             _loop(*((len(loop.instructions), loop.count(sass.is_tensor), loop.count(sass.is_fma)) if loop else ("", "", "")))),
        )  # fmt: skip
    head = (
        "workload", "layer", "op", "precision", "CUDA: registers", "shared KB", "blocks, warps per SM", "inner loop",
        "Triton: tile", "registers", "shared KB", "blocks, warps per SM", "inner loop",
    )  # fmt: skip
    return table(head, lines)


def _loop(instructions: object, hmma: object, ffma: object) -> str:
    """Instructions of the inner loop, and how many of them multiply."""
    if instructions == "":
        return "-"
    kind, count = ("HMMA", hmma) if int(str(hmma)) else ("FFMA", ffma)
    return f"{instructions}, {count} {kind} ({100 * int(str(count)) / int(str(instructions)):.0f} %)"


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open() as file:
        return list(csv.DictReader(file))


_PAGE = """\
# Triton's kernels for Orin (sm_87), beside the compiled extension's

Written by `python -m benchmarks.orin.triton`; nothing here was measured on a GPU. `triton.csv` has one row per compilation:
{count}. {failed}

A line is an op's main kernel on a layer in channels-last; layers that are alike share a line. Triton's is its first
configuration, rows x columns x depth, w warps, s stages; on a device the tuner chooses. The inner loop is the one with the most
multiply-adds: its instructions, and the share of them that are tensor-core or float32 multiply-adds. An HMMA of one precision
is the same amount of work in both.

{table}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and the page; returns 1 if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orin.triton", description=__doc__)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    options = parser.parse_args(arguments)
    found = dict(uses(options.workload))
    variants = list(dict.fromkeys(v for several in found.values() for v in several))
    few, every = one_of_each(variants), representative(variants)
    by_use = {use: next(v for v in several if v.name in MAIN[use.op]) for use, several in found.items()}
    shown = {variant for use, variant in by_use.items() if use.layout == LAYOUTS[0]}
    wanted = [(v, 87) for v in dict.fromkeys([*every, *shown])] + [(v, capability) for capability in (80, 90) for v in few]
    print(f"{len(variants)} variants; compiling {len(wanted)}", flush=True)
    compiled = compile_all(wanted)
    together = [(variant, capability, made) for (variant, capability), made in zip(wanted, compiled, strict=True)]
    about = {key: describe_machine()[key] for key in ("date", "lora_edge", "triton") if key in describe_machine()}
    rows = [{**about, **row_of(*one)} for one in together]
    write_rows(FOLDER / "triton.csv", list(rows[0]), rows)
    failed = failures(together)
    table = side_by_side(by_use, {variant: made for variant, capability, made in together if capability == 87})
    bound = "None spills, and each fits a block's shared memory." if not failed else f"{len(failed)} spill or do not fit."
    counts = ", ".join(f"{sum(row['arch'] == f'sm_{c}' for row in rows)} for sm_{c}" for c in CAPABILITIES)
    write_text(FOLDER / "triton.md", _PAGE.format(count=counts, failed=bound, table=table))
    print("\n".join([*failed, f"{len(rows)} rows; {bound}"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
