"""How a method trains: its parameters, loss, optimizer and schedule; and the training step of study, demo and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.finite import NotFiniteError, check_finite, check_variances

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of ``model(x)`` for classes ``y (N,)``, or for soft labels ``y (N, C)``."""
    return F.cross_entropy(model(x), y)


@dataclass
class Training:
    """What a method trains, and how. A plain list of parameters is ``Training(parameters)``.

    Attributes:
        parameters: what the optimizer gets.
        loss: ``loss(model, x, y)``, a scalar. Draws before a forward, several forwards and penalties belong here.
        optimizer: ``optimizer(parameters, lr)``; a method with several rates makes the optimizer's groups here.
        after_step: ``after_step(step, steps)`` after each step of the optimizer, counted from 1, while the gradients are still
            there: schedules, thresholds, swaps of parameters (see :func:`replace_parameter`).
        model: what is trained in the model's place; None for the model itself.
        data: windows and labels that are trained on in the target's place: ``x (N, ...)`` with classes ``(N,)`` or soft labels
            ``(N, C)``; None for the target's.
    """

    parameters: list[nn.Parameter]
    loss: Loss = cross_entropy
    optimizer: MakeOptimizer = torch.optim.Adam
    after_step: Callable[[int, int], None] | None = None
    model: nn.Module | None = None
    data: tuple[Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """The number of trained elements; a parameter that layers share counts once."""
        return sum(p.numel() for p in self.parameters)


def as_training(trained: Training | Iterable[nn.Parameter]) -> Training:
    """Return a :class:`Training` as it is, and parameters as one with Adam and the cross-entropy."""
    return trained if isinstance(trained, Training) else Training(list(trained))


def training_step(
    model: nn.Module,
    training: Training,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    step: int = 1,
    steps: int = 1,
) -> None:
    """Take step number ``step`` of ``steps`` on one batch.

    Raises:
        NotFiniteError: the loss is NaN or infinite; no parameter is changed. The message names ``step`` and, if one is
            not finite, the batch or a weight.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = training.loss(model, x, y)
    if not math.isfinite(value := float(loss.detach())):
        what = f"step {step} of training: the loss is {value}"
        remedy = f"check the windows, or give a smaller learning rate than {optimizer.param_groups[0]['lr']:g}"
        check_finite({"the batch": x, **dict(model.named_parameters())}, what, remedy)  # x itself moves the statistics
        check_variances(model, what, remedy)
        raise NotFiniteError(f"{what}, although all weights are finite; {remedy}")
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if training.after_step is not None:
        training.after_step(step, steps)


def replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let the optimizer train ``new`` in the place of ``old``, whose state (Adam's moments) is dropped.

    Raises:
        ValueError: the optimizer does not train ``old``.
    """
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][place] = new
                optimizer.state.pop(old, None)
                return
    raise ValueError(f"the optimizer does not train this parameter {tuple(old.shape)}; give one of its own")
