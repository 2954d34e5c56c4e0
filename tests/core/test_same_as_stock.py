"""Random small programs: an adapted model with fused blocks does at every step what its ``lean=False`` twin does.

``LORA_EDGE_EXAMPLES=20000`` tries more programs than the default, ``LORA_EDGE_SEED`` others. As a script it writes the outcome
to ``benchmarks/results/cpu/same_as_stock.csv``: ``PYTHONPATH=tests:. python tests/core/test_same_as_stock.py``. About 20 s.
"""

# An argument list is spliced into a call, and mypy does not know its length.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import datetime
import itertools
import os
import platform
import random
import sys
import time
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_edge
from helpers import twins as twins_of
from helpers.programs.made import Made, flips, once
from helpers.programs.program import Program, Step, input_of
from helpers.programs.writer import write
from helpers.twins import Mismatch, Twins, compare_steps, same, take_step
from lora_edge.nn import fused_block
from lora_edge.nn.fuser import source

EXAMPLES = int(os.environ.get("LORA_EDGE_EXAMPLES", "150"))
SEED = int(os.environ.get("LORA_EDGE_SEED", "0"))
ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "same_as_stock.csv"
EXACT = 1e-9  # in float64, of the largest value: some hundred roundings of 1e-16, and what variances near zero make of them
ROUNDED = 2e-4  # in float32: the same number of roundings of 6e-8
HALF = 0.1  # under autocast to bfloat16: some roundings of 4e-3
_numbers = itertools.count()


def run(program: Program, rounded: float = ROUNDED) -> str:
    """Run a program's twins; return how much was fused: "all", "part" or "none".

    Raises:
        Mismatch: they differ.
    """
    name = str(next(_numbers))
    if not program.shown:
        source.source_of.cache_clear()  # it looks a text up by its code
    made = [Made(program, f"{name} {side}") for side in ("ours", "stock")]
    try:
        pair = twins_of.twins(made[0].model, made[1].model, **program.options)
        for step in program.steps:
            _take(program, step, pair, made, rounded)
        state = pair.ours._lora_edge
        fused, left = len(state.blocks), len(state.not_fused)
        return "none" if not fused else "part" if left else "all"
    finally:
        for one in made:
            one.forget()


def _take(program: Program, step: Step, pair: Twins, made: list[Made], rounded: float) -> None:
    with contextlib.suppress(RuntimeError):  # a map that a model kept cannot be copied
        if step.copies:
            pair.ours, pair.stock = copy.deepcopy(pair.ours), copy.deepcopy(pair.stock)
    outcomes = []
    for model, one in zip(pair, made, strict=True):
        x = input_of(program, step)
        names = {
            "m": model, "ns": one.scope, "x": x, "nn": nn, "F": nn.functional, "torch": torch, "types": types,
            "once": once, "flips": flips, "lora_edge": lora_edge, "contextlib": contextlib,
        }  # fmt: skip
        raised = [_change(change, names) for change in step.changes]

        def call(m: nn.Module, x: torch.Tensor = x, names: dict[str, Any] = names) -> tuple[Any, list[torch.Tensor]]:
            leaf = x
            if step.seed % 2 and x.requires_grad:
                names["x"] = x.clone(memory_format=torch.preserve_format)
            with eval(step.context, names):
                return eval(f"m({step.arguments})", names), [leaf]

        outcomes.append((raised, take_step(model, call, step.seed)))
    (ours_raised, ours), (stock_raised, stock) = outcomes
    if ours_raised != stock_raised:
        raise Mismatch(f"a change raised {ours_raised}, for stock {stock_raised}")
    tolerance = HALF if "autocast" in step.context else rounded if program.float32 else EXACT
    compare_steps(pair, ours, stock, tolerance)
    mine, its = ({k: v for k, v in one.scope.items() if k.isupper()} for one in made)
    same(mine, its, 0.0, "globals")


