"""Look at a model in evaluation mode without leaving a trace on its training flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Every module's ``training`` flag is False inside and what it was afterwards.

    The flags are set directly: ``model.eval()`` would run the modules' own ``train`` methods, and ``model.train(True)`` would
    not give back the flags of a model that was in both modes.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
