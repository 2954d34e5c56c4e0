"""Argument checks of the ops, shared by every backend.

Each error names the argument, what it got and what to give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops.conv_args import ConvArgs
from lora_edge.tt import check_cores, is_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_factors(weight: Tensor, core: Tensor, suffix: Tensor | Sequence[Tensor], op: str) -> None:
    """Check weight ``(O, I/g, *K)``, core ``(O, r1)`` and suffix (contracted or as frozen cores) against each other.

    A trained kernel ``(O, r, *K)`` in the core's place has the suffix ``(r, I/g, 1, ...)``.

    Raises:
        TypeError: one is not a tensor of a supported floating dtype.
        ValueError: shapes or devices do not fit together.
    """
    check_weight(weight, op)
    _check_tensor(core, "core", op)
    if isinstance(suffix, Tensor):
        _check_tensor(suffix, "suffix", op)
        shape, devices = tuple(suffix.shape), {suffix.device}
    else:
        for part in suffix:
            _check_tensor(part, "suffix", op)
        check_cores(suffix, "suffix")
        shape, devices = (suffix[0].shape[0], *[part.shape[1] for part in suffix]), {part.device for part in suffix}
    kernel = core.shape[2:] if is_kernel(core) else ()
    if core.dim() < 2 or core.shape[0] != weight.shape[0] or (kernel and kernel != weight.shape[2:]):
        sizes = ", ".join(map(str, weight.shape[2:]))
        either = f"({weight.shape[0]}, r1), or a kernel ({weight.shape[0]}, r, {sizes})"
        raise ValueError(f"{op}: core has shape {tuple(core.shape)}; for this weight give {either}")
    want = (core.shape[1], weight.shape[1], *([1] * len(kernel) or weight.shape[2:]))
    if shape != want:
        raise ValueError(f"{op}: suffix has shape {shape}; for this weight and core give {want}")
    if weight.device != core.device or devices != {weight.device}:
        raise ValueError(
            f"{op}: weight is on {weight.device}, core on {core.device}, suffix on {' and '.join(sorted(map(str, devices)))}; "
            "put all on one device"
        )


def check_weight(weight: Tensor, op: str) -> None:
    """Check a weight ``(O, I/g, *K)``; TypeError for its dtype, ValueError for its shape."""
    _check_tensor(weight, "weight", op)
    check_weight_sizes(weight.shape, op)


def check_weight_sizes(weight: Sequence[int], op: str) -> None:
    """Check that a weight ``(O, I/g, *K)`` has 3 to 5 dimensions; ValueError if not."""
    if not 3 <= len(weight) <= 5:
        raise ValueError(f"{op}: weight has shape {tuple(weight)}; give (O, I/groups, *K) with 1 to 3 kernel sizes")


def check_rows(vector: Tensor, weight: Tensor, name: str, op: str) -> None:
    """Check a vector ``(O,)`` with one element per row of the weight; TypeError for its type, ValueError for its shape."""
    _check_tensor(vector, name, op)
    if vector.shape != (weight.shape[0],) or vector.device != weight.device:
        raise ValueError(
            f"{op}: {name} has shape {tuple(vector.shape)} on {vector.device}; give ({weight.shape[0]},) on {weight.device}"
        )


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, op: str, *, batched: bool = False) -> None:
    """Check the input ``(N, I, *L)`` (or one unbatched sample ``(I, *L)``) and the bias ``(O,)`` against the weight.

    ``batched`` rejects an unbatched sample. Under autocast the dtypes may differ, because the op casts.

    Raises:
        TypeError: a dtype is not supported or differs from the weight's.
        ValueError: shapes or devices do not fit together.
    """
    _check_tensor(x, "x", op)
    if x.device != weight.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {weight.device}; put both on one device")
    autocast = torch.is_autocast_enabled(x.device.type)
    channels = weight.shape[1] * groups
    dims = weight.dim() - 2
    if x.dim() not in ((dims + 2,) if batched else (dims + 1, dims + 2)):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; for this weight give (N, {channels}, {'*' * dims})")
    if x.shape[-dims - 1] != channels:
        raise ValueError(
            f"{op}: x has {x.shape[-dims - 1]} channels; weight {tuple(weight.shape)} with groups={groups} needs {channels}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"{op}: weight has {weight.shape[0]} output channels; groups={groups} must divide them")
    if x.dtype != weight.dtype and not autocast:
        raise TypeError(f"{op}: x is {x.dtype}, weight is {weight.dtype}; give both in one dtype")
    if bias is not None:
        _check_tensor(bias, "bias", op)
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; for this weight give ({weight.shape[0]},)")
        if bias.device != weight.device:
            raise ValueError(f"{op}: bias is on {bias.device}, weight on {weight.device}; put both on one device")
        if bias.dtype != weight.dtype and not autocast:
            raise TypeError(f"{op}: bias is {bias.dtype}, weight is {weight.dtype}; give both in one dtype")


def check_output(x: Tensor, weight: Tensor, args: ConvArgs, op: str) -> None:
    """Raise RuntimeError, as torch does, where the kernel is larger than the padded input."""
    size, kernel, padding = x.shape[2 - weight.dim() :], weight.shape[2:], args.total_padding(weight.shape[2:])
    for n, k, pad, dilation in zip(size, kernel, padding, args.dilation, strict=True):
        if n + sum(pad) < dilation * (k - 1) + 1:
            padded = tuple(n + sum(pad) for n, pad in zip(size, padding, strict=True))
            extent = tuple(d * (k - 1) + 1 for d, k in zip(args.dilation, kernel, strict=True))
            raise RuntimeError(
                f"{op}: kernel size can't be greater than the padded input: the kernel spans {extent} of {padded}"
            )


def check_affine(affine: tuple[Tensor, Tensor] | None, weight: Tensor, name: str, op: str) -> None:
    """Check the scale and shift ``(O,)`` of a frozen BatchNorm.

    Raises:
        TypeError: it is not a pair of tensors.
        ValueError: a wrong shape or device, or a tensor that requires a gradient, which the op does not compute.
    """
    if affine is None:
        return
    if not isinstance(affine, tuple) or len(affine) != 2:
        raise TypeError(f"{op}: {name} is a {type(affine).__name__}; give a tuple (scale, shift)")
    for part in affine:
        check_rows(part, weight, name, op)
        if part.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient; the affine is frozen, detach it")


def check_residual(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    residual_affine: tuple[Tensor, Tensor] | None,
    args: ConvArgs,
    op: str,
) -> None:
    """Check that the residual has the output's shape, device and dtype (under autocast the op casts)."""
    if residual is None:
        if residual_affine is not None:
            raise ValueError(f"{op}: residual_affine without a residual; give both or none")
        return
    _check_tensor(residual, "residual", op)
    want = (x.shape[0], weight.shape[0], *args.output_size(x.shape[2:], weight.shape[2:]))
    if residual.shape != want:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; the output is {want}")
    alike = residual.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    if not alike or residual.device != x.device:
        raise ValueError(
            f"{op}: residual is {residual.dtype} on {residual.device}; x is {x.dtype} on {x.device}; make them alike"
        )


def check_saved_dtype(saved_dtype: torch.dtype | None, op: str) -> None:
    """Raise ValueError unless ``h`` can be kept in this dtype."""
    if saved_dtype not in (None, *DTYPES):
        raise ValueError(f"{op}: saved_dtype is {saved_dtype!r}; give None, torch.float16, torch.bfloat16 or torch.float32")


def _check_tensor(tensor: object, name: str, op: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; give a tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; give float32, float16, bfloat16 or float64")
