"""LoRA-Edge: the library's defaults, the published form, and the forms that change one choice of the defaults each."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.methods.base import Method, PrepareList, adapted
from lora_edge.surgery.selection import select
from lora_edge.tt import attainable_ranks, check_rank


def _form(
    name: str, title: str, prepare: PrepareList, *, lr: float = 2e-2, turns: bool = False, starts_at_base: bool = False
) -> Method:
    """A form of LoRA-Edge. Most move BatchNorm's statistics first, so they start near the base model and not at it."""
    return Method(name, title, lr=lr, prepare=prepare, turns=turns, starts_at_base=starts_at_base, source="arXiv 2511.03765")


def prepare_by_budget(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    """Choose the ranks by the gradient's energy, with as many parameters in all as ``rank`` in every layer has."""
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in select(model, None, None)]  # type: ignore[union-attr, arg-type]
    budget = sum(shape[0] * attainable_ranks(shape, check_rank(rank))[0] for shape in shapes)
    return adapted(params=budget)(model, rank, inputs, labels)


# BatchNorm in batch mode: its statistics move to the target while the cores are trained.
BATCH_BN = _form("lora_edge_batch_bn", "LoRA-Edge, BN in batch mode", adapted(bn="batch"))

METHODS = [
    # The defaults: the weight's own suffix, balanced; BatchNorm frozen near the target's statistics; axes turned.
    _form("lora_edge", "LoRA-Edge", adapted(), turns=True),
    # The defaults on the axes as they come: shows what turning them is worth. All forms below also leave the axes as worn.
    _form("lora_edge_as_worn", "LoRA-Edge, axes as worn", adapted()),
    # As published (arXiv 2511.03765): the weight's suffix with its singular values, BatchNorm frozen.
    _form(
        "lora_edge_paper",
        "LoRA-Edge, as published",
        adapted(source_samples=None, scaling="paper"),
        lr=1e-2,
        starts_at_base=True,
    ),
    # The suffix holds the principal directions of each layer's inputs.
    _form("lora_edge_input", "LoRA-Edge, the inputs' subspace", adapted(subspace="input")),
    # The suffix holds the leading right singular directions of the first gradients.
    _form("lora_edge_gradient", "LoRA-Edge, the gradient's subspace", adapted(subspace="gradient")),
    _form("lora_edge_budget", "LoRA-Edge, ranks by energy", prepare_by_budget),
    BATCH_BN,
    # BatchNorm frozen on the source's statistics alone, or on the target's alone.
    _form("lora_edge_source_bn", "LoRA-Edge, BN of the source", adapted(source_samples=None), starts_at_base=True),
    _form("lora_edge_target_bn", "LoRA-Edge, BN of the target", adapted(source_samples=0)),
]
