"""Which ``nn.Linear`` is a model's classifier: the one nearest to the output on the forward's own way, not in registration."""

from __future__ import annotations

from torch import fx, nn

from lora_edge.nn.fuser.evaluator import Evaluator
from lora_edge.nn.fuser.values import Refused

_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Tanh)
_GATE_NAMES = {"sigmoid", "sigmoid_", "hardsigmoid", "softmax", "tanh", "tanh_"}


def classifier(model: nn.Module, dims: int) -> str | None:
    """Dotted name of the last ``nn.Linear`` on the way to the output.

    From the output back it follows what each operation is applied to, its first input that is no gate (the result of a sigmoid
    or the like), so that what the logits are multiplied by is passed by.

    Args:
        model: any module.
        dims: dimensions of its input.

    Returns:
        The name, or None where the forward is not proven pure or has no ``nn.Linear`` on that way.
    """
    for training in (False, True):
        evaluator = Evaluator(model, training)
        try:
            evaluator.run([("tensor", dims)], {})
        except (Refused, RecursionError):
            continue
        node = next(n for n in evaluator.graph.nodes if n.op == "output")
        while node.all_input_nodes:
            node = _onward(node, model)
            if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Linear):
                return str(node.target)
        return None
    return None


def _onward(node: fx.Node, model: nn.Module) -> fx.Node:
    inputs = node.all_input_nodes
    return next((source for source in inputs if not _is_gate(source, model)), inputs[0])


def _is_gate(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _GATES)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _GATE_NAMES
