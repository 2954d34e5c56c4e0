"""The main job: adapt a source model to one person, compare methods, write the adapter, the merged model and the picture.

``make demo`` and ``lora-edge adapt`` both run :func:`run`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_edge
from lora_edge.adapter_file import save_adapter
from lora_edge.har.data import Split, Windows, load_npz, load_watch, split
from lora_edge.har.frame import MIRRORED_CHANNELS, find_turn, mirrored, named, turned
from lora_edge.har.models import TResNet
from lora_edge.har.train import Curve, macro_f1, one_batch, tensors, train_source, train_target
from lora_edge.memory import saved_bytes
from lora_edge.methods import Method, methods
from lora_edge.safetensors_file import write_safetensors
from lora_edge.state_file import load_state

TARGET_SHARE = 0.95  # "seconds to the target F1": of what full fine-tuning reaches


@dataclass(frozen=True)
class Settings:
    """What one run does; the command line's options."""

    data: str
    target_subject: int
    out: Path
    protocol: str = "A"
    target_domain: str | None = None
    model: str | None = None
    weights: Path | None = None
    rank: int = 2
    steps: int = 50
    epochs: int = 10
    lr: float | None = None
    seed: int = 0
    method: str = "lora_edge"


@dataclass
class Row:
    """One row of the table; None where a column has no meaning. ``axes``: what the model takes as each channel, such as -ax."""

    name: str
    title: str
    f1: float
    trainable: int = 0
    share_percent: float = 0.0
    saved_bytes: int | None = None
    lr: float | None = None
    seconds: float | None = None
    seconds_to_target: float | None = None
    curve: Curve | None = None
    axes: list[str] | None = None


@dataclass
class Report:
    """The outcome of a run, as ``results.json`` holds it.

    A model takes a raw window as ``(window[axes] - mean) / std``: the axes of its row, mean and std of ``normalisation``.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    windows: dict[str, int]
    normalisation: dict[str, list[float]]
    target_f1: float | None
    rows: list[Row] = field(default_factory=list)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


Progress = Callable[[str, int, int], None]


def run(settings: Settings, progress: Progress | None = None) -> Report:
    """Pre-train (or load) the source model, adapt it by every method, write the files of ``settings.method``.

    Files: ``adapter.safetensors``, ``merged.safetensors`` (a plain state dict), ``results.json``, ``f1_over_time.png`` and
    ``source-*.safetensors``, which a second run reuses.

    Args:
        settings: what to do.
        progress: called as ``progress(title, done, total)``.

    Raises:
        ValueError, TypeError, OSError: bad data, an absent subject, a model that does not fit, an unwritable folder.
    """
    tell = progress or (lambda title, done, total: None)
    available = methods()
    forms = [name for name in available if name.startswith("lora_edge")]
    if settings.method not in forms:
        raise ValueError(f"method is {settings.method!r}; give a form of LoRA-Edge: {', '.join(forms)}")
    task, model = source(settings, tell)
    report = Report(
        settings={**asdict(settings), "out": str(settings.out), "weights": settings.weights and str(settings.weights)},
        machine=machine(),
        windows={"source": len(task.source), "adapt": len(task.adapt), "test": len(task.test)},
        normalisation={"mean": task.mean.tolist(), "std": task.std.tolist()},
        target_f1=None,
    )
    report.rows.append(Row("zero_shot", "zero-shot", macro_f1(model, task.test)))
    if set(MIRRORED_CHANNELS) <= set(task.test.channels) and settings.protocol == "B":
        report.rows.append(Row("mirrored", "mirrored input", macro_f1(model, mirrored(task).test)))
    for name in dict.fromkeys(("head_only", "bn_only", "full", "lora_edge", settings.method)):
        keep = settings.out if name == settings.method else None
        report.rows.append(adapt_by(available[name], model, task, settings, tell, keep))
    if report.row("lora_edge").axes != task.test.channels:
        report.rows.append(adapt_by(available["full_turned"], model, task, settings, tell))
    report.target_f1 = set_seconds_to_target(report.rows)
    write_text(settings.out / "results.json", json.dumps(asdict(report), indent=1) + "\n")
    return report


def source(settings: Settings, tell: Progress) -> tuple[Split, nn.Module]:
    """The split and the source model, pre-trained, loaded or reused; nothing is written before the input was checked."""
    torch.manual_seed(settings.seed)
    windows = load_watch() if settings.data == "watch" else load_npz(settings.data)
    domain = settings.target_domain
    if settings.protocol == "B" and domain is None and settings.data == "watch":
        domain = "left"
    task = split(windows, settings.target_subject, settings.protocol, domain)
    model = build_model(settings.model, task)
    lora_edge.adapt(copy.deepcopy(model), settings.rank)  # a wrong rank shows before anything is trained or written
    make_folder(settings.out)
    get_source_model(model, settings, task, tell)
    return task, model


def set_seconds_to_target(rows: list[Row]) -> float:
    """Fill in each row's seconds to the target F1, 95 % of what full fine-tuning reached; returns that F1."""
    target = TARGET_SHARE * next(row.f1 for row in rows if row.name == "full")
    for row in rows:
        if row.curve is not None:
            row.seconds_to_target = row.curve.seconds_to(target)
    return target


