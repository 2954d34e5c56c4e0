"""Checks of weights and statistics: no NaN, no infinity, no negative variance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class NotFiniteError(ValueError):
    """A value is NaN or infinite, or a variance is negative."""


def check_finite(
    tensors: Mapping[str, Tensor], what: str, remedy: str = "give finite values", *, allow_infinity: bool = False
) -> None:
    """Raise :class:`NotFiniteError` for the first tensor that holds NaN or an infinity.

    Each tensor is read once without a temporary of its size, and the host waits once per device.

    Args:
        tensors: by name; any shape, dtype, layout and device. Integer, meta and quantized tensors always pass.
        what: the beginning of the message: what the tensors belong to, such as a file's path.
        remedy: the end of the message: what would be right.
        allow_infinity: refuse only NaN; for buffers, because an attention mask may well hold infinities.
    """
    finite = _each_finite(list(tensors.values()))
    for (name, tensor), passed in zip(tensors.items(), finite, strict=True):
        if not passed:
            values = _values(tensor)
            bad = values.isnan() if allow_infinity else ~values.isfinite()
            if count := int(bad.sum()):
                kind = "NaN" if allow_infinity else "NaN or infinity"
                raise NotFiniteError(f"{what}: {name} holds {kind} ({count:,} of {values.numel():,} values); {remedy}")


def check_weights(model: nn.Module, what: str, remedy: str = "give finite weights") -> None:
    """Check a module: :func:`check_finite`, and :func:`check_variances`.

    Parameters and running statistics must be finite; other buffers may hold infinities.
    """
    buffers = dict(model.named_buffers())
    statistics = {name: value for name, value in buffers.items() if name.rpartition(".")[2] in ("running_mean", "running_var")}
    check_finite({**dict(model.named_parameters()), **statistics}, what, remedy)
    check_finite(buffers, what, remedy, allow_infinity=True)
    check_variances(model, what, remedy)


def check_variances(
    source: nn.Module | Mapping[str, Tensor], what: str, remedy: str = "give the statistics of real data"
) -> None:
    """Raise :class:`NotFiniteError` for the first BatchNorm variance below zero, which would make the output NaN.

    Args:
        source: a module or a state dict; every tensor named ``running_var`` is checked.
        what, remedy: the beginning and the end of the message, as for :func:`check_finite`.
    """
    named: Iterable[tuple[str, Tensor]]
    named = source.named_buffers(remove_duplicate=False) if isinstance(source, nn.Module) else source.items()
    for name, variance in named:
        if name.rpartition(".")[2] != "running_var" or not variance.is_floating_point() or variance.numel() == 0:
            continue
        if not variance.is_meta and (least := float(variance.detach().min())) < 0:
            raise NotFiniteError(f"{what}: {name} holds a negative variance ({least:g}); {remedy}")


def _each_finite(tensors: list[Tensor]) -> list[bool]:
    """Return for each tensor whether it is finite, with one transfer per device."""
    finite = [True] * len(tensors)
    extremes: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for k, tensor in enumerate(tensors):
        if is_lazy(tensor):  # has no values yet
            continue
        values = _values(tensor)
        if values.numel() == 0 or values.is_meta or not values.is_floating_point():
            continue
        places, found = extremes.setdefault(values.device, ([], []))
        places.append(k)
        found.append(torch.stack(torch.aminmax(values)).isfinite().all())  # NaN spreads to both
    for places, found in extremes.values():
        for k, passed in zip(places, torch.stack(found).tolist(), strict=True):
            finite[k] = passed
    return finite


def _values(tensor: Tensor) -> Tensor:
    """Return the stored values in a real dtype that every reduction supports, without a copy where possible."""
    values = tensor.detach()
    if values.is_quantized:
        return values.int_repr()
    if values.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        values = values.values()
    elif values.layout == torch.sparse_coo:
        values = values.coalesce().values()
    elif values.layout != torch.strided:
        values = values.to_dense()  # the layout of oneDNN
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # 8-bit floats have no reductions
    return values
