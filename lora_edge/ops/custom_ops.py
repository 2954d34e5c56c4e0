"""The launches of an engine with kernels as custom operators of torch, one graph node each for ``torch.compile``.

``lora_edge::tt_block``, ``lora_edge::tt_fuse``, ``lora_edge::dora_fuse`` and their backwards, with shapes for fake tensors and
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from lora_edge.ops import plan
from lora_edge.ops.activation import Activation
from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors
from lora_edge.ops.checks import check_weight_sizes
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.engines import registry as engines
from lora_edge.ops.engines.outputs import new_dora_outputs
from lora_edge.ops.engines.protocol import DoraEngine, Engine, FusingEngine
from lora_edge.ops.plan import BlockPlan, DoraPlan, Epilogue, FusePlan, Saves, Sizes, WeightSizes

# the engine's name and what is fixed for a layer, as arguments of an operator; padding is (low, high) of each dimension, flat
_LAYER = (
    "str engine, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, float scale, str? activation, "
    "float low, float high, ScalarType? saved_dtype, bool save_h, bool save_bits"
)


_TENSORS = len(BlockTensors._fields)  # the first arguments of the operator


class _Layer:
    """The arguments of ``_LAYER`` as the objects they came from."""

    def __init__(
        self,
        engine: str,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        scale: float,
        activation: str | None,
        low: float,
        high: float,
        saved_dtype: torch.dtype | None,
        save_h: bool,
        save_bits: bool,
    ) -> None:
        if len(padding) % 2:
            raise ValueError(f"lora_edge::tt_block: padding is {list(padding)}; give two numbers for each spatial dimension")
        pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
        self.engine = engine
        self.args = ConvArgs(tuple(stride), pairs, tuple(dilation), groups)
        kind = None if activation is None else Activation(activation, (low, high) if activation == "hardtanh" else ())
        self.epilogue = Epilogue(scale, kind, saved_dtype)
        self.saves = Saves(save_h, save_bits)

    def plan(self, sizes: Sizes, device: torch.device) -> BlockPlan:
        """The plan of a call whose sizes have not been checked yet.

        Raises:
            ValueError: the sizes do not fit together, or there is no such engine.
            RuntimeError: the engine does not work here or does not support the call.
        """
        found = _engine(self.engine, device, "tt_block")
        if self.saves.h and not sizes.factors:
            raise ValueError("lora_edge::tt_block: save_h is True without a core and a suffix; give both, or False")
        unit = plan.precision(sizes.dtype)
        planned = plan.block_plan(found, found.plan_type(), sizes, self.args, self.epilogue, self.saves, "factor", unit)
        if isinstance(planned, str):
            raise RuntimeError(f"lora_edge::tt_block: the engine {self.engine!r} does not support this call: {planned}")
        return planned


def _engine(name: str, device: torch.device, op: str) -> Engine:
    if name not in engines.WITH_KERNELS:
        raise ValueError(f"lora_edge::{op}: engine is {name!r}; give one of {', '.join(map(repr, engines.WITH_KERNELS))}")
    why = engines.reason(name, device)
    if why is not None:
        raise RuntimeError(f"lora_edge::{op}: the engine {name!r} is {why}")
    why = engines.leaves(name, op, True, False)
    if why is not None:
        raise RuntimeError(f"lora_edge::{op}: the engine {name!r} does not support this call: {why}")
    return engines.engine(name)


def _check_dims(op: str, weight: Tensor, factors: Sequence[Tensor], **maps: Tensor) -> None:
    """Check that no required tensor is None, which an operator's schema allows, and that maps have the weight's dimensions."""
    for name, tensor in (("weight", weight), *maps.items(), *(("factors", factor) for factor in factors)):
        if tensor is None:
            raise TypeError(f"lora_edge::{op}: {name} is None; give a tensor")
    check_weight_sizes(weight.shape, f"lora_edge::{op}")
    for name, tensor in maps.items():
        if tensor.dim() != weight.dim():
            shape = tuple(tensor.shape)
            raise ValueError(f"lora_edge::{op}: {name} has shape {shape}; for this weight give {weight.dim()} dimensions")


def block(engine: str, tensors: BlockTensors, args: ConvArgs, epilogue: Epilogue, saves: Saves) -> Tensor:
    """``y`` of a call that the engine supports, by the operator."""
    padding = [p for pair in args.total_padding(tensors.weight.shape[2:]) for p in pair]
    activation = epilogue.activation
    name = None if activation is None else activation.name
    bounds = (activation.numbers if activation is not None else ()) or (0.0, 0.0)
    layer = (
        engine,
        args.stride,
        padding,
        args.dilation,
        args.groups,
        epilogue.scale,
        name,
        *bounds,
        epilogue.saved_dtype,
        *saves,
    )
    return tt_block(*tensors, *layer)[0]


def block_refusal(engine: str, sizes: Sizes, args: ConvArgs, epilogue: Epilogue, saves: Saves, route: str) -> str | None:
    """What the engine does not support of a call that is traced, None where it supports it."""
    why = plan.rule(sizes, args, epilogue, saves, route)
    return why or plan.refused_when_traced(
        engine,
        tuple(sizes.weight),
        (sizes.weight_dtype, sizes.dtype, sizes.core_dtype),
        tuple([tuple(shape) for shape in sizes.factors]),
        sizes.factor_dtypes,
        (args.stride, tuple(args.total_padding(sizes.weight[2:])), args.dilation, args.groups),
        "tt_block",
    )


@custom_op(
    "lora_edge::tt_block",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? core, Tensor? bias, Tensor? residual, Tensor[] factors, Tensor? a, Tensor? b, "
    f"Tensor? residual_a, Tensor? residual_b, {_LAYER}) -> (Tensor, Tensor)",
)
def tt_block(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``y`` and the saved buffer, which has no bytes where backward needs nothing."""
    tensors, layer = BlockTensors(*arguments[:_TENSORS]), arguments[_TENSORS:]
    maps = {"x": tensors.x} if tensors.residual is None else {"x": tensors.x, "residual": tensors.residual}
    _check_dims("tt_block", tensors.weight, tensors.factors, **maps)
    planned = _Layer(*layer).plan(plan.sizes_of(tensors), tensors.x.device)
    y, saved = planned.engine.block_forward(planned, tensors)
    return y, tensors.x.new_empty(0, dtype=torch.uint8) if saved is None else saved


