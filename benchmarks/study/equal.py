"""Every method at equal trained count: the table of the stage ``equal``, and what it says of the claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from lora_edge.methods import methods

from ..markdown import table
from .claims import CLAIMS
from .studies import WATCH, StudyRows
from .summary import by_person, interval, title_of
from .tables import signed

OWN, FULL = "lora_edge", "full"
TITLES = ("A: new user", "B: other wrist")


@dataclass(frozen=True)
class Equal:
    """The rows of the stage ``equal`` of the watch data, of the methods that have every person in both protocols."""

    a: pd.DataFrame
    b: pd.DataFrame

    @cached_property
    def f1(self) -> tuple[dict[str, pd.Series], dict[str, pd.Series]]:
        """F1 by person of each method, in A and in B."""
        found = [
            {str(name): by_person(rows.set_index("person")["f1"]) for name, rows in part.groupby("method")}
            for part in (self.a, self.b)
        ]
        return found[0], found[1]

    @cached_property
    def names(self) -> list[str]:
        """The methods, the best mean F1 of both protocols first."""
        a, b = self.f1
        most = max((len(scores) for scores in (*a.values(), *b.values())), default=0)
        whole = [name for name in a if len(a[name]) == most and name in b and len(b[name]) == most]
        return sorted(whole, key=lambda name: (-self.mean(name), name))

    def mean(self, name: str) -> float:
        """The mean F1 of both protocols."""
        return float(sum(part[name].mean() for part in self.f1) / 2)

    def row(self, name: str) -> Any:
        """A row of the method in B, for what all of its rows have in common."""
        return self.b[self.b["method"] == name].iloc[-1]

    def minus(self, name: str, other: str) -> list[tuple[float, float]]:
        """Points and their interval of a method beside another, paired by person, in A and in B."""
        return [interval(100 * (part[name] - part[other]).dropna()) for part in self.f1]


def equal_rows(studies: Mapping[str, StudyRows]) -> Equal:
    """The rows of both protocols; empty where there are none."""
    none = pd.DataFrame({name: [] for name in ("stage", "method", "person", "f1")})
    parts = [studies[name].rows if name in studies else none for name in WATCH]
    return Equal(*(rows[rows["stage"] == "equal"] for rows in parts))


def equal_table(equal: Equal) -> str:
    """One row per method, the best mean F1 first."""
    lines = []
    for name in equal.names:
        row = equal.row(name)
        cells = [title_of(name), f"`{name}`", int(row["rank"]), f"{row['lr']:g}", f"{int(row['trainable']):,}"]
        cells += [f"{row['saved_bytes'] / 1e6:.2f} MB", "yes" if methods()[name].merges else "no"]
        for place, scores in enumerate(equal.f1):
            cells.append(f"{scores[name].mean():.3f}")
            for other in (FULL, OWN):
                both = name != other and other in equal.names
                cells.append(signed(*equal.minus(name, other)[place]) if both else "-")
        lines.append(cells)
    head = ["method", "name", "rank", "rate", "trained", "stored for backward", "merges"]
    for title in TITLES:
        head += [f"{title}, macro-F1", "minus full, points", "minus LoRA-Edge, points"]
    return table(head, lines)


def verdict(measured: list[tuple[float, float]], at_least: float) -> str:
    """What both protocols say of a claim of at least so many points: by the 95 % intervals, then by the means."""
    if all(middle - half >= at_least for middle, half in measured):
        return "confirmed"
    if any(middle + half < at_least for middle, half in measured):
        return "not confirmed"
    holds = all(middle >= at_least for middle, _ in measured)
    return "holds in the mean, within the noise" if holds else "undecided"


def claims_table(equal: Equal) -> str:
    """What the papers claim of the methods, what was measured here in A and B, and whether that confirms it."""
    lines = []
    for claim in CLAIMS:
        names = {claim.method, claim.other}
        if claim.other and names <= set(equal.names):
            measured = equal.minus(claim.method, claim.other)
            cells = [" / ".join(signed(*points) for points in measured), verdict(measured, claim.at_least)]
        elif claim.other:
            cells = ["not run yet", "-"]
        else:
            cells = [claim.elsewhere, "-"]
        beside = f"`{claim.other}`, at least {claim.at_least:+g}" if claim.other else "-"
        lines.append([f"`{claim.method}`", claim.text, beside, *cells])
    return table(("method", "the paper's claim, restated", "beside", "measured: A / B, points", "confirmed"), lines)
