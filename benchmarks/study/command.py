"""``python -m benchmarks.study``: every method on every person left out, one row per run, resumable.

Stages, each a value of the column ``stage``:

    search    five learning rates per method, on two people, one seed
    study     every person and seed at the rate that the search chose, 50 steps
    own_rate  the same at the method's own rate, without a search
    rates     LoRA-Edge at all five rates on every person and seed, to compare its own rate with the best; chooses no rate
    long      the compared few to convergence, 500 steps, one seed
    few_shot  the compared few on the first 1, 2, 5 and 10 % of each of the target's recordings, at least one window of each
    speed     seconds of a method's set-up and of a step, all methods in turn in each of some rounds
    equal_search, equal
              every method at the rank whose trained count is nearest to LoRA-Edge's, axes turned, one seed: five rates on
              people 1 and 2, then every person at the method's own rate

A run whose loss or weights become NaN counts as an F1 of 0. A method that has nothing to train in the network, such as BN only
without a BatchNorm, is reported and left out. Only the stage ``speed`` is timed: the others may run beside other work. Rows go
to ``results/<device>/study_<data>_<protocol>.csv`` one by one; runs whose rows exist are not repeated.
``benchmarks.study.report`` makes the tables and the picture from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from lora_edge.environment.machine import describe_machine
from lora_edge.error_text import first_line
from lora_edge.har.data import Split
from lora_edge.methods import Method

from .measure import equal_rank, measure, speeds, without_refused
from .problems import Activities, Problem
from .rows import Run, append_row, key_of, read_rows
from .stages import STAGES, Study, planned


def run_study(study: Study, tell: Callable[[str], None] = print) -> int:
    """Do the runs whose rows are missing; returns how many there were."""
    rows = read_rows(study.rows)
    done = {key_of(row) for row in rows.to_dict("records")}
    loaded: tuple[tuple[int, int, bool], Split, nn.Module] | None = None
    timed: dict[str, dict[str, float]] = {}
    count = 0

    @cache
    def first_task() -> tuple[Split, nn.Module]:
        return study.problem.task(Run("study", study.problem.people[0], 0, "zero_shot", 0, 0.0, 0), tell)

    if not {method.name for method in study.chosen()} <= set(rows["method"]):
        study = without_refused(study, *first_task(), tell)

    def rank_of(method: Method) -> int:
        return equal_rank(study, method, *first_task(), tell)

    for run in planned(study, lambda: read_rows(study.rows), rank_of):
        if key_of(run._asdict()) in done:
            continue
        key = (run.person, run.seed, run.stage == "search")
        if loaded is None or loaded[0] != key:
            loaded = (key, *study.problem.task(run, tell))
        if run.stage == "speed" and not timed:
            timed = speeds(study, [study.problem.task(run._replace(person=person), tell) for person in study.problem.people])
        found: dict[str, Any] = timed[run.method] if run.stage == "speed" else measure(study, run, loaded[1], loaded[2])
        about = {"device": study.device, "data": study.problem.name, "protocol": study.problem.protocol}
        append_row(study.rows, {**describe_machine(), **about, **run._asdict(), **found})
        count += 1
        result = f"F1 {found['f1']:.3f}" if "f1" in found else f"{1000 * found['step_seconds']:.0f} ms per step"
        tell(f"{run.stage} person {run.person} seed {run.seed} {run.method} lr {run.lr:g}: {result}")
    return count


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every study."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=[], help="names, or all, the default")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the rows")
    parser.add_argument("--device", default="cpu", help="folder of the results")


def run_problem(problem: Problem, options: argparse.Namespace) -> int:
    """Study a problem by the options of :func:`add_options`; 2 with one line on standard error for bad input."""
    rows = options.results / options.device / f"study_{problem.name}_{problem.protocol}.csv"
    study = Study(
        problem, rows, device=options.device, seeds=options.seeds, rank=options.rank, methods=options.methods,
        stages=options.stages,
    )  # fmt: skip
    try:
        print(f"{run_study(study, lambda line: print(line, flush=True))} runs; rows in {rows}")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"study: error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="watch", help='an .npz, or "watch"')
    parser.add_argument("--protocol", choices=["A", "B"], default="B")
    parser.add_argument("--target-domain", help="protocol B of an .npz: the target's domain")
    parser.add_argument("--people", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--model", help="package.module:factory of another network than the T-ResNet")
    parser.add_argument("--sources", type=Path, default=Path("study-sources"), help="folder of the source models")
    add_options(parser)
    options = parser.parse_args()
    problem = Activities(
        options.data, options.protocol, options.sources, options.people, options.target_domain, model=options.model
    )
    return run_problem(problem, options)