@tt_block.register_fake
def _(*arguments: Any) -> Any:
    tensors, layer = BlockTensors(*arguments[:_TENSORS]), _Layer(*arguments[_TENSORS:])
    sizes = plan.sizes_of(tensors)
    saved = plan.saved_layout(sizes, layer.args, layer.epilogue, layer.saves)
    y = tensors.x.new_empty_strided(*plan.output_layout(sizes, layer.args))
    return y, tensors.x.new_empty(saved.bytes, dtype=torch.uint8)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, core, _, _, factors, a, _, residual_a, _ = inputs[:_TENSORS]
    ctx.save_for_backward(output[1], weight, core, a, residual_a, *factors)
    ctx.x_shape, ctx.layer = x.shape, inputs[_TENSORS:]
    ctx.channels_last = plan.is_channels_last(x) or plan.is_channels_last(weight)


def _block_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved, weight, core, a, residual_a, *factors = ctx.saved_tensors
    needs_x, _, needs_core, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    passed_on = needs_residual and plan.is_passed_on(_Layer(*ctx.layer).saves, residual_a)
    needs = [needs_x, needs_core, needs_bias, needs_residual and not passed_on]
    found = tt_block_backward(
        dy, saved, weight, core, factors, a, residual_a, ctx.x_shape, ctx.channels_last, needs, *ctx.layer
    )  # fmt: skip
    dx, dcore, dbias, dresidual = (t if need else None for t, need in zip(found, needs, strict=True))
    return dx, None, dcore, dbias, dy if passed_on else dresidual, [None] * len(factors), *[None] * 16


tt_block.register_autograd(_block_gradients, setup_context=_remember)


