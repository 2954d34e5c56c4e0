"""``python -m benchmarks.study``: every method on every person left out, a row a run, resumable.

Stages, each a value of the column ``stage``:

    search    five learning rates a method, on two people, one seed
    study     every person and seed at the rate that the search chose, 50 steps
    own_rate  the same at the rate that the method itself names, as whoever has nobody to search on uses it
    rates     LoRA-Edge at all five rates on every person and seed: how far its own is from the best; no rate is chosen by it
    long      the compared few to convergence, 500 steps, one seed
    few_shot  the compared few on the first 1, 2, 5 and 10 % of each of the target's recordings, at least one window of each
    speed     seconds of what a method does before the first step and of a step, all methods in turn in each of some rounds

A person's rate is the one with the best mean F1 of two *other* people (1 and 2; for these two, 3 and 4), so it never depends
on that person's test windows. A run whose loss or weights become NaN counts as an F1 of 0. A method that has nothing to train
in the network, as BN only without a BatchNorm, is named and left out. Only the stage ``speed`` is timed: the others may run
beside other work. Rows go to ``results/<device>/study_<data>_<protocol>.csv`` one by one; what is there is not run again.
``benchmarks.study.report`` makes the table and the picture from them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from lora_edge.environment.extras import require
from lora_edge.environment.machine import machine
from lora_edge.error_text import first_line
from lora_edge.finite import NotFiniteError
from lora_edge.har.data import Split
from lora_edge.har.frame import find_turn, mirrored, turned
from lora_edge.har.settings import Settings
from lora_edge.har.source import source
from lora_edge.har.training import macro_f1, one_batch, tensors, train_target, training_step
from lora_edge.memory import saved_bytes
from lora_edge.methods import Method, methods
from lora_edge.methods.base import NotApplicableError

STEPS, LONG_STEPS = 50, 500
SHARES = (0.01, 0.02, 0.05, 0.10)
COMPARED = ("full", "head_only", "lora_edge")
OF_FEW = {"rates": ("lora_edge",), "long": COMPARED, "few_shot": COMPARED}  # the methods of a stage, all in the others
SEARCH_PEOPLE = ((1, 2), (3, 4))
WITHOUT_TRAINING = ("zero_shot", "mirrored")
STAGES = ("search", "study", "own_rate", "rates", "long", "few_shot", "speed")
WITH_CURVES = ("study", "own_rate")  # every method asked for, and F1 by step
SPEED_ROUNDS, WARM_UP = 20, 3
KEY = ("stage", "person", "seed", "method", "rank", "lr", "steps", "share")
FIELDS = (
    "device", "date", "lora_edge", "torch", "threads", "data", "protocol", *KEY, "trainable", "share_percent", "saved_bytes",
    "f1", "curve", "setup_seconds", "step_seconds", "step_over_full",
)  # fmt: skip


class Run(NamedTuple):
    """What identifies a row. ``share``: of each of the target's recordings, 0 for the whole adaptation part."""

    stage: str
    person: int
    seed: int
    method: str
    rank: int
    lr: float
    steps: int
    share: float = 0.0


