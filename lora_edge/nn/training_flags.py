"""Run a model in evaluation mode and leave its training flags as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Set every module's ``training`` flag to False inside; each flag is restored afterwards.

    The flags are set directly: ``model.eval()`` would run the modules' own ``train`` methods, and ``model.train(True)`` would
    not restore the flags of a model whose modules were in different modes.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
