"""The source model: T-ResNet or your own, checked on the data, with weights loaded, reused or trained."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_edge
from lora_edge.error_text import first_line, in_words
from lora_edge.files.output import make_folder
from lora_edge.files.safetensors_file import own_memory, write_safetensors
from lora_edge.files.state_file import load_state
from lora_edge.finite import check_weights
from lora_edge.har.data import Split, Windows, load_npz, load_watch, split
from lora_edge.har.models import TResNet
from lora_edge.har.settings import Progress, Settings
from lora_edge.har.training import tensors, train_source


def source(settings: Settings, tell: Progress) -> tuple[Split, nn.Module]:
    """Return the split and the source model, loaded, reused or pre-trained; the input is checked before anything is written."""
    task, model = task_and_model(settings)
    make_folder(settings.out)
    if not find_weights(model, settings, task):
        pretrain(model, settings, task, tell)
    return task, model


def task_and_model(settings: Settings) -> tuple[Split, nn.Module]:
    """Return the split and the model with its factory's weights; both, and the rank, are checked."""
    torch.manual_seed(settings.seed)
    windows = load_watch() if settings.data == "watch" else load_npz(settings.data)
    domain = settings.target_domain
    if settings.protocol == "B" and domain is None and settings.data == "watch":
        domain = "left"
    task = split(windows, settings.target_subject, settings.protocol, domain)
    model = build_model(settings.model, task)
    lora_edge.adapt(copy.deepcopy(model), settings.rank)  # refuses a wrong rank before anything is trained or written
    return task, model


def build_model(factory: str | None, task: Split) -> nn.Module:
    """Return T-ResNet for the data, or the model of ``package.module:factory``; checked on two windows.

    The factory is called with ``in_channels`` and ``num_classes`` if it has parameters of these names.

    Raises:
        ValueError: the factory cannot be imported or fails, or its model cannot be copied, does not accept the windows, does
            not return one logit per class, or holds values that cannot be saved or are not finite.
        TypeError: the factory does not return a module.
    """
    shape = {"in_channels": task.test.x.shape[1], "num_classes": len(task.test.classes)}
    model: Any = TResNet(**shape) if factory is None else _call_factory(factory, shape)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {factory} returned a {type(model).__name__}; it must return a torch.nn.Module")
    try:
        twin = copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(f"copy.deepcopy of the model fails, and every method needs a copy: {in_words(error)}") from None
    x, _ = tensors(task.test)
    try:
        with torch.no_grad():
            logits = twin(x[:2])
    except Exception as error:
        raise ValueError(
            f"the model does not accept windows of {tuple(x.shape[1:])} (channels, time): {in_words(error)}"
        ) from None
    wanted = (len(x[:2]), shape["num_classes"])
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returns {got} for {wanted[0]} windows; it must return logits of shape {wanted}")
    own_memory(model.state_dict(), "the model")  # refuses what cannot be saved
    check_weights(model, "the model", "give one with finite weights")
    return model


def find_weights(model: nn.Module, settings: Settings, task: Split) -> bool:
    """Load the user's weights, or those of an earlier run with the same settings, into ``model``; False if there are none."""
    path = settings.weights or source_file(model, settings, task)
    if settings.weights is None and not path.is_file():
        return False
    load_weights(model, path)
    model.eval()
    return True


def pretrain(model: nn.Module, settings: Settings, task: Split, tell: Progress) -> None:
    """Train ``model`` on the other people and write its weights for later runs."""
    path = source_file(model, settings, task)  # before training, which may change the model's repr
    start = time.perf_counter()
    train_source(
        model, task.source, epochs=settings.epochs, seed=settings.seed,
        progress=lambda done, total: tell("pre-training on the other people", done, total),
    )  # fmt: skip
    write_safetensors(model.state_dict(), path)
    tell(f"pre-trained in {time.perf_counter() - start:.0f} s", 1, 1)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into the model.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no state dict or another model's, or NaN, infinity or a negative variance; the message is one
            line. The model is unchanged.
    """
    state = load_state(path)
    own = model.state_dict()
    first_name = {_place(value): name for name, value in reversed(own.items()) if name in state}
    for name, value in own.items():  # the file may hold a shared tensor under one name only
        if name not in state and value.numel() and _place(value) in first_name:
            state[name] = state[first_name[_place(value)]]
    twin = copy.deepcopy(model)
    try:
        twin.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{path}: does not fit the model: {lines[1] if len(lines) > 1 else lines[0]}") from None
    check_weights(twin, str(path), "give finite weights")
    model.load_state_dict(state)


def source_file(model: nn.Module, settings: Settings, task: Split) -> Path:
    """Return the path of the weights that were pre-trained with these settings."""
    return settings.out / f"source-{_source_key(model, settings, task.source)}.safetensors"


def _place(value: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors that share memory, sizes and strides."""
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _call_factory(factory: str, shape: dict[str, int]) -> Any:
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise ValueError(f"--model is {factory!r}; give package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {factory}: {first_line(error)}; give package.module:factory, importable from here") from None
    except Exception as error:  # importing runs the module's own code
        raise ValueError(f"--model {factory}: cannot be imported: {in_words(error)}") from None
    finally:
        sys.path.pop(0)
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        names = {}  # type: ignore[assignment]
    try:
        return function(**{key: value for key, value in shape.items() if key in names})
    except Exception as error:
        raise ValueError(f"--model {factory}: the factory failed: {in_words(error)}") from None


def _source_key(model: nn.Module, settings: Settings, source: Windows) -> str:
    digest = hashlib.sha256()
    digest.update(f"{settings.model} {settings.epochs} {settings.seed} {model}".encode())
    digest.update(source.x.tobytes())
    digest.update(source.y.tobytes())
    return digest.hexdigest()[:12]
