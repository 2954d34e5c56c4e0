"""Which module is the classifier: checked if named, otherwise found as the ``nn.Linear`` nearest to the model's output."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.error_text import first_line
from lora_edge.nn.fuser.evaluator import Evaluator
from lora_edge.nn.fuser.values import Refused
from lora_edge.nn.training_flags import in_evaluation
from lora_edge.subspaces.samples import few_inputs

_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Tanh)
_GATE_NAMES = {"sigmoid", "sigmoid_", "hardsigmoid", "softmax", "tanh", "tanh_"}


def find_head(model: nn.Module, batches: Iterable[Any] | None = None) -> str:
    """Return the name of the classifier: the last ``nn.Linear`` on the forward's path to the output.

    Args:
        model: any module.
        batches: inputs. They are used only if the path cannot be read from the forward's source: one batch then runs through a
            copy of the model without gradients, and the result is the last linear layer that ran, preferably one whose output
            has the size of the model's output. Without batches it is the last one registered.

    Raises:
        ValueError: there is no ``nn.Linear``, or the model does not accept the batch.
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
    """Check and return the name of a head to train.

    Args:
        model: any module.
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


def classifier(model: nn.Module, dims: int) -> str | None:
    """Return the dotted name of the last ``nn.Linear`` on the path to the output.

    The path is followed back from the output through each operation's first input that is not a gate (the result of a sigmoid
    or the like), so that factors of the logits are skipped.

    Args:
        model: any module.
        dims: number of dimensions of its input.

    Returns:
        The name, or None if the forward is not proven pure or has no ``nn.Linear`` on that path.
    """
    for training in (False, True):
        evaluator = Evaluator(model, training)
        try:
            evaluator.run([("tensor", dims)], {})
        except (Refused, RecursionError):
            continue
        node = next(n for n in evaluator.graph.nodes if n.op == "output")
        while node.all_input_nodes:
            node = _previous(node, model)
            if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Linear):
                return str(node.target)
        return None
    return None


def _previous(node: fx.Node, model: nn.Module) -> fx.Node:
    inputs = node.all_input_nodes
    return next((source for source in inputs if not _is_gate(source, model)), inputs[0])


def _is_gate(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _GATES)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _GATE_NAMES


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is called; the output projection of ``nn.MultiheadAttention`` is not."""
    return isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"


def _last_that_ran(model: nn.Module, linears: list[str], batches: Iterable[Any]) -> str | None:
    """Return the linear layer that ran last on the first batch; None if none ran or the model cannot be copied."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = few_inputs(batches, device)[0][:2]
    try:
        twin = copy.deepcopy(model)  # so that a forward that counts or draws changes nothing
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
            raise ValueError(f"batches: the model does not accept an input of {tuple(x.shape)}: {first_line(error)}") from None
    classes = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else None
    fits = [name for name, size in ran if size == classes] or [name for name, _ in ran]
    return fits[-1] if fits else None
