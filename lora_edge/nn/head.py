"""Which ``nn.Linear`` is a model's classifier: the one nearest to the output on the forward's own way, not in registration."""

from __future__ import annotations

from torch import nn

from lora_edge.nn.evaluator import Evaluator
from lora_edge.nn.values import Refused


def classifier(model: nn.Module, dims: int) -> str | None:
    """Dotted name of the last ``nn.Linear`` on the way to the output.

    From the output back it follows what each operation is applied to (its first input), so that a gate or a scale that the
    logits are multiplied by is passed by.

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
            node = node.all_input_nodes[0]
            if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Linear):
                return str(node.target)
        return None
    return None
