"""LoRA-Edge with ranks by the gradient's energy: as many parameters as one rank everywhere has."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted
from lora_edge.surgery.selection import select
from lora_edge.tt import attainable_ranks, check_rank


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in select(model, None, None)]  # type: ignore[union-attr, arg-type]
    budget = sum(shape[0] * attainable_ranks(shape, check_rank(rank))[0] for shape in shapes)
    return adapted(params=budget)(model, rank, inputs, labels)


METHOD = Method("lora_edge_budget", "LoRA-Edge, ranks by energy", lr=2e-2, prepare=prepare, finish=merge)
