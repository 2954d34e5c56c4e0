"""What an engine checks before compiled code sees addresses: sizes once when a plan is made, tensors at every launch.

A plan is cached by the sizes and dtypes of :class:`lora_edge.ops.plan.Sizes`, so forward need not check these again. It checks
everything else: a layer's tensors may have been replaced, also between forward and backward, and torch's custom operators
(:mod:`lora_edge.ops.custom_ops`) can be called with anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors
from lora_edge.ops.checks import check_weight_sizes
from lora_edge.ops.conv_args import ConvArgs

if TYPE_CHECKING:
    from lora_edge.ops.plan import BlockPlan, DoraPlan, FusePlan, Sizes

_Wanted = tuple[str, Tensor | None, Sequence[int] | None, torch.dtype | None]  # a tensor's name, shape and dtype


def check_sizes(sizes: Sizes, args: ConvArgs, op: str) -> None:
    """Check the sizes of a plan against each other.

    Raises:
        ValueError: ``x (N, I, *L)``, ``weight (O, I/g, *K)``, the factors and the arguments do not fit together.
    """
    weight, x, dims = tuple(sizes.weight), tuple(sizes.x), len(sizes.weight) - 2
    check_weight_sizes(weight, op)
    for name, values, least in (("stride", args.stride, 1), ("dilation", args.dilation, 1), ("groups", (args.groups,), 1)):
        wanted = 1 if name == "groups" else dims
        if len(values) != wanted or min(values) < least:
            raise ValueError(f"{op}: {name} is {tuple(values)}; give {wanted} of at least {least}")
    if args.padding != "same" and len(args.padding) != dims:
        raise ValueError(f"{op}: padding is {args.padding}; give it for {dims} dimensions")
    padding = args.total_padding(weight[2:])
    if any(amount < 0 for pair in padding for amount in pair):
        raise ValueError(f"{op}: padding is {args.padding}; each must be at least 0")
    if weight[0] % args.groups:
        raise ValueError(f"{op}: weight has {weight[0]} output channels; groups={args.groups} must divide them")
    if len(x) != dims + 2 or x[1] != weight[1] * args.groups or min(x) < 0:
        raise ValueError(f"{op}: x has shape {x}; for this weight give (N, {weight[1] * args.groups}, {'*' * dims})")
    if min(args.output_size(x[2:], weight[2:])) < 1:
        raise ValueError(f"{op}: x has shape {x}; padded it must be at least as large as the kernel {weight[2:]}")
    if bool(sizes.factors) != (sizes.core_dtype is not None):
        raise ValueError(f"{op}: one of core and suffix is missing; give both, or neither")
    check_factor_sizes(weight, sizes.factors, op)


def check_factor_sizes(weight: Sequence[int], factors: Sequence[Sequence[int]], op: str) -> None:
    """Check the contracted suffix ``(r1, I/g, *K)`` or the frozen cores against the weight; ValueError if they do not fit."""
    if not factors:
        return
    shapes = [tuple(shape) for shape in factors]
    if len(shapes) == 1:
        if shapes[0][1:] != tuple(weight[1:]) or len(shapes[0]) != len(weight):
            raise ValueError(
                f"{op}: suffix has shape {shapes[0]}; for this weight give (r1, {', '.join(map(str, weight[1:]))})"
            )
    else:
        matched = all(len(shape) == 3 for shape in shapes) and all(a[2] == b[0] for a, b in pairwise(shapes))
        if not matched or shapes[-1][2] != 1 or [shape[1] for shape in shapes] != list(weight[1:]):
            raise ValueError(
                f"{op}: the frozen cores have shapes {shapes}; for this weight give (r_in, n, r_out), n = {tuple(weight[1:])}"
            )


def check_forward(plan: BlockPlan, tensors: BlockTensors) -> None:
    """Check what is not in the plan's key: the core's and the residual's shapes, vectors' sizes, dtypes, and every device.

    Raises:
        TypeError, ValueError: a tensor does not fit the plan; the message names it.
    """
    x, weight, core, bias, residual, factors, *vectors = tensors
    (outputs,) = plan.vector_shape
    index = x.get_device()  # -1 for a CPU; takes a quarter of the time of comparing devices
    good = weight.get_device() == index
    if core is not None:
        good = good and core.shape == plan.core_shape and core.get_device() == index
    for factor in factors:
        good = good and factor.get_device() == index
    if bias is not None:
        good = good and bias.numel() == outputs and bias.dtype is x.dtype and bias.get_device() == index
    if residual is not None:
        good = good and residual.shape == plan.y_shape and residual.dtype is x.dtype and residual.get_device() == index
    for vector in vectors:
        good = good and (vector is None or (vector.numel() == outputs and vector.get_device() == index))
    if not good:
        check_all_forward(plan, tensors)


def check_all_forward(plan: BlockPlan, tensors: BlockTensors) -> None:
    """Check every shape, dtype and device, and name what does not fit; raises as :func:`check_forward`."""
    x, weight, core, bias, residual, factors, *vectors = tensors
    names = ("a", "b", "residual_a", "residual_b")
    _refuse(
        ("weight", weight, plan.weight_shape, weight.dtype), ("core", core, plan.core_shape, plan.dtypes.core),
        ("bias", bias, plan.vector_shape, x.dtype), ("residual", residual, plan.y_shape, x.dtype),
        *((name, t, plan.vector_shape, t.dtype) for name, t in zip(names, vectors, strict=True) if t is not None),
        *(("suffix", t, tuple(t.shape), t.dtype) for t in factors),
        device=x.device,
    )  # fmt: skip


def check_backward(plan: BlockPlan, tensors: BackwardTensors, needs: Sequence[bool]) -> None:
    """Check the tensors of a backward against its plan, as :func:`check_forward` does."""
    dy, saved, weight, core, factors, a, residual_a = tensors
    index, dtypes = dy.get_device(), plan.dtypes
    good = dy.shape == plan.y_shape and dy.dtype is dtypes.x and len(factors) == len(plan.factor_shapes)
    good = good and weight.shape == plan.weight_shape and weight.dtype is dtypes.weight and weight.get_device() == index
    if core is not None:
        good = good and core.shape == plan.core_shape and core.dtype is dtypes.core and core.get_device() == index
    for factor, shape in zip(factors, plan.factor_shapes, strict=False):
        good = good and factor.shape == shape and factor.dtype is dtypes.factor and factor.get_device() == index
    (outputs,) = plan.vector_shape
    good = good and (a is None or (a.numel() == outputs and a.get_device() == index))
    good = good and (residual_a is None or (residual_a.numel() == outputs and residual_a.get_device() == index))
    if saved is None:
        good = good and plan.saved.bytes == 0
    else:
        good = good and saved.numel() == plan.saved.bytes and saved.dtype is torch.uint8 and saved.get_device() == index
    if not good:
        check_all_backward(plan, tensors)
    if needs[1] and not plan.saves.h:
        raise ValueError("tt_block: the core's gradient is needed, but the plan saves no h; give a trained core with a suffix")


def check_all_backward(plan: BlockPlan, tensors: BackwardTensors) -> None:
    """Check every shape, dtype and device, and name what does not fit; raises as :func:`check_forward`."""
    dy, saved, weight, core, factors, a, residual_a = tensors
    dtypes = plan.dtypes
    if len(factors) != len(plan.factor_shapes):
        raise ValueError(f"tt_block: there are {len(factors)} frozen cores; for this plan give {len(plan.factor_shapes)}")
    if saved is None and plan.saved.bytes:
        raise ValueError(f"tt_block: saved is None; give the {plan.saved.bytes} bytes of the forward call")
    _refuse(
        ("dy", dy, plan.y_shape, dtypes.x), ("weight", weight, plan.weight_shape, dtypes.weight),
        ("core", core, plan.core_shape, dtypes.core),
        *(("suffix", t, shape, dtypes.factor) for t, shape in zip(factors, plan.factor_shapes, strict=True)),
        ("a", a, plan.vector_shape, dtypes.affine), ("residual_a", residual_a, plan.vector_shape, dtypes.affine),
        ("saved", saved, (plan.saved.bytes,), torch.uint8),
        device=dy.device,
    )  # fmt: skip


def check_fuse(plan: FusePlan, weight: Tensor, core: Tensor, factors: Sequence[Tensor], name: str = "weight") -> None:
    """Check the tensors of ``tt_fuse`` or, ``name`` "dout", of its backward; raises as :func:`check_forward`."""
    core_shape = (plan.weight_shape[0], plan.factor_shapes[0][0])
    _refuse(
        (name, weight, plan.weight_shape, weight.dtype), ("core", core, core_shape, core.dtype),
        *(("suffix", t, shape, t.dtype) for t, shape in zip(factors, plan.factor_shapes, strict=True)),
        device=weight.device, op="tt_fuse",
    )  # fmt: skip


def check_dora(
    plan: DoraPlan, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, dout: Tensor | None = None,
    norms: Tensor | None = None,
) -> None:  # fmt: skip
    """Check the tensors of ``dora_fuse`` or, with ``dout`` and ``norms``, of its backward; raises as :func:`check_forward`."""
    outputs, rank = plan.weight_shape[0], plan.suffix_shape[0]
    _refuse(
        ("weight", weight, plan.weight_shape, weight.dtype), ("core", core, (outputs, rank), core.dtype),
        ("suffix", suffix, plan.suffix_shape, suffix.dtype), ("magnitude", magnitude, (outputs,), magnitude.dtype),
        ("dout", dout, plan.weight_shape, weight.dtype), ("norms", norms, (outputs,), torch.float32),
        device=weight.device, op="dora_fuse",
    )  # fmt: skip


def _refuse(*wanted: _Wanted, device: torch.device, op: str = "tt_block") -> None:
    """Raise and name the first tensor that does not fit the plan, if there is one."""
    for name, tensor, shape, dtype in wanted:
        if tensor is None:
            continue
        if shape is None:
            raise ValueError(f"{op}: {name} is given, but the plan has none; give None")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; for this plan give {tuple(shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; for this plan give {dtype}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, other tensors on {device}; put all on one device")
