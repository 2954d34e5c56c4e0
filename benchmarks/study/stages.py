"""The stages of a study, the runs that each plans, and the rates that the search chooses.

A person's rate is the one with the best mean F1 of two *other* people (1 and 2; for these two, 3 and 4), so it never depends
on that person's test windows.

In the stages of EQUAL each method has the rank at which it trains about as many elements as LoRA-Edge, and all have their axes
turned. ``equal_search`` tries five rates on people 1 and 2. The best of them for new users (protocol A) is the method's own
rate in ``lora_edge.methods``: it is found once and then kept, so a method that has these rows is not searched again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lora_edge.methods import Method, methods

from .problems import SEARCH_PEOPLE, Problem
from .rows import Run

STEPS, LONG_STEPS = 50, 500
SHARES = (0.01, 0.02, 0.05, 0.10)
RATE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
COMPARED = ("full", "head_only", "lora_edge")
OF_FEW = {"rates": ("lora_edge",), "long": COMPARED, "few_shot": COMPARED}  # the methods of a stage, all in the others
EQUAL = ("equal_search", "equal")
STAGES = ("search", "study", "own_rate", "rates", "long", "few_shot", "speed", *EQUAL)
WITH_CURVES = ("study", "own_rate")  # every requested method, and F1 by step
SPEED_ROUNDS, WARM_UP = 20, 3


@dataclass(frozen=True)
class Study:
    """A problem, the methods and stages to run on it, and the file of its rows."""

    problem: Problem
    rows: Path
    device: str = "cpu"
    seeds: int = 3
    rank: int = 2
    methods: Sequence[str] = ()
    stages: Sequence[str] = STAGES
    refused: Sequence[str] = ()  # methods that do not apply to the problem's network

    def chosen(self) -> list[Method]:
        """The requested methods, all of them by default, without those that do not apply."""
        found = methods()
        if "all" in self.methods:
            return [method for name, method in found.items() if name not in self.refused]
        for name in self.methods:
            if name not in found:
                raise ValueError(f"there is no method {name!r}; give all, or some of {', '.join(found)}")
        return [found[name] for name in self.methods or found if name not in self.refused]


def rates(method: Method) -> list[float]:
    """Five rates around the method's own, in steps of about the root of ten."""
    return [float(f"{method.lr * factor:.1g}") for factor in RATE_FACTORS]


def chosen_rate(rows: pd.DataFrame, method: str, rank: int, judges: tuple[int, ...]) -> float:
    """The rate with the best mean F1 of these people in the search; the smallest one of equals."""
    searched = rows[(rows["stage"] == "search") & (rows["method"] == method) & (rows["rank"] == rank)]
    f1 = searched[searched["person"].isin(judges)].groupby("lr")["f1"].mean()
    if f1.empty:
        raise ValueError(f"no search rows of {method} at rank {rank} on people {judges}; run the stage search first")
    return float(f1.idxmax())  # the first, and the groups are sorted


def planned(study: Study, rows: Callable[[], pd.DataFrame], equal_rank: Callable[[Method], int]) -> Iterator[Run]:
    """Every run of the study in order; a stage that needs rates reads them from the rows when it begins.

    ``equal_rank`` gives a method's rank in the stages of EQUAL; it is asked when the method's turn comes.
    """
    chosen = study.chosen()
    if "search" in study.stages:
        for person in sorted({judge for p in study.problem.people for judge in study.problem.judges(p)}):
            for method in chosen:
                for lr in rates(method):
                    yield Run("search", person, 0, method.name, study.rank, lr, STEPS)
    for stage in ("study", "own_rate", "rates", "long", "few_shot"):
        if stage in study.stages:
            yield from _planned_stage(study, stage, rows())
    for stage in EQUAL:
        if stage in study.stages:
            yield from _planned_equal(study, stage, rows(), equal_rank)
    if "speed" in study.stages:
        for method in chosen:
            yield Run("speed", study.problem.people[0], 0, method.name, study.rank, method.lr, SPEED_ROUNDS)


def _planned_stage(study: Study, stage: str, rows: pd.DataFrame) -> Iterator[Run]:
    """The runs of a stage on every person and seed."""
    chosen = [method for method in study.chosen() if stage not in OF_FEW or method.name in OF_FEW[stage]]
    for seed in range(1 if stage == "long" else study.seeds):
        for person in study.problem.people:
            if stage == "study":
                for name in study.problem.without_training:
                    yield Run(stage, person, seed, name, 0, 0.0, 0)
            for method in chosen:
                if stage == "rates":
                    lrs = rates(method)
                elif stage == "own_rate":
                    lrs = [method.lr]
                else:
                    lrs = [chosen_rate(rows, method.name, study.rank, study.problem.judges(person))]
                steps = LONG_STEPS if stage == "long" else STEPS
                for lr, share in itertools.product(lrs, SHARES if stage == "few_shot" else (0.0,)):
                    yield Run(stage, person, seed, method.name, study.rank, lr, steps, share)


def compared_at_equal_count(study: Study) -> list[Method]:
    """The methods of the stages of EQUAL, where all are turned: those that are another one on turned axes are left out."""
    return [m for m in study.chosen() if m.name != "lora_edge_as_worn" and not m.name.endswith("_turned")]


def _planned_equal(study: Study, stage: str, rows: pd.DataFrame, equal_rank: Callable[[Method], int]) -> Iterator[Run]:
    """The runs of a stage of EQUAL, method by method, so that a method's rows are complete as early as possible."""
    searches = stage == "equal_search"
    if searches and study.problem.protocol != "A":
        return
    people = [person for person in study.problem.people if not searches or person in SEARCH_PEOPLE[0]]
    for method in compared_at_equal_count(study):
        if searches and is_searched(rows, method.name, people):
            continue
        rank = equal_rank(method)
        for person in people:
            for lr in rates(method) if searches else [method.lr]:
                yield Run(stage, person, 0, method.name, rank, lr, STEPS)


def is_searched(rows: pd.DataFrame, method: str, people: Sequence[int] = SEARCH_PEOPLE[0]) -> bool:
    """Whether the rows have all rates of a method's equal_search on these people."""
    searched = rows[(rows["stage"] == "equal_search") & (rows["method"] == method)]
    by_person = searched.groupby("person")["lr"].nunique()
    return all(by_person.get(person, 0) >= len(RATE_FACTORS) for person in people)


def searched_rate(rows: pd.DataFrame, method: str) -> float:
    """The rate with the best mean F1 in a method's equal_search; the smallest one of equals."""
    searched = rows[(rows["stage"] == "equal_search") & (rows["method"] == method)]
    if searched.empty:
        raise ValueError(f"no equal_search rows of {method}; run the stage equal_search first")
    return float(searched.groupby("lr")["f1"].mean().idxmax())
