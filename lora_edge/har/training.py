"""Training loops for the source model and for one adaptation, with F1 against time; both stop at NaN or infinity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lora_edge.environment.extras import require
from lora_edge.finite import NotFiniteError, check_weights
from lora_edge.har.data import Windows
from lora_edge.methods.training import Training, as_training, training_step
from lora_edge.nn.training_flags import in_evaluation

BATCH = 64
LARGEST_RATE = 1e30  # not far above it a step of Adam overflows float32


@dataclass
class Curve:
    """Macro-F1 on the test windows against training steps and seconds of set-up and training (evaluation not counted)."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)

    def seconds_to(self, target: float) -> float | None:
        """Return the seconds until the first evaluation that reached ``target``; None if none did."""
        return next((s for s, f1 in zip(self.seconds, self.f1, strict=True) if f1 >= target), None)


def tensors(windows: Windows) -> tuple[Tensor, Tensor]:
    """Return ``x (N, channels, time)`` float32 and ``y (N,)`` int64."""
    return torch.from_numpy(np.ascontiguousarray(windows.x)), torch.from_numpy(windows.y)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield endless index batches of ``min(size, count)``, reshuffled every epoch; a smaller remainder is dropped."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def one_batch(samples: Tensor) -> Tensor:
    """Return the first 64 samples or labels, repeated from the beginning if there are fewer."""
    return samples[torch.arange(BATCH) % len(samples)]


def predict(model: nn.Module, x: Tensor, size: int = 256) -> Tensor:
    """Return the predicted classes ``(N,)`` in evaluation mode; the training flags are restored.

    Raises:
        NotFiniteError: a logit is NaN; the message names the window.
    """
    with torch.no_grad(), in_evaluation(model):
        logits = torch.cat([model(part) for part in x.split(size)])
    odd = logits.isnan().any(dim=1)
    if bool(odd.any()):
        raise NotFiniteError(
            f"the model returns NaN for {int(odd.sum())} of {len(x)} windows, first for window {int(odd.int().argmax())}; "
            "check its weights and the window"
        )
    return logits.argmax(dim=1)


def macro_f1(model: nn.Module, windows: Windows) -> float:
    """Return macro-F1, 0 to 1, over the classes that occur in ``windows``; NotFiniteError if the model returns NaN."""
    try:
        from sklearn.metrics import f1_score
    except ImportError:
        require("the F1 score")
        raise  # installed but broken

    x, y = tensors(windows)
    present = np.unique(windows.y)
    return float(f1_score(y, predict(model, x), labels=present, average="macro", zero_division=0))


def check_rate(lr: float) -> None:
    """Raise ValueError for a learning rate with which Adam could only produce NaN, or that is not positive."""
    if not 0 < lr <= LARGEST_RATE:
        raise ValueError(f"the learning rate is {lr}; give a number above 0, at most {LARGEST_RATE:g}")


def train_source(
    model: nn.Module,
    windows: Windows,
    *,
    epochs: int,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Pre-train ``model`` in place by Adam with a one-cycle rate; calls ``progress(done, total)`` after every step.

    Raises:
        NotFiniteError: the loss or a final weight is NaN or infinite.
    """
    check_rate(lr)
    x, y = tensors(windows)
    steps = epochs * max(1, len(y) // BATCH)
    training = Training(list(model.parameters()))
    optimizer = training.optimizer(training.parameters, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    stream = batches(len(y), BATCH, torch.Generator().manual_seed(seed))
    model.train()
    for done in range(1, steps + 1):
        index = next(stream)
        training_step(model, training, optimizer, x[index], y[index], done, steps)
        schedule.step()
        if progress is not None:
            progress(done, steps)
    check_weights(model, f"after step {steps} of training", f"give a smaller learning rate than {lr:g}")
    return model.eval()


def train_target(
    model: nn.Module,
    training: Training | Sequence[nn.Parameter],
    windows: Windows,
    test: Windows,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    evaluate_every: int = 5,
    setup_seconds: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """Adapt ``model`` at a constant rate; the clock starts at ``setup_seconds`` and pauses during evaluation.

    Every step draws a batch of up to 64 windows. The test windows are only evaluated; no choice depends on them. ``training``
    is what :meth:`lora_edge.methods.Method.begin` returns, or parameters for Adam and the cross-entropy; ``model`` is
    ``training.model`` where there is one.

    Raises:
        NotFiniteError: the loss or a final weight is NaN or infinite, or a test window's logit is NaN.
    """
    check_rate(lr)
    training = as_training(training)
    x, y = tensors(windows) if training.data is None else training.data
    optimizer = training.optimizer(training.parameters, lr)
    stream = batches(len(y), BATCH, torch.Generator().manual_seed(seed))
    curve = Curve([0], [setup_seconds], [macro_f1(model, test)])
    model.train()
    seconds = setup_seconds
    for step in range(1, steps + 1):
        index = next(stream)
        start = time.perf_counter()
        training_step(model, training, optimizer, x[index], y[index], step, steps)
        seconds += time.perf_counter() - start
        if step % evaluate_every == 0 or step == steps:
            curve.step.append(step)
            curve.seconds.append(seconds)
            curve.f1.append(macro_f1(model, test))
        if progress is not None:
            progress(step, steps)
    check_weights(model, f"after step {steps} of training", f"give a smaller learning rate than {lr:g}")
    return curve
