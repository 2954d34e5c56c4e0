"""The main job: adapt a source model to one person, compare methods, write the adapter, the merged model and the report.

``make demo`` and ``lora-edge adapt`` both call :func:`run`.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_edge.adapter_file import save_adapter
from lora_edge.error_text import in_words
from lora_edge.files.output import check_file, make_folder, write_text
from lora_edge.files.safetensors_file import write_safetensors
from lora_edge.har.data import Split, Windows
from lora_edge.har.display import draw
from lora_edge.har.frame import find_turn, named, turned
from lora_edge.har.report import Report, Row, new_report, set_seconds_to_target
from lora_edge.har.settings import Progress, Settings
from lora_edge.har.source import find_weights, pretrain, source_file, task_and_model
from lora_edge.har.training import BATCH, check_rate, macro_f1, one_batch, tensors, train_source, train_target
from lora_edge.memory import saved_bytes
from lora_edge.methods import Method, methods
from lora_edge.methods.parts.backbone import StepSkipped

FILES = ("adapter.safetensors", "merged.safetensors", "results.json", "f1_over_time.png")
COMPARED = ("head_only", "bn_only", "full", "lora_edge")


def run(settings: Settings, progress: Progress | None = None) -> Report:
    """Pre-train (or load) the source model, adapt it by every compared method, write the files of ``settings.method``.

    Files: ``adapter.safetensors``, ``merged.safetensors`` (a plain state dict), ``results.json``, ``f1_over_time.png`` and
    ``source-*.safetensors``, which later runs reuse. Before the first training step the whole job is rehearsed in small, see
    :func:`rehearse`. A comparison that fails or does not apply becomes a row without figures that says why.

    Args:
        settings: the options of the run.
        progress: called as ``progress(title, done, total)``.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: bad data, an unknown subject, a model that does not fit or cannot be
            trained or saved, a folder that cannot be written; all before the first training step. After it only a loss or
            weights that become NaN, and a full disk.
    """
    tell = progress or (lambda title, done, total: None)
    available = methods()
    forms = [name for name in available if name.startswith("lora_edge")]
    if settings.method not in forms:
        raise ValueError(f"method is {settings.method!r}; give a form of LoRA-Edge: {', '.join(forms)}")
    if settings.lr is not None:
        check_rate(settings.lr)
    task, model = task_and_model(settings)
    has_weights = find_weights(model, settings, task)
    make_folder(settings.out)
    compared = [available[name] for name in dict.fromkeys((*COMPARED, settings.method))]
    refused = rehearse(model, task, settings, compared, has_weights)
    if not has_weights:
        pretrain(model, settings, task, tell)
    report = new_report(model, task, settings)
    rows = {name: without_figures(available[name], why) for name, why in refused.items()}
    for method in sorted(compared, key=lambda method: method.name != settings.method):  # the requested method first
        if method.name == settings.method:
            rows[method.name] = adapt_by(method, model, task, settings, tell, settings.out)
        elif method.name not in refused:
            rows[method.name] = compare(method, model, task, settings, tell)
    report.rows += [rows[method.name] for method in compared]
    if report.row("lora_edge").axes not in (None, task.test.channels):
        report.rows.append(compare(available["full_turned"], model, task, settings, tell))
    report.target_f1 = set_seconds_to_target(report.rows)
    write_report(report, settings.out)
    return report


def rehearse(
    model: nn.Module, task: Split, settings: Settings, compared: Sequence[Method], has_weights: bool
) -> dict[str, str]:
    """Run the whole job in small, one step per training, so that failures show before minutes of work.

    Works on copies of the model and restores torch's random state. All files are written to a temporary folder.

    Returns:
        The reasons why comparisons do not apply, by method name.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: the pre-training, the requested method or the writing fails.
    """
    for path in (*(settings.out / name for name in FILES), source_file(model, settings, task)):
        check_file(path)
    small = replace(task, adapt=_first(task.adapt), test=_first(task.test))
    refused: dict[str, str] = {}
    with (
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=settings.out) as folder,
    ):
        once, out = replace(settings, steps=1), Path(folder)
        report = new_report(model, small, settings)
        write_safetensors(model.state_dict(), out / "source.safetensors")
        if not has_weights:
            try:
                train_source(copy.deepcopy(model), _first(task.source), epochs=1, seed=settings.seed)
            except Exception as error:
                raise _refusal("the source model cannot be trained", error) from None
        for method in compared:
            requested = method.name == settings.method
            try:
                report.rows.append(adapt_by(method, model, small, once, _tell_nobody, out if requested else None))
            except Exception as error:
                if requested:
                    raise _refusal(method.title, error) from None
                refused[method.name] = in_words(error)
        write_report(report, out)
    return refused


def compare(method: Method, model: nn.Module, task: Split, settings: Settings, tell: Progress) -> Row:
    """Run :func:`adapt_by` for a comparison; if it fails, for example by NaN or for lack of memory, the row says why."""
    try:
        return adapt_by(method, model, task, settings, tell)
    except Exception as error:
        return without_figures(method, in_words(error))


def without_figures(method: Method, why: str) -> Row:
    """Return the row of a method that did not finish."""
    return Row(method.name, method.title, None, remark=why)


def adapt_by(method: Method, base: nn.Module, task: Split, settings: Settings, tell: Progress, keep: Path | None = None) -> Row:
    """Adapt a copy of ``base`` by one method; writes the adapter and the merged model to the folder ``keep``, if given."""
    torch.manual_seed(settings.seed)
    model, axes = copy.deepcopy(base), task.test.channels
    start = time.perf_counter()
    if method.turns:
        turn = find_turn(base, task)
        task, axes = turned(task, turn), named(turn, axes)
    x, y = tensors(task.adapt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StepSkipped)
        training = method.begin(model, settings.rank, x, y)
    trained = training.model or model
    setup_seconds = time.perf_counter() - start
    lr = settings.lr if settings.lr is not None and method.name == settings.method else method.lr
    trained.train()
    share = 100 * training.count / sum(p.numel() for p in base.parameters())
    row = Row(method.name, method.title, 0.0, training.count, share, lr=lr, axes=axes, remark=_remark(caught))
    probe = copy.deepcopy(trained)  # the measurement runs a forward, which moves BatchNorm statistics in batch mode
    row.saved_bytes = saved_bytes(probe, one_batch(x))
    row.curve = train_target(
        trained, training, task.adapt, task.test, steps=settings.steps, lr=lr, seed=settings.seed,
        setup_seconds=setup_seconds, progress=lambda done, total: tell(method.title, done, total),
    )  # fmt: skip
    row.seconds = row.curve.seconds[-1]
    if keep is not None:
        save_adapter(model, keep / "adapter.safetensors")
    method.finish(model)
    row.f1 = macro_f1(model, task.test)
    if keep is not None:
        write_safetensors(model.state_dict(), keep / "merged.safetensors", {"axes": " ".join(axes)})
    return row


def write_report(report: Report, folder: Path) -> None:
    """Write ``results.json`` and the picture."""
    write_text(folder / "results.json", json.dumps(asdict(report), indent=1) + "\n")
    draw(report, folder / "f1_over_time.png")


def _first(windows: Windows) -> Windows:
    """Return one batch of windows, for the rehearsal."""
    return windows.where(np.arange(len(windows)) < BATCH)


def _remark(caught: list[warnings.WarningMessage]) -> str | None:
    """Return the text about skipped steps, or None; other warnings are issued again."""
    for warning in caught:
        if not issubclass(warning.category, StepSkipped):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return "; ".join(str(warning.message) for warning in caught if issubclass(warning.category, StepSkipped)) or None


def _refusal(what: str, error: Exception) -> Exception:
    """Return the one-line error that ends the job, with the error's own class if it is among those that ``run`` documents."""
    kind = next((k for k in (ValueError, TypeError, OSError) if isinstance(error, k)), RuntimeError)
    return kind(f"{what}: {in_words(error)}")


def _tell_nobody(title: str, done: int, total: int) -> None:
    """The rehearsal shows no progress."""
