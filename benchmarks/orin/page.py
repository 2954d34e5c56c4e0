"""The readable page of ``benchmarks.orin``: tables for people, and what the model leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.orin import orin

from ..markdown import table

if TYPE_CHECKING:
    from ..layers import Layer
    from .table import Row

_HOW = f"""\
# Kernels for Orin (sm_87), without one

Written by `python -m benchmarks.orin`; nothing here was measured on a GPU. `kernels.csv` has one row per kernel,
`main_launches.csv` one row per op on a layer. `launches.csv`, which the command writes and the repository leaves out, has one
row per launch and power mode with everything that goes into its prediction.

## The model

The predicted time of a launch is the largest of five terms. The emulator (`csrc/emulator`) runs one block of each kind of tile,
which is scaled to the grid. The instructions executed are derived from the compiled code and the accesses, barriers and matrix
instructions that the emulator counted (`benchmarks/orin/executed.py`).

| term | work | rate |
|---|---|---|
| dram | sectors that miss a simulated L2, and those written back from it | 68 GB/s at 625 MHz, 102 GB/s at 1,020 MHz |
| l2 | 32-byte sectors of all warp instructions, as if there were no L1 | {orin.L2_BYTES} bytes per SM and cycle |
| multiply-adds | those executed, padding included | per SM and cycle: 128 FP32, 512 TF32, 1,024 FP16 |
| instructions | warp instructions executed | 4 per SM and cycle |
| shared | passes over the 32 banks, conflicts included; 16-byte accesses in quarters of a warp | 1 per SM and cycle |

The last three are those of the busiest of the {orin.SMS} SMs: the last wave may not fill it, and few warps do not fill its
schedulers. The L2 starts empty and has 2 MB, 16 ways, lines of 128 bytes with 4 sectors; least recently used, sets hashed.

No L2 rate is published for Orin. {orin.L2_BYTES} is A100's: 5,120 bytes per cycle for 108 SMs. The 2 MB could also be four of
A100's slices, {orin.L2_BYTES_LOW:.0f} bytes per SM and cycle in all; `over_floor_at_low_l2` is the prediction at that rate.

## What the model leaves out

- Latency: of a launch, of a wave's first loads, and from barrier to barrier. 8 warps per SM hide little of it, least of all if
  they belong to one wide block and wait at the same barriers.
- Terms that do not overlap. The real time lies between the largest term and their sum.
- The L1. Reads that hit it cost the L2 nothing; here they do. `over_floor_with_l1` is the prediction if all repeated reads of a
  block hit it, which matters for depthwise kernels.
- Register bank conflicts, the instruction cache, and units narrower than a warp: conversions, integer multiplication.
- Quarters of a warp that read the same 16 bytes of shared memory: hardware may serve them at once, the model does not.
- Uneven L2 slices and DRAM pages, refresh, the CPU's traffic on the same DRAM, and throttling.
- What the previous launch left in the L2: mostly the composed weight, and often a map.
- Divergence: a warp takes one path at each branch, the shorter one if the counts allow it.
- A partial last row tile counts as a whole one.

The floor is that of docs/design.md, section 5: useful multiply-adds at the peak, or the bytes that must move at the full
bandwidth, whichever is longer. Of x only the positions that a tap reaches count. If a block's input is the model's, backward
computes no dx and its floor has none. A bound applies to the main launch of an op: composing the weight before it and adding
partial sums after it are separate launches, and `all` is the sum of an op's launches.
"""


def page(kernels: Sequence[Mapping[str, Any]], rows: Sequence[Row], failed: Sequence[str]) -> str:
    """The page as markdown."""
    parts = [_HOW, "## Bounds\n", *([f"- {line}" for line in failed] or ["All kept."]), ""]
    parts += ["## Predicted time over the floor\n", _summary(rows), ""]
    parts += ["## Kernels\n", _kernels(kernels), ""]
    for workload in dict.fromkeys(row.workload for row in rows):
        parts += [
            f"## {workload}: microseconds at {orin.MODES[0].name}, times the floor, and the term\n",
            _layers(rows, workload),
            "",
        ]
    return "\n".join(parts)


def _summary(rows: Sequence[Row]) -> str:
    lines = []
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.case.op, row.case.precision, row.case.layout), []).append(row)
    for group, members in groups.items():
        for mode in orin.MODES:
            worst = max(members, key=lambda row: row.over_floor(mode))
            total = sum(sum(launch.launch.seconds(mode)[0] for launch in row.launches) for row in members)
            floor = sum(row.case.floor(mode) for row in members)
            over = f"{worst.over_floor(mode):.2f} ({worst.name}, {worst.main().launch.seconds(mode)[1]})"
            limits = Counter(row.main().launch.seconds(mode)[1] for row in members).most_common(2)
            lines.append(
                (*group, mode.name, len(members), over, f"{total * 1e3:.2f}", f"{total / floor:.2f}",
                 ", ".join(f"{name} {n}" for name, n in limits))
            )  # fmt: skip
    head = (
        "workload",
        "op",
        "precision",
        "layout",
        "mode",
        "layers",
        "worst kernel",
        "ms, all launches",
        "over floors",
        "limits",
    )
    return table(head, lines)


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "kernel", "registers", "spilled", "shared KB", "blocks, warps per SM", "instructions",
        "innermost loop", "HMMA", "FFMA", "main loop", "cp.async", "16-byte",
    )  # fmt: skip
    lines = [
        (
            f"`{k['kernel']}`", k["registers"], k["spill_store_bytes"] + k["spill_load_bytes"],
            f"{(k['static_shared_bytes'] + k['dynamic_shared_bytes']) / 1024:.1f}",
            f"{k['blocks_per_sm']}, {k['warps_per_sm']}",
            k["instructions"], k["innermost_instructions"], k["innermost_hmma"], k["innermost_ffma"],
            k["main_loop_instructions"], k["main_loop_cp_async"], k["main_loop_16_byte"],
        )
        for k in kernels
    ]  # fmt: skip
    return table(head, lines)


def _layers(rows: Sequence[Row], workload: str) -> str:
    """One line per layer and op, one column per precision; layers that are alike share a line."""
    mode = orin.MODES[0]
    cells: dict[tuple[Layer, str, str], dict[str, str]] = {}
    names: dict[tuple[Layer, str, str], dict[str, None]] = {}
    for row in rows:
        if row.workload != workload:
            continue
        key = (row.case.layer, row.case.op, row.case.layout)
        names.setdefault(key, {})[row.name] = None
        seconds, limit = row.main().launch.seconds(mode)
        total = sum(launch.launch.seconds(mode)[0] for launch in row.launches)
        all_of_it = f" (all {total * 1e6:.0f})" if len(row.launches) > 1 else ""
        text = f"{seconds * 1e6:.0f}{all_of_it}, {row.over_floor(mode):.2f}, {limit}"
        cells.setdefault(key, {})[row.case.precision] = text
    lines = []
    for key, by_precision in cells.items():
        layer, op, layout = key
        first, *others = names[key]
        more = f" and {len(others)} more" if others else ""
        shape = f"{layer.channels}→{layer.outputs}, {' x '.join(map(str, layer.kernel))}"
        lines.append((first + more, shape, op, layout, *(by_precision.get(p, "") for p in ("fp32", "tf32", "half"))))
    return table(("layer", "shape", "op", "layout", "FP32", "TF32", "FP16"), lines)