class Problem(Protocol):
    """What is adapted to: a task for each person and seed."""

    @property
    def name(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    @property
    def people(self) -> Sequence[int]: ...
    @property
    def without_training(self) -> Sequence[str]:
        """Rows that need no training."""
        ...

    @property
    def evaluate_every(self) -> int:
        """Steps from one point of a row's curve to the next."""
        ...

    def judges(self, person: int) -> tuple[int, ...]:
        """Whose search chooses this person's rates; their test windows are never this person's."""
        ...

    def task(self, run: Run, tell: Callable[[str], None]) -> tuple[Split, nn.Module]:
        """The split of a run's person and the model to adapt, by the run's seed."""
        ...


@dataclass(frozen=True)
class Activities:
    """Each person's activities from the model of the others, pre-trained once a person and seed and kept in ``sources``."""

    data: str
    protocol: str
    sources: Path
    people: Sequence[int]
    target_domain: str | None = None
    epochs: int = 10
    evaluate_every: int = 2
    model: str | None = None  # package.module:factory, the T-ResNet by default

    @property
    def name(self) -> str:
        factory = self.model and self.model.rpartition(":")[2]
        return "_".join(part for part in (Path(self.data).stem, self.target_domain, factory) if part)

    @property
    def without_training(self) -> Sequence[str]:
        return WITHOUT_TRAINING if self.data == "watch" and self.protocol == "B" else WITHOUT_TRAINING[:1]

    def judges(self, person: int) -> tuple[int, ...]:
        """Two others."""
        first, second = SEARCH_PEOPLE
        return tuple(p for p in (second if person in first else first) if p in self.people)

    def task(self, run: Run, tell: Callable[[str], None]) -> tuple[Split, nn.Module]:
        settings = Settings(
            data=self.data, target_subject=run.person, protocol=self.protocol, target_domain=self.target_domain,
            model=self.model, out=self.sources, seed=run.seed, epochs=self.epochs, rank=max(1, run.rank),
        )  # fmt: skip
        return source(
            settings, lambda title, done, total: tell(f"person {run.person} seed {run.seed}: {title}") if total == 1 else None
        )


@dataclass(frozen=True)
class Study:
    """What is studied how, and where its rows lie."""

    problem: Problem
    rows: Path
    device: str = "cpu"
    seeds: int = 3
    rank: int = 2
    methods: Sequence[str] = ()
    stages: Sequence[str] = STAGES
    refused: Sequence[str] = ()  # methods that do not apply to the problem's network

    def chosen(self) -> list[Method]:
        """The methods asked for, all of them by default, without those that do not apply."""
        found = methods()
        for name in self.methods:
            if name not in found:
                raise ValueError(f"there is no method {name!r}; give some of {', '.join(found)}")
        return [found[name] for name in self.methods or found if name not in self.refused]


def rates(method: Method) -> list[float]:
    """Five rates around the method's own, in steps of about the root of ten."""
    return [float(f"{method.lr * factor:.1g}") for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]


def chosen_rate(rows: list[dict[str, str]], method: str, rank: int, judges: tuple[int, ...]) -> float:
    """The rate with the best mean F1 of these people in the search; of equals the smaller."""
    f1: dict[float, list[float]] = {}
    for row in rows:
        same = (row["stage"], row["method"], row["rank"]) == ("search", method, str(rank))
        if same and int(row["person"]) in judges:
            f1.setdefault(float(row["lr"]), []).append(float(row["f1"]))
    if not f1:
        raise ValueError(f"no search rows of {method} at rank {rank} on people {judges}; run the stage search first")
    return min(f1, key=lambda lr: (-mean(f1[lr]), lr))


def planned(study: Study, rows: Callable[[], list[dict[str, str]]]) -> Iterator[Run]:
    """Every run of the study in order; a stage that needs rates reads them from the rows when it comes to them."""
    chosen = [method for method in study.chosen() if method.name not in study.refused]
    if "search" in study.stages:
        for person in sorted({judge for p in study.problem.people for judge in study.problem.judges(p)}):
            for method in chosen:
                for lr in rates(method):
                    yield Run("search", person, 0, method.name, study.rank, lr, STEPS)
    for stage in ("study", "own_rate", "rates", "long", "few_shot"):
        if stage not in study.stages:
            continue
        for seed in range(1 if stage == "long" else study.seeds):
            for person in study.problem.people:
                if stage == "study":
                    for name in study.problem.without_training:
                        yield Run(stage, person, seed, name, 0, 0.0, 0)
                for method in chosen:
                    if method.name in study.refused or (stage in OF_FEW and method.name not in OF_FEW[stage]):
                        continue
                    if stage == "rates":
                        lrs = rates(method)
                    elif stage == "own_rate":
                        lrs = [method.lr]
                    else:
                        lrs = [chosen_rate(rows(), method.name, study.rank, study.problem.judges(person))]
                    steps = LONG_STEPS if stage == "long" else STEPS
                    for lr, share in itertools.product(lrs, SHARES if stage == "few_shot" else (0.0,)):
                        yield Run(stage, person, seed, method.name, study.rank, lr, steps, share)
    if "speed" in study.stages:
        for method in chosen:
            if method.name not in study.refused:
                yield Run("speed", study.problem.people[0], 0, method.name, study.rank, method.lr, SPEED_ROUNDS)


def without_refused(study: Study, task: Split, base: nn.Module, tell: Callable[[str], None]) -> Study:
    """The study without the methods that have nothing to train in its network, each of which is told."""
    x, y = tensors(task.adapt)
    refused = []
    for method in study.chosen():
        try:
            method.prepare(copy.deepcopy(base), study.rank, x, y)
        except NotApplicableError as error:
            refused.append(method.name)
            tell(f"{method.name} is left out: {error}")
    return replace(study, refused=refused)


def few_shot(task: Split, share: float) -> Split:
    """The split with only the first windows of each recording of the adaptation part: at least one, at most ``share`` of it.

    ``share`` counts from the whole recording, of which the adaptation part is the first 30 %.
    """
    keep = task.adapt.position[:, 1] <= share
    keep |= task.adapt.position[:, 0] <= task.adapt.position[:, 0].min()  # the first window of each recording
    return replace(task, adapt=task.adapt.where(keep))


def measure(study: Study, run: Run, task: Split, base: nn.Module) -> dict[str, Any]:
    """One run; its columns beside those that identify it."""
    if run.method == "zero_shot":
        return {"f1": macro_f1(base, task.test)}
    if run.method == "mirrored":
        return {"f1": macro_f1(base, mirrored(task).test)}
    if run.share:
        task = few_shot(task, run.share)
    torch.manual_seed(run.seed)
    model, method = copy.deepcopy(base), methods()[run.method]
    if method.turns:
        task = turned(task, find_turn(base, task))
    x, y = tensors(task.adapt)
    parameters = method.prepare(model, run.rank, x, y)
    model.train()
    trainable = sum(p.numel() for p in parameters)
    found = {
        "trainable": trainable,
        "share_percent": 100 * trainable / sum(p.numel() for p in base.parameters()),
        "saved_bytes": saved_bytes(copy.deepcopy(model), one_batch(x)),
    }
    every = study.problem.evaluate_every if run.stage in WITH_CURVES else run.steps
    try:
        curve = train_target(
            model, parameters, task.adapt, task.test, steps=run.steps, lr=run.lr, seed=run.seed, evaluate_every=every
        )
        method.finish(model)
        f1 = macro_f1(model, task.test)
    except NotFiniteError:
        return {**found, "f1": 0.0}
    return {**found, "f1": f1, "curve": " ".join(f"{s}:{f1:.4f}" for s, f1 in zip(curve.step, curve.f1, strict=True))}


def speeds(study: Study, tasks: Sequence[tuple[Split, nn.Module]]) -> dict[str, dict[str, float]]:
    """The columns of the stage ``speed`` by method: medians over rounds of a set-up and a step of each method in turn.

    Each round's set-up is the next task's, since some people's axes take longer to find; the steps are the first one's.
    ``step_over_full`` is the median of a round's ratio to full fine-tuning, ``setup_seconds`` are those of turning
    the axes, where the method does, and of ``prepare``.
    """
    x, y = tensors(tasks[0][0].adapt)
    chosen = {"full": methods()["full"], **{method.name: method for method in study.chosen()}}
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for name, method in chosen.items():
        model = copy.deepcopy(tasks[0][1])
        optimizer = torch.optim.Adam(method.prepare(model, study.rank, x, y), lr=method.lr)
        trained[name] = model.train(), optimizer
    setups: dict[str, list[float]] = {name: [] for name in chosen}
    steps: dict[str, list[float]] = {name: [] for name in chosen}
    for done in range(WARM_UP + SPEED_ROUNDS):
        task, base = tasks[done % len(tasks)]
        for name, method in chosen.items():
            fresh = copy.deepcopy(base)
            start = time.perf_counter()
            mine = turned(task, find_turn(base, task)) if method.turns else task
            method.prepare(fresh, study.rank, *tensors(mine.adapt))
            between = time.perf_counter()
            training_step(*trained[name], one_batch(x), one_batch(y))
            end = time.perf_counter()
            if done >= WARM_UP:
                setups[name].append(between - start)
                steps[name].append(end - between)
    return {
        name: {
            "setup_seconds": median(setups[name]),
            "step_seconds": median(steps[name]),
            "step_over_full": median(own / full for own, full in zip(steps[name], steps["full"], strict=True)),
        }
        for name in chosen
    }


def run_study(study: Study, tell: Callable[[str], None] = print) -> int:
    """Run what is missing; returns how many runs that were."""
    rows = read_rows(study.rows)
    done = {key_of(row) for row in rows}
    loaded: tuple[tuple[int, int, bool], Split, nn.Module] | None = None
    timed: dict[str, dict[str, float]] = {}
    count = 0
    if any(all(row["method"] != method.name for row in rows) for method in study.chosen()):
        first = Run("study", study.problem.people[0], 0, "zero_shot", 0, 0.0, 0)
        study = without_refused(study, *study.problem.task(first, tell), tell)
    for run in planned(study, lambda: rows):
        if key_of(run._asdict()) in done:
            continue
        key = (run.person, run.seed, run.stage == "search")
        if loaded is None or loaded[0] != key:
            loaded = (key, *study.problem.task(run, tell))
        if run.stage == "speed" and not timed:
            timed = speeds(study, [study.problem.task(run._replace(person=person), tell) for person in study.problem.people])
        found: dict[str, Any] = {
            **machine(), "device": study.device, "data": study.problem.name, "protocol": study.problem.protocol,
            **run._asdict(), **(timed[run.method] if run.stage == "speed" else measure(study, run, loaded[1], loaded[2])),
        }  # fmt: skip
        row = {name: _text(found.get(name, "")) for name in FIELDS}
        append_row(study.rows, row)
        rows.append(row)
        count += 1
        result = f"F1 {found['f1']:.3f}" if "f1" in found else f"{1000 * found['step_seconds']:.0f} ms a step"
        tell(f"{run.stage} person {run.person} seed {run.seed} {run.method} lr {run.lr:g}: {result}")
    return count


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that are there, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, str]) -> None:
    """Add a row to the file, which is made with its head where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's identity as the file spells it."""
    return tuple(_text(row[name]) if not isinstance(row[name], str) else row[name] for name in KEY)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every study."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=[], help="default: all")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the rows")
    parser.add_argument("--device", default="cpu", help="folder of the results")


def run_problem(problem: Problem, options: argparse.Namespace) -> int:
    """Study a problem by :func:`add_options`' options; 2 with a line on standard error where the input is bad."""
    rows = options.results / options.device / f"study_{problem.name}_{problem.protocol}.csv"
    study = Study(
        problem, rows, device=options.device, seeds=options.seeds, rank=options.rank, methods=options.methods,
        stages=options.stages,
    )  # fmt: skip
    try:
        require("the study")
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
