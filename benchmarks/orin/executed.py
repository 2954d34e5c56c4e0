"""How many instructions a warp executes, from the SASS and from what the emulator counted while it ran the same kernel.

A warp's way through the code is a flow through its control-flow graph, from the entry to an exit. The bytes it moves, the
barriers and the matrix instructions on that way are as many as the emulator counted. Where that leaves a choice, the shorter
way is taken; where no way meets every count (a compiler drops or repeats accesses), the one that misses them least.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from .sass import Code, Instruction

_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_MEMORY = {
    "LDG": ("read_global",),
    "STG": ("write_global",),
    "LDS": ("read_shared",),
    "STS": ("write_shared",),
    "LDGSTS": ("read_global", "write_shared"),
}
# What it costs to miss one of a count, in instructions. The compiler merges shared accesses to wider ones, of the same bytes.
_COST_OF_A_MISS = {"bytes": 1e3, "global_wide": 200.0, "shared_wide": 20.0}
_COST_OF_ANOTHER_MISS = 1e4


def counted(i: Instruction) -> dict[str, float]:
    """What the emulator sees of one warp instruction: bytes a lane, 16-byte accesses, single operations."""
    return _counted(i.opcode)


@functools.cache
def _counted(opcode: str) -> dict[str, float]:
    name, *kinds = opcode.split(".")
    if name in _MEMORY:
        size = next((_BYTES[kind] for kind in kinds if kind in _BYTES), 4)
        return {f"{space}_{what}": n for space in _MEMORY[name] for what, n in (("bytes", size), ("wide", float(size == 16)))}
    if name == "LDSM":
        return {"load_matrix": float(kinds[-1])}
    simple = {"HMMA": "mma", "BAR": "barriers", "SHFL": "shuffle_xor", "FFMA": "fma"}
    return {simple[name]: 1} if name in simple else {}


class _Flow:
    """A kernel's control flow as equations on how often each edge is taken, where warps end, and what is counted."""

    def __init__(self, code: Code) -> None:
        self.names, edges = list(code.blocks), list(code.flow.edges)
        row_of = {name: row for row, name in enumerate(self.names)}
        ends = [row_of[name] for name in self.names if code.blocks[name][-1].ends()]
        self.edges, self.first = len(edges), row_of[min(self.names)]
        columns = np.arange(self.edges)
        sources, targets = np.array([[row_of[a], row_of[b]] for a, b in edges]).reshape(-1, 2).T
        self.entered = np.zeros((len(self.names), self.edges))
        self.entered[targets, columns] = 1
        self.balance = np.zeros((len(self.names), self.edges + len(ends)))  # in less out
        np.add.at(self.balance, (targets, columns), 1)
        np.add.at(self.balance, (sources, columns), -1)
        self.balance[ends, self.edges + np.arange(len(ends))] = -1
        counts = [[_counted(i.opcode) for i in code.blocks[name]] for name in self.names]
        self.lengths = np.array([float(len(block)) for block in counts])
        kinds = {kind for block in counts for one in block for kind in one}
        self.counts = {kind: np.array([sum(one.get(kind, 0.0) for one in block) for block in counts]) for kind in kinds}
        self.nothing = np.zeros(len(self.names))


@functools.cache
def _flow(code: Code) -> _Flow:
    return _Flow(code)


def executions(code: Code, counts: Mapping[str, float], at_least: Mapping[str, float] | None = None) -> NDArray[np.float64]:
    """How often a warp runs through each basic block of ``code.blocks``.

    Args:
        code: the kernel.
        counts: of one warp, by the names of :func:`counted`; a name that is not in it is not known.
        at_least: counts that are known from below only.
    """
    known = {**counts, **(at_least or {})}
    flow, kinds = _flow(code), sorted(known)
    blocks, steps = flow.balance.shape
    # variables: edges taken, ends taken, counts missed from below and from above
    equal = np.zeros((blocks + len(kinds), steps + 2 * len(kinds)))
    right = np.zeros(len(equal))
    cost = np.concatenate([flow.lengths @ flow.entered, np.zeros(steps - flow.edges + 2 * len(kinds))])
    equal[:blocks, :steps] = flow.balance
    right[flow.first] = -1
    for k, kind in enumerate(kinds):
        here, below = flow.counts.get(kind, flow.nothing), steps + 2 * k
        equal[blocks + k, : flow.edges] = here @ flow.entered
        equal[blocks + k, below : below + 2] = 1, -1
        right[blocks + k] = known[kind] - here[flow.first]
        cost[below] = next((c for end, c in _COST_OF_A_MISS.items() if kind.endswith(end)), _COST_OF_ANOTHER_MISS)
        cost[below + 1] = cost[below] if kind in counts else 0
    found = linprog(cost, A_eq=csr_array(equal), b_eq=right)
    if not found.success:
        raise RuntimeError(f"{code.symbol}: no way through it for the counts {known}: {found.message}")
    times = flow.entered @ found.x[: flow.edges]
    times[flow.first] += 1
    return times


def executed(code: Code, times: NDArray[np.float64], kind: str | None = None) -> float:
    """Instructions that a warp executes, or as much of one count of :func:`counted`."""
    flow = _flow(code)
    return float(times @ (flow.lengths if kind is None else flow.counts.get(kind, flow.nothing)))