def adapt_by(method: Method, base: nn.Module, task: Split, settings: Settings, tell: Progress, keep: Path | None = None) -> Row:
    """Adapt a copy of ``base`` by one method; the adapter and the merged model of an adapted one are written to ``keep``."""
    torch.manual_seed(settings.seed)
    model, axes = copy.deepcopy(base), task.test.channels
    start = time.perf_counter()
    if method.turns:
        turn = find_turn(base, task)
        task, axes = turned(task, turn), named(turn, axes)
    x, y = tensors(task.adapt)
    parameters = method.prepare(model, settings.rank, x, y)
    setup_seconds = time.perf_counter() - start
    lr = settings.lr if settings.lr is not None and method.name == settings.method else method.lr
    model.train()
    trainable = sum(p.numel() for p in parameters)
    share = 100 * trainable / sum(p.numel() for p in base.parameters())
    row = Row(method.name, method.title, 0.0, trainable, share, lr=lr, axes=axes)
    probe = copy.deepcopy(model)  # measuring runs a forward, which moves BatchNorm statistics in batch mode
    row.saved_bytes = saved_bytes(probe, one_batch(x))
    row.curve = train_target(
        model, parameters, task.adapt, task.test, steps=settings.steps, lr=lr, seed=settings.seed,
        setup_seconds=setup_seconds, progress=lambda done, total: tell(method.title, done, total),
    )  # fmt: skip
    row.seconds = row.curve.seconds[-1]
    if keep is not None:
        save_adapter(model, keep / "adapter.safetensors")
    method.finish(model)
    row.f1 = macro_f1(model, task.test)
    if keep is not None:
        write_safetensors(dict(model.state_dict()), keep / "merged.safetensors", {"axes": " ".join(axes)})
    return row


def build_model(factory: str | None, task: Split) -> nn.Module:
    """The T-ResNet for the data, or what ``package.module:factory`` returns; checked on two windows.

    The factory is called with ``in_channels`` and ``num_classes`` if it takes arguments of these names.

    Raises:
        ValueError: the factory cannot be imported, or its model does not take the windows or give a logit a class.
        TypeError: it returns no module.
    """
    shape = {"in_channels": task.test.x.shape[1], "num_classes": len(task.test.classes)}
    model: Any = TResNet(**shape) if factory is None else _call_factory(factory, shape)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {factory} returned a {type(model).__name__}; it must return a torch.nn.Module")
    x, _ = tensors(task.test)
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(x[:2])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the model does not take windows of {tuple(x.shape[1:])} (channels, time): {reason}") from None
    if not isinstance(logits, Tensor) or logits.shape != (len(x[:2]), shape["num_classes"]):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model gives {got} for 2 windows; it must give logits of shape (2, {shape['num_classes']})")
    return model


def get_source_model(model: nn.Module, settings: Settings, task: Split, tell: Progress) -> None:
    """Fill ``model`` with the source weights: the user's, those of an earlier run with the same settings, or trained now."""
    if settings.weights is not None:
        load_weights(model, settings.weights)
    else:
        path = settings.out / f"source-{_source_key(model, settings, task.source)}.safetensors"
        if path.is_file():
            load_weights(model, path)
        else:
            start = time.perf_counter()
            train_source(
                model, task.source, epochs=settings.epochs, seed=settings.seed,
                progress=lambda done, total: tell("pre-training on the other people", done, total),
            )  # fmt: skip
            write_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}, path)
            tell(f"pre-trained in {time.perf_counter() - start:.0f} s", 1, 1)
    model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into the model; ValueError in one line where it does not fit."""
    try:
        model.load_state_dict(load_state(path))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{path}: does not fit the model: {lines[1] if len(lines) > 1 else lines[0]}") from None


def make_folder(path: Path) -> None:
    """Create ``path`` and check that files can be written there; OSError says so in one line if not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be created ({error.strerror}); give another --out") from None
    probe = path / f".write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); give another --out") from None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "lora_edge": lora_edge.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary one, so that the old file stays until the new one is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _call_factory(factory: str, shape: dict[str, int]) -> Any:
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise ValueError(f"--model is {factory!r}; give package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {factory}: {error}; give package.module:factory, importable from here") from None
    finally:
        sys.path.pop(0)
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        names = {}  # type: ignore[assignment]
    return function(**{key: value for key, value in shape.items() if key in names})


def _source_key(model: nn.Module, settings: Settings, source: Windows) -> str:
    digest = hashlib.sha256()
    digest.update(f"{settings.model} {settings.epochs} {settings.seed} {model}".encode())
    digest.update(source.x.tobytes())
    digest.update(source.y.tobytes())
    return digest.hexdigest()[:12]
