"""Which parts of a model are adapted, which train beside the cores, and which are left alone and why."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn import lean
from lora_edge.nn.frozen_bn import unfreezable, why_not_frozen
from lora_edge.nn.layers import ADAPTED_CLASS
from lora_edge.subspaces.samples import few_inputs
from lora_edge.surgery.find import refuse_adapted
from lora_edge.surgery.head import classifier
from lora_edge.surgery.training_flags import in_evaluation


def select(
    model: nn.Module,
    targets: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    bn: str = "batch",
) -> list[str]:
    """Names of the convolutions that ``targets`` and ``exclude`` choose, in registration order.

    With ``bn="frozen"`` a BatchNorm that cannot be frozen is refused unless ``exclude`` names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model is a {type(model).__name__}; give a torch.nn.Module")
    refuse_adapted(model)
    names = [name for name, module in model.named_modules() if type(module) in ADAPTED_CLASS and "weight" in module._parameters]
    if not names:
        raise ValueError("the model has no nn.Conv1d, nn.Conv2d or nn.Conv3d; there is nothing to adapt")
    chosen = names if targets is None else _match("targets", targets, names)
    loose = unfreezable(model) if bn == "frozen" else {}
    left_out = [] if exclude is None else _match("exclude", exclude, [*names, *loose])
    for name, why in loose.items():
        if name not in left_out:
            raise ValueError(f'{name}: {why}; put {name!r} in exclude to leave it as it is, or use bn="batch"')
    chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise ValueError(f"exclude={exclude!r} leaves no convolution to adapt; exclude fewer")
    return chosen


def find_head(model: nn.Module, batches: Iterable[Any] | None = None) -> str:
    """Name of the classifier, as far as it can be told: the last ``nn.Linear`` on the forward's way to the output.

    Args:
        batches: inputs. The way is read off the forward's source where that can be followed; where it can't, one of the
            batches runs through a copy of the model without gradients, and the last linear layer that ran is taken, of those
            whose output has the model's classes where there are any. Where there are no batches either, it is the last
            registered.

    Raises:
        ValueError: there is no ``nn.Linear``, or the model does not take the batch.
    """
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    if not linears:
        raise ValueError("train_head=True, but the model has no nn.Linear; use train_head=False, or name the head")
    if len(linears) == 1:
        return linears[0]
    dims = next((module.weight.dim() for module in model.modules() if isinstance(module, _ConvNd)), 2)
    ran = None if batches is None else _last_that_ran(model, linears, batches)
    return classifier(model, dims) or ran or linears[-1]


def named_head(model: nn.Module, name: str, adapted: Sequence[str]) -> str:
    """Check the name of a head to train.

    Args:
        name: dotted name of a module.
        adapted: names of the convolutions that are to be adapted.

    Raises:
        ValueError: there is no such module, it has no parameters, or an adapted convolution is inside it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules or not name:
        close = difflib.get_close_matches(name, [other for other in modules if other], n=3, cutoff=0.0)
        raise ValueError(f"train_head: the model has no module {name!r}; the closest are {', '.join(map(repr, close))}")
    if next(modules[name].parameters(), None) is None:
        raise ValueError(f"train_head: {name} has no parameters; name the classifier, such as its nn.Linear")
    inside = {id(module) for module in modules[name].modules()}
    for conv in adapted:
        if id(modules[conv]) in inside:
            raise ValueError(f"train_head: {conv} would be adapted and trained whole; exclude it, or name another head")
    return name


def left_alone(model: nn.Module, bn: str) -> dict[str, str]:
    """Name of every layer that ``adapt`` does not take, with the reason."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and type(module) not in ADAPTED_CLASS:
            reasons[name] = f"{type(module).__name__} is not exactly nn.Conv1d, nn.Conv2d or nn.Conv3d, left alone"
        elif type(module) in ADAPTED_CLASS and "weight" not in module._parameters:
            reasons[name] = lean.COMPUTED_WEIGHT
        elif isinstance(module, _BatchNorm) and bn == "frozen" and (why := why_not_frozen(module)):
            reasons[name] = why
    return reasons


def _match(option: str, patterns: Sequence[str] | str, names: list[str]) -> list[str]:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    hits: set[str] = set()
    for pattern in wanted:
        found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"{option}: {pattern!r} matches no convolution; the closest are {', '.join(map(repr, close))}")
        hits.update(found)
    if not wanted:
        raise ValueError(f"{option} is empty; name at least one convolution, or leave it out")
    return [name for name in names if name in hits]


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that is called: the output projection of ``nn.MultiheadAttention`` is not."""
    return isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"


def _last_that_ran(model: nn.Module, linears: list[str], batches: Iterable[Any]) -> str | None:
    """The linear layer that ran last on the first batch; None where none ran, or the model cannot be copied to find out."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = few_inputs(batches, device)[0][:2]
    try:
        twin = copy.deepcopy(model)  # so that a forward which counts or draws leaves no trace
    except Exception:  # whatever a user's module raises
        return None
    ran: list[tuple[str, int]] = []
    for name in linears:

        def note(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.dim():
                ran.append((name, output.shape[-1]))

        twin.get_submodule(name).register_forward_hook(note)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), in_evaluation(twin):
        try:
            logits = twin(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"batches: the model does not take an input of {tuple(x.shape)}: {why}") from None
    classes = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else None
    fits = [name for name, size in ran if size == classes] or [name for name, _ in ran]
    return fits[-1] if fits else None
