"""One run of the study: what is measured of a method on a task."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from lora_edge.finite import NotFiniteError
from lora_edge.har.data import Split
from lora_edge.har.frame import find_turn, mirrored, turned
from lora_edge.har.training import macro_f1, one_batch, tensors, train_target
from lora_edge.memory import saved_bytes
from lora_edge.methods import Method, methods
from lora_edge.methods.base import NotApplicableError
from lora_edge.methods.equal_count import nearest_rank
from lora_edge.methods.training import Training, training_step

from .problems import few_shot
from .rows import Run, read_rows
from .stages import EQUAL, SPEED_ROUNDS, WARM_UP, WITH_CURVES, Study


def without_refused(study: Study, task: Split, base: nn.Module, tell: Callable[[str], None]) -> Study:
    """The study without the methods that have nothing to train in its network, each of which is reported."""
    x, y = tensors(task.adapt)
    refused = []
    for method in study.chosen():
        try:
            method.begin(copy.deepcopy(base), study.rank, x, y)
        except NotApplicableError as error:
            refused.append(method.name)
            tell(f"{method.name} is left out: {error}")
    return replace(study, refused=refused)


def equal_rank(study: Study, method: Method, task: Split, base: nn.Module, tell: Callable[[str], None]) -> int:
    """The rank at which a method trains about as many elements as LoRA-Edge at the study's rank.

    A method that has rows of the stages of EQUAL keeps its rank.
    """
    rows = read_rows(study.rows)
    known = rows[rows["stage"].isin(EQUAL) & (rows["method"] == method.name)]
    if len(known):
        return int(known["rank"].iloc[0])
    x, y = tensors(task.adapt)
    count = methods()["lora_edge"].begin(copy.deepcopy(base), study.rank, x, y).count
    rank = nearest_rank(method, base, count, x, y) or study.rank
    tell(f"{method.name}: rank {rank} is nearest to {count} trained elements")
    return rank


def measure(study: Study, run: Run, task: Split, base: nn.Module) -> dict[str, Any]:
    """Do one run and return its columns except those that identify it. A run that becomes NaN has an F1 of 0."""
    if run.method == "zero_shot":
        return {"f1": macro_f1(base, task.test)}
    if run.method == "mirrored":
        return {"f1": macro_f1(base, mirrored(task).test)}
    if run.share:
        task = few_shot(task, run.share)
    torch.manual_seed(run.seed)
    model, method = copy.deepcopy(base), methods()[run.method]
    if method.turns or run.stage in EQUAL:
        task = turned(task, find_turn(base, task))
    x, y = tensors(task.adapt)
    training = method.begin(model, run.rank, x, y)
    trained = (training.model or model).train()
    found = {
        "trainable": training.count,
        "share_percent": 100 * training.count / sum(p.numel() for p in base.parameters()),
        "saved_bytes": saved_bytes(copy.deepcopy(trained), one_batch(x)),
    }
    every = study.problem.evaluate_every if run.stage in WITH_CURVES else run.steps
    try:
        curve = train_target(
            trained, training, task.adapt, task.test, steps=run.steps, lr=run.lr, seed=run.seed, evaluate_every=every
        )
        method.finish(model)
        f1 = macro_f1(model, task.test)
    except NotFiniteError:
        return {**found, "f1": 0.0}
    return {**found, "f1": f1, "curve": " ".join(f"{s}:{f1:.4f}" for s, f1 in zip(curve.step, curve.f1, strict=True))}


def speeds(study: Study, tasks: Sequence[tuple[Split, nn.Module]]) -> dict[str, dict[str, float]]:
    """The columns of the stage ``speed`` by method: medians over rounds of a set-up and a step of each method in turn.

    Each round sets up the next task, since some people's axes take longer to find; the steps are those of the first task.
    ``step_over_full`` is the median of a round's ratio to full fine-tuning, ``setup_seconds`` covers turning the axes, where
    the method does, and ``prepare``.
    """
    x, y = tensors(tasks[0][0].adapt)
    chosen = {"full": methods()["full"], **{method.name: method for method in study.chosen()}}
    trained: dict[str, tuple[nn.Module, Training, torch.optim.Optimizer]] = {}
    for name, method in chosen.items():
        model = copy.deepcopy(tasks[0][1])
        training = method.begin(model, study.rank, x, y)
        trained[name] = (training.model or model).train(), training, training.optimizer(training.parameters, method.lr)
    setups: dict[str, list[float]] = {name: [] for name in chosen}
    steps: dict[str, list[float]] = {name: [] for name in chosen}
    for done in range(WARM_UP + SPEED_ROUNDS):
        task, base = tasks[done % len(tasks)]
        for name, method in chosen.items():
            fresh = copy.deepcopy(base)
            start = time.perf_counter()
            mine = turned(task, find_turn(base, task)) if method.turns else task
            method.begin(fresh, study.rank, *tensors(mine.adapt))
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
