"""``python -m benchmarks.models``: does ``adapt`` keep its promises on real model definitions? A row a model.

    convolutions    stock ``nn.Conv*`` that the model has; ``adapted``: those that were adapted at rank 2
    refused         why ``adapt`` refuses the model
    same_output     bit-identical to the frozen base without gradients, in evaluation mode, right after ``adapt``
    output_error    forward in training mode, random cores, float64: the largest relative error beside ``lean=False``
    gradient_error  the same of every core's gradient
    moved           BatchNorm's statistics that training mode moved although they are frozen, and buffers that it left
                    otherwise than with ``lean=False``
    saved_bytes     kept for backward by the adapted model; ``full_bytes``: by full fine-tuning
    fused           convolutions that run as one op with at least one neighbour; ``alone``: without; ``why_not``: the rest
    round_trip      train one step, save, load into a fresh base: the same output
    merged_keys     the merged state dict has the base's keys in their order; ``merge_error``: its output's relative error
    verdict         right, refused, or what is wrong

Random weights; BatchNorm's affine is drawn and its statistics come from a few batches. torchvision's and timm's models are
there where those are installed. Each model is examined in a process of its own. Writes
``results/cpu/models.csv``, where rows of models that were not asked for stay.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import os
import platform
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_edge
from lora_edge.memory import saved_bytes

from . import RESULTS, write_rows
from .model_zoo import Definition, definitions

RANK = 2
BATCH = 4
SECONDS = 900  # for one model
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MEASURES = (
    "parameters", "convolutions", "adapted", "refused", "same_output", "output_error", "gradient_error", "moved", "saved_bytes",
    "full_bytes", "fused", "alone", "why_not", "left_alone", "round_trip", "merged_keys", "merge_error",
)  # fmt: skip
FIELDS = ("model", "verdict", "source", "input", *MEASURES, "seconds", "lora_edge", "torch", "processor", "date")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# of relative errors: float64 sums of a few thousand terms through a hundred layers; float32 kernels through as many
BOUNDS = {"output_error": 1e-9, "gradient_error": 1e-8, "merge_error": 1e-3}


class Examination:
    """Examines one model; each check that raises leaves its one line in its cell and the others go on."""

    def __init__(self, definition: Definition) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(BATCH, *definition.shape)
        self.base = self.settled(definition.build())
        self.row: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "convolutions": sum(isinstance(m, CONVS) for m in self.base.modules()),
        }

    def settled(self, model: nn.Module) -> nn.Module:
        """In evaluation mode, with BatchNorm's affine not the identity and its statistics those of a few batches."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        with torch.no_grad():
            for module in model.modules():  # zeros, such as a head's, would hide everything that is in front of them
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() > 1 and not weight.any():
                    weight.normal_(std=0.02)
            for norm in norms:
                norm.momentum = 0.5
                if norm.affine:
                    norm.weight.uniform_(0.7, 1.3)
                    norm.bias.normal_(std=0.1)
            for _ in range(4):
                model.train()(torch.randn_like(self.x))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.eval()

    def run(self) -> dict[str, Any]:
        try:
            self.zero = lora_edge.adapt(copy.deepcopy(self.base), RANK)
        except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
            self.row["refused"] = one_line(error)
            return self.row
        self.trained = with_random_cores(copy.deepcopy(self.zero))
        self.row["adapted"] = len(cores_of(self.zero))
        for check in (self.same_output, self.gradients, self.bytes, self.blocks, self.round_trip, self.merge):
            try:
                check()
            except Exception as error:
                cell = {"gradients": "gradient_error", "bytes": "saved_bytes", "blocks": "fused", "merge": "merge_error"}
                self.row[cell.get(check.__name__, check.__name__)] = f"{type(error).__name__}: {one_line(error)}"
        return self.row

    def same_output(self) -> None:
        frozen = copy.deepcopy(self.base).requires_grad_(False)  # torch runs an LSTM with frozen weights by another kernel
        self.row["same_output"] = same(output(self.zero, self.x), output(frozen, self.x))

    def gradients(self) -> None:
        x = self.x.double()
        found: list[tuple[Any, ...]] = []
        twin = with_random_cores(lora_edge.adapt(copy.deepcopy(self.base), RANK, lean=False))
        for model in (copy.deepcopy(self.trained), twin):
            without_dropout(model.double()).train()
            before = {name: value.clone() for name, value in model.named_buffers()}
            torch.manual_seed(2)  # layers that are dropped
            y = [*tensors(model(x))]
            generator = torch.Generator().manual_seed(3)
            loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in y)
            loss.backward()  # type: ignore[union-attr]
            grads = {name: core.grad for name, core in cores_of(model).items()}
            now = dict(model.named_buffers())
            found.append((y, grads, now, {name for name, value in now.items() if not torch.equal(value, before[name])}))
        (y, lean_grads, buffers, moved), (want_y, want, other_buffers, _) = found
        self.row["output_error"] = f"{error_of(y, want_y):.1e}"
        none = [name for name in want if (want[name] is None) != (lean_grads[name] is None)]
        if none:
            raise RuntimeError(f"{len(none)} cores get a gradient in one of the two only, such as {none[0]}")
        pairs = [(lean_grads[name], g) for name, g in want.items() if g is not None]
        norms = torch.stack([g.norm() for _, g in pairs])
        floors = norms.clamp_min(max(1e-9 * float(norms.max()), 1e-30))
        errors = torch.stack([(got - g).norm() for got, g in pairs]) / floors
        self.row["gradient_error"] = f"{float(errors.max()):.1e}"  # not a number where one is not
        statistics = {name for name in moved if name.rpartition(".")[2] in STATISTICS}
        self.row["moved"] = len(statistics | {n for n, value in other_buffers.items() if not close(buffers[n], value)})

    def bytes(self) -> None:
        self.row["saved_bytes"] = saved_bytes(copy.deepcopy(self.trained).train(), self.x)
        full = copy.deepcopy(self.base).requires_grad_(True).train()
        self.row["full_bytes"] = saved_bytes(full, self.x)

    def blocks(self) -> None:
        summary = lora_edge.summary(self.trained)
        blocks = [layer.block for layer in summary.layers]
        self.row["fused"] = sum("+" in block and not block.startswith("(") for block in blocks)
        self.row["alone"] = blocks.count("conv")
        self.row["why_not"] = counted(block.strip("()") or "no reason given" for block in blocks if block[:1] in ("(", ""))
        self.row["left_alone"] = counted(summary.left_alone.values())

    def round_trip(self) -> None:
        model = copy.deepcopy(self.trained).train()
        optimizer = torch.optim.SGD(lora_edge.trainable_parameters(model), lr=1e-4)
        sum(t.square().mean() for t in tensors(model(self.x))).backward()  # type: ignore[union-attr]
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            lora_edge.save_adapter(model.eval(), Path(folder, "a"))
            loaded = lora_edge.load_adapter(copy.deepcopy(self.base), Path(folder, "a")).eval()
        self.row["round_trip"] = same(output(loaded, self.x), output(model, self.x))

    def merge(self) -> None:
        model = copy.deepcopy(self.trained)
        want = [t.clone() for t in output(model, self.x)]
        lora_edge.merge(model)
        kinds = [type(m) for m in model.modules()] == [type(m) for m in self.base.modules()]
        same_keys = [*model.state_dict()] == [*self.base.state_dict()]
        self.row["merged_keys"] = "yes" if kinds and same_keys else "no, " + ("other keys" if kinds else "other classes")
        self.row["merge_error"] = f"{error_of(output(model, self.x), want):.1e}"