def _change(change: str, names: dict[str, Any]) -> str | None:
    """Carry out a change; return the type of what it raised, since an earlier change may have removed its target."""
    try:
        exec(change, names)
    except Exception as error:
        return type(error).__name__
    return None


def check(program: Program) -> str:
    """Call :func:`run` on several inputs: rounding may push a value over an edge of an activation, but not on all of them."""
    try:
        return run(program)
    except Mismatch as mismatch:
        rounds = program.float32 or any("autocast" in step.context for step in program.steps)
        if not rounds or "differs by" not in str(mismatch):
            raise
        for k in (1000, 2000):
            for step in program.steps:
                step.seed += k
            with contextlib.suppress(Mismatch):
                return run(program)
        if program.float32:  # a BatchNorm of few values magnifies roundings; exact arithmetic tells them from faults
            run(dataclasses.replace(program, float32=False))
            return run(program, 100 * ROUNDED)
        raise


def report(program: Program, mismatch: BaseException) -> str:
    """Everything that is needed to run a program again."""
    return f"{program.text}\n{program.steps}\n{program.options} float32={program.float32} shown={program.shown}\n{mismatch!r}"


def try_programs(examples: int, seed: int, on_mismatch: Any = None) -> Counter[str]:
    """Try programs and count the outcomes. The first mismatch is raised unless ``on_mismatch`` handles it."""
    found: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    @given(st.randoms(use_true_random=False))
    def trial(rng: random.Random) -> None:
        program = write(rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[check(program)] += 1
        except Exception as error:
            if on_mismatch is None:
                raise AssertionError(report(program, error)) from error
            on_mismatch(program, error)
            found["mismatch"] += 1

    trial()
    return found


@pytest.mark.slow
def test_random_programs_do_what_their_stock_twins_do():
    found = try_programs(EXAMPLES, SEED)
    assert found["mismatch"] == 0
    assert found["all"] + found["part"] > 0.4 * found.total(), f"too few programs have fused blocks: {found}"


def _no_activation(monkeypatch):
    run_block = fused_block.run_block
    monkeypatch.setattr(fused_block, "run_block", lambda *args, **kwargs: run_block(*args[:10], None, *args[11:], **kwargs))


def _no_guards(monkeypatch):
    monkeypatch.setattr("lora_edge.nn.fuser.guards.Guards.hold", lambda self, root: True)


def _no_doors(monkeypatch):
    monkeypatch.setattr("lora_edge.nn.fuser.layout.Layout.restore_after", lambda self, node: None)


@pytest.mark.parametrize("fault", [_no_activation, _no_guards, _no_doors])
def test_faults_are_noticed(fault, monkeypatch):
    """The comparison would be worthless if it did not find planted faults."""
    fault(monkeypatch)
    assert try_programs(40, 1, lambda program, error: None)["mismatch"] > 0


def main() -> None:
    """Write a row for each 500 programs: date, machine, versions, seed and outcomes."""
    torch.set_num_threads(1)
    mismatches = 0

    def on_mismatch(program: Program, error: BaseException) -> None:
        print("=" * 100 + "\n" + report(program, error), flush=True)

    for k, start in enumerate(range(0, EXAMPLES, 500)):
        started = time.time()
        found = try_programs(min(500, EXAMPLES - start), SEED + k, on_mismatch)
        mismatches += found["mismatch"]
        row = {
            "date": datetime.date.today().isoformat(), "machine": platform.machine(), "python": platform.python_version(),
            "torch": torch.__version__, "hypothesis": hypothesis.__version__, "seed": SEED + k, "programs": found.total(),
            "fused": found["all"], "fused_in_part": found["part"], "not_fused": found["none"], "mismatches": found["mismatch"],
            "seconds": round(time.time() - started),
        }  # fmt: skip
        is_new = not ROWS.exists()
        with ROWS.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
    sys.exit(bool(mismatches))


if __name__ == "__main__":
    main()
