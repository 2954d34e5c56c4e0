"""What the study adapts to: a task for each person and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from lora_edge.har.data import Split
from lora_edge.har.settings import Settings
from lora_edge.har.source import source

from .rows import WITHOUT_TRAINING, Run

SEARCH_PEOPLE = ((1, 2), (3, 4))


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
        """The people whose search chooses this person's rates; their test windows are never this person's."""
        ...

    def task(self, run: Run, tell: Callable[[str], None]) -> tuple[Split, nn.Module]:
        """The split of a run's person and the model to adapt, by the run's seed."""
        ...


@dataclass(frozen=True)
class Activities:
    """Each person's activities from the model of the others, pre-trained once per person and seed and kept in ``sources``."""

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


def few_shot(task: Split, share: float) -> Split:
    """The split with only the first windows of each recording of the adaptation part: at least one, at most ``share`` of it.

    ``share`` counts from the whole recording, of which the adaptation part is the first 30 %.
    """
    keep = task.adapt.position[:, 1] <= share
    keep |= task.adapt.position[:, 0] <= task.adapt.position[:, 0].min()  # the first window of each recording
    return replace(task, adapt=task.adapt.where(keep))