def with_random_cores(model: nn.Module) -> nn.Module:
    """An adapted model with updates of a tenth of its weights, the same on every model of one definition."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, core in cores_of(model).items():
            layer: Any = model.get_submodule(name.removesuffix("core").rstrip("."))
            draw = torch.randn(core.shape, generator=generator)
            update = lora_edge.ops.tt_fuse(torch.zeros_like(layer.weight), draw, layer.suffix, layer.scale, backend="torch")
            core.copy_(draw * (0.1 * layer.weight.norm() / update.norm().clamp_min(1e-12)))
    return model


def cores_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "core"}


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an output, which may be a dictionary or a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def output(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [*tensors(model(x))]


def error_of(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of several tensors, in norm."""
    errors = [((a - b).norm() / b.norm().clamp_min(1e-30)).detach() for a, b in zip(got, want, strict=True)]
    return float(torch.stack(errors).max())


def close(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got, want) if not want.is_floating_point() else error_of([got], [want]) <= BOUNDS["output_error"]


def same(got: list[Tensor], want: list[Tensor]) -> str:
    """Whether they are bit-identical."""
    is_same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return "yes" if is_same else f"no, {error_of(got, want):.1e}"


def without_dropout(model: nn.Module) -> nn.Module:
    """The lean dropout draws other masks than the stock one."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def counted(reasons: Any) -> str:
    """Each reason with how often it was given; names of modules in it are left out."""
    counts = Counter(reason.partition(": ")[0] if "follows" in reason or "users" in reason else reason for reason in reasons)
    return "; ".join(f"{number} x {reason}" for reason, number in counts.most_common())


def one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def verdict(row: dict[str, Any]) -> str:
    """What is wrong with a model, in words."""
    if row.get("refused"):
        return "refused"
    wrong = [name for name in ("same_output", "round_trip", "merged_keys") if row.get(name) != "yes"]
    for name, bound in BOUNDS.items():
        value = str(row.get(name, ""))
        wrong += [name] if not value[:1].isdigit() or float(value) > bound else []
    wrong += ["moved"] if row.get("moved") else []
    wrong += [name for name in ("saved_bytes", "fused") if not str(row.get(name, "")).isdigit()]
    return "right" if not wrong else "wrong: " + ", ".join(wrong)


def machine() -> dict[str, str]:
    """What the rows were measured on. Not that of lora_edge.har, which needs its extra."""
    about = {"lora_edge": lora_edge.__version__, "torch": torch.__version__, "processor": platform.machine()}
    return {**about, "date": time.strftime("%Y-%m-%d")}


def examine(definition: Definition) -> dict[str, Any]:
    """The model's row."""
    started = time.perf_counter()
    try:
        row = Examination(definition).run()
        row["verdict"] = verdict(row)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row = {
            "verdict": f"not examined: {type(error).__name__}: {one_line(error)} ({Path(place.filename).name}:{place.lineno})"
        }
    shape = "x".join(map(str, (BATCH, *definition.shape)))
    about = {"model": definition.name, "source": definition.source, "input": shape}
    row = {**machine(), **row, **about, "seconds": f"{time.perf_counter() - started:.1f}"}
    return {key: row.get(key, "") for key in FIELDS}


