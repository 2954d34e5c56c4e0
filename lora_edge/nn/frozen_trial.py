"""Try a BatchNorm's own forward on a copy, to see whether evaluation mode is enough to freeze it.

A subclass of BatchNorm may do anything in its forward. Evaluation mode freezes it if its forward then changes none of its
tensors and gives a sample the same output in any batch, so that no statistics of the batch are used.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_edge.error_text import in_words

BATCH = 4
_SHAPES = [(5, 6), (5,), (), (3, 5, 6)]  # sizes of one sample's positions, tried in this order, channels first, then last


def why_evaluation_moves(bn: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return why evaluation mode does not freeze ``bn``, None if it does; ``bn`` and torch's generators are left unchanged.

    Args:
        bn: a BatchNorm with running statistics.
        kind: the class that it would be frozen to, from :func:`lora_edge.nn.frozen_bn.frozen_class`.
    """
    own = type(bn).__name__
    if any(is_lazy(tensor) for tensor in _tensors(bn).values()):
        return f"{own} has no size yet; run the model once before adapting"
    try:
        twin = copy.deepcopy(bn)
        twin.__class__ = kind  # type: ignore[assignment]
    except Exception as error:  # whatever the class's own code raises
        return f"{own} has a forward of its own and cannot be copied to try it ({in_words(error)})"
    twin.__dict__.update(lean=False, requested_mode=False)
    for module in twin.modules():
        module.training = False
    device: Any = bn.running_mean.device  # type: ignore[union-attr]
    before = _copies(bn)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        why = _why(twin, own, device)
        changed = [name for name, tensor in _tensors(bn).items() if not _same(tensor, before[name])]
        for name in changed:  # the copy reached the original, for example by a closure
            _tensors(bn)[name].copy_(before[name])
    return f"the forward of {own} changes {changed[0]} in evaluation mode too" if changed else why


def _why(twin: nn.Module, own: str, device: torch.device) -> str | None:
    for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
        tensor = _tensors(twin).get(name)
        if tensor is not None:  # so that no channel is constant
            tensor.fill_(value)
    dtype: Any = twin.running_mean.dtype  # type: ignore[union-attr]
    twin.to(torch.promote_types(dtype, torch.float32))
    before = _copies(twin)
    outputs, why = _run(twin, device)
    if outputs is None:
        return f"the forward of {own} could not be tried on a random input ({why})"
    after = _tensors(twin)
    for name in {**before, **after}:
        if name not in before or name not in after or not _same(before[name], after[name]):
            return f"the forward of {own} changes {name} in evaluation mode too"
    whole, alone = outputs
    if not _is_the_same_sample(whole, alone):
        return f"the forward of {own} does not treat each sample independently in evaluation mode"
    return None


def _run(twin: nn.Module, device: torch.device) -> tuple[tuple[Any, Any] | None, str]:
    """Return the outputs for a batch and for its first sample alone, at the first shape that the forward accepts."""
    channels, dtype = int(twin.num_features), twin.running_mean.dtype  # type: ignore[arg-type, union-attr]
    why = ""
    generator = torch.Generator().manual_seed(0)
    for shape in [(channels, *size) for size in _SHAPES] + [(*size, channels) for size in _SHAPES if size]:
        x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
        x += torch.arange(BATCH).reshape(-1, *[1] * len(shape))  # so that the batch's statistics differ from one sample's
        x = x.to(device, dtype)  # type: ignore[arg-type]
        try:
            return (twin.forward(x.clone()), twin.forward(x[:1].clone())), ""
        except Exception as error:  # whatever the class's own code raises
            why = why or in_words(error)
    return None, why


def _is_the_same_sample(whole: Any, alone: Any) -> bool:
    if isinstance(whole, (tuple, list)) and isinstance(alone, (tuple, list)):
        return len(whole) == len(alone) > 0 and all(map(_is_the_same_sample, whole, alone))
    if not isinstance(whole, Tensor) or not isinstance(alone, Tensor) or whole.dim() == 0 or len(whole) % BATCH:
        return False
    first = whole[: len(whole) // BATCH]
    # a kernel may sum in another order at another size, which changes a few units in the last place; the batch's statistics
    # differ by 1.5 in the mean and by half in the variance
    return first.shape == alone.shape and torch.allclose(first.double(), alone.double(), rtol=1e-3, atol=1e-3)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() if not is_lazy(tensor) else tensor for name, tensor in named}


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _tensors(module).items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