@custom_op(
    "lora_edge::tt_block_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor saved, Tensor weight, Tensor? core, Tensor[] factors, Tensor? a, Tensor? residual_a, "
    f"SymInt[] x_shape, bool channels_last, bool[] needs, {_LAYER}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def tt_block_backward(
    dy: Tensor,
    saved: Tensor,
    weight: Tensor,
    core: Tensor | None,
    factors: list[Tensor],
    a: Tensor | None,
    residual_a: Tensor | None,
    x_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
    *layer: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, core, bias and residual; one that is not needed has no elements."""
    _check_dims("tt_block_backward", weight, factors, dy=dy)
    if saved is None:
        raise TypeError("lora_edge::tt_block_backward: saved is None; give what tt_block returned beside y")
    if len(needs) != 4:
        raise ValueError(f"lora_edge::tt_block_backward: needs is {list(needs)}; give four, for x, core, bias and residual")
    tensors = BackwardTensors(dy, saved, weight, core, factors, a, residual_a)
    planned = _Layer(*layer).plan(_backward_sizes(tensors, x_shape, channels_last), dy.device)
    found = planned.engine.block_backward(planned, tensors, needs)
    dx, dcore, dbias, dresidual = (dy.new_empty(0) if t is None else t for t in found)
    return dx, dcore, dbias, dresidual


@tt_block_backward.register_fake
def _(
    dy: Tensor, saved: Any, weight: Tensor, core: Any, factors: Any, a: Any, residual_a: Any, x_shape: Any, channels_last: bool,
    needs: Sequence[bool], *rest: Any,
) -> Any:  # fmt: skip
    layer = _Layer(*rest)
    sizes = _backward_sizes(BackwardTensors(dy, saved, weight, core, factors, a, residual_a), x_shape, channels_last)
    dx = dy.new_empty_strided(x_shape, plan.dense_stride(x_shape, channels_last)) if needs[0] else dy.new_empty(0)
    dcore = core.new_empty(core.shape) if needs[1] else dy.new_empty(0)
    dbias = dy.new_empty(weight.shape[0]) if needs[2] else dy.new_empty(0)
    dresidual = dy.new_empty_strided(*plan.output_layout(sizes, layer.args)) if needs[3] else dy.new_empty(0)
    return dx, dcore, dbias, dresidual


def _backward_sizes(tensors: BackwardTensors, x_shape: Sequence[int], channels_last: bool) -> Sizes:
    dy, _, weight, core, factors, a, residual_a = tensors
    forward = BlockTensors(dy, weight, core, None, None, factors, a, None, residual_a)
    return plan.sizes_of(forward)._replace(x=tuple(x_shape), channels_last=channels_last)


def fuse(engine: str, weight: Tensor, core: Tensor, factors: list[Tensor], scale: float) -> Tensor:
    """The fused weight of a call that the engine supports, by the operator."""
    return tt_fuse(weight, core, factors, engine, scale)


def fuse_refusal(engine: str, sizes: WeightSizes) -> str | None:
    """What the engine does not support of a call that is traced, None where it supports it."""
    return plan.fuse_rule(sizes) or _weight_refusal(engine, sizes, "tt_fuse")


def _weight_refusal(engine: str, sizes: WeightSizes, op: str) -> str | None:
    ones = (1,) * (len(sizes.weight) - 2)
    return plan.refused_when_traced(
        engine,
        tuple(sizes.weight),
        (sizes.weight_dtype, sizes.weight_dtype, sizes.core_dtype),
        tuple([tuple(shape) for shape in sizes.factors]),
        sizes.factor_dtypes,
        (ones, tuple([(0, 0) for _ in ones]), ones, 1),
        op,
    )


@custom_op(
    "lora_edge::tt_fuse",
    mutates_args=(),
    schema="(Tensor weight, Tensor core, Tensor[] factors, str engine, float scale) -> Tensor",
)
def tt_fuse(weight: Tensor, core: Tensor, factors: Sequence[Tensor], engine: str, scale: float) -> Tensor:
    """The fused weight."""
    planned = _fuse_plan(weight, core, factors, engine, scale)
    return planned.engine.fuse_forward(planned, weight, core, factors)


@tt_fuse.register_fake
def _(weight: Tensor, core: Tensor, factors: Any, engine: str, scale: float) -> Tensor:
    return weight.new_empty(weight.shape)


@custom_op(
    "lora_edge::tt_fuse_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor core, Tensor[] factors, str engine, float scale) -> Tensor",
)
def tt_fuse_backward(dout: Tensor, core: Tensor, factors: Sequence[Tensor], engine: str, scale: float) -> Tensor:
    """The gradient of the core."""
    planned = _fuse_plan(dout, core, factors, engine, scale)
    return planned.engine.fuse_backward(planned, dout, core, factors)


@tt_fuse_backward.register_fake
def _(dout: Tensor, core: Tensor, factors: Any, engine: str, scale: float) -> Tensor:
    return core.new_empty(core.shape)


def _remember_fuse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, core, factors, *ctx.fixed = inputs
    ctx.save_for_backward(core, *factors)


def _fuse_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    core, *factors = ctx.saved_tensors
    dcore = tt_fuse_backward(dout, core, factors, *ctx.fixed) if ctx.needs_input_grad[1] else None
    return dout if ctx.needs_input_grad[0] else None, dcore, [None] * len(factors), None, None


tt_fuse.register_autograd(_fuse_gradients, setup_context=_remember_fuse)


def _fuse_plan(weight: Tensor, core: Tensor, factors: Sequence[Tensor], engine: str, scale: float) -> FusePlan:
    shapes, dtypes = tuple([t.shape for t in factors]), tuple([t.dtype for t in factors])
    _check_dims("tt_fuse", weight, factors)
    if core is None:
        raise TypeError("lora_edge::tt_fuse: core is None; give a tensor")
    if not factors:
        raise ValueError("lora_edge::tt_fuse: factors is empty; give the suffix or the frozen cores")
    found = cast(FusingEngine, _engine(engine, weight.device, "tt_fuse"))
    sizes = WeightSizes(weight.shape, weight.dtype, core.dtype, shapes, dtypes)
    planned = plan.fuse_plan(found, found.plan_type(), sizes, scale)
    if isinstance(planned, str):
        raise RuntimeError(f"lora_edge::tt_fuse: the engine {engine!r} does not support this call: {planned}")
    return planned


def dora_refusal(engine: str, sizes: WeightSizes, magnitude_dtype: torch.dtype) -> str | None:
    """What the engine does not support of a call that is traced, None where it supports it."""
    return plan.dora_rule(sizes, magnitude_dtype) or _weight_refusal(engine, sizes, "dora_fuse")


@custom_op(
    "lora_edge::dora_fuse",
    mutates_args=(),
    schema="(Tensor weight, Tensor core, Tensor suffix, Tensor magnitude, str engine, float scale) -> (Tensor, Tensor)",
)
def dora_fuse(
    weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, engine: str, scale: float
) -> tuple[Tensor, Tensor]:
    """The weight, and the norms of its rows before the magnitude."""
    planned = _dora_plan((weight, core, suffix, magnitude), engine, scale)
    return planned.engine.dora_forward(planned, weight, core, suffix, magnitude)


@dora_fuse.register_fake
def _(weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, engine: str, scale: float) -> tuple[Tensor, Tensor]:
    return new_dora_outputs(weight)


@custom_op(
    "lora_edge::dora_fuse_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor weight, Tensor core, Tensor suffix, Tensor magnitude, Tensor norms, bool[] needs, str engine, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)
def dora_fuse_backward(
    dout: Tensor, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, norms: Tensor, needs: Sequence[bool],
    engine: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of core, suffix and magnitude; one that is not needed has no elements."""
    if len(needs) != 3:
        raise ValueError(f"lora_edge::dora_fuse_backward: needs is {list(needs)}; give three, for core, suffix and magnitude")
    for name, tensor in (("dout", dout), ("norms", norms)):
        if tensor is None:
            raise TypeError(f"lora_edge::dora_fuse_backward: {name} is None; give a tensor")
    planned = _dora_plan((weight, core, suffix, magnitude), engine, scale)
    found = planned.engine.dora_backward(planned, dout, weight, core, suffix, magnitude, norms, needs)
    dcore, dsuffix, dmagnitude = (dout.new_empty(0) if t is None else t for t in found)
    return dcore, dsuffix, dmagnitude


@dora_fuse_backward.register_fake
def _(
    dout: Tensor, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, norms: Tensor, needs: Sequence[bool],
    engine: str, scale: float,
) -> Any:  # fmt: skip
    operands = (core, suffix, magnitude)
    return tuple([t.new_empty(t.shape) if need else dout.new_empty(0) for t, need in zip(operands, needs, strict=True)])


def _remember_dora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, engine, scale = inputs
    ctx.save_for_backward(*operands, output[1])
    ctx.fixed = engine, scale


def _dora_gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    needs_weight, *needs = ctx.needs_input_grad[:4]
    if needs_weight:
        raise RuntimeError("lora_edge::dora_fuse: weight requires a gradient; it is computed for core, suffix and magnitude")
    found = dora_fuse_backward(dout, *ctx.saved_tensors, needs, *ctx.fixed)
    return None, *(t if need else None for t, need in zip(found, needs, strict=True)), None, None


dora_fuse.register_autograd(_dora_gradients, setup_context=_remember_dora)


def _dora_plan(operands: tuple[Tensor, Tensor, Tensor, Tensor], engine: str, scale: float) -> DoraPlan:
    for name, tensor in zip(("weight", "core", "suffix", "magnitude"), operands, strict=True):
        if tensor is None:
            raise TypeError(f"lora_edge::dora_fuse: {name} is None; give a tensor")
    weight, core, suffix, magnitude = operands
    found = cast(DoraEngine, _engine(engine, weight.device, "dora_fuse"))
    sizes = WeightSizes(weight.shape, weight.dtype, core.dtype, (suffix.shape,), (suffix.dtype,))
    planned = plan.dora_plan(found, found.plan_type(), sizes, magnitude.dtype, scale)
    if isinstance(planned, str):
        raise RuntimeError(f"lora_edge::dora_fuse: the engine {engine!r} does not support this call: {planned}")
    return planned