def in_a_process(definition: Definition, work: Callable[[Definition], dict[str, Any]] = examine) -> dict[str, Any]:
    """``work(definition)`` in a forked process, so that neither a crash nor one that never ends takes the rest along."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, definition, work))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return ours.recv()
        why = f"not examined: not done after {SECONDS} s"
    except EOFError:
        process.join()
        why = f"not examined: the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    about = {"model": definition.name, "source": definition.source, "verdict": why}
    return {key: {**machine(), **about}.get(key, "") for key in FIELDS}


def _send(pipe: Connection, definition: Definition, work: Callable[[Definition], dict[str, Any]]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked process has no other
    pipe.send(work(definition))
    pipe.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__.partition("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names, such as timm: or resnet")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "models.csv")
    options = parser.parse_args()
    known = definitions()
    chosen = [name for name in known if any(part in name for part in options.only)]
    kept: dict[str, dict[str, Any]] = {}
    if options.out.is_file():
        with options.out.open(newline="") as file:
            kept = {row["model"]: row for row in csv.DictReader(file) if row["model"] in known}
    for name in chosen:
        row = kept[name] = in_a_process(known[name])
        print(f"{name}: {row['verdict']} ({row['seconds']} s)", flush=True)
        write_rows(options.out, FIELDS, (kept[name] for name in known if name in kept))
    rows = [kept[name] for name in chosen]
    verdicts = Counter(row["verdict"].partition(":")[0] for row in rows)
    print(f"{len(rows)} definitions:", ", ".join(f"{number} {name}" for name, number in verdicts.most_common()))
    return 0 if verdicts.keys() <= {"right", "refused"} else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
