"""Which engine runs a call of ``tt_fuse``, ``dora_fuse``, ``tt_conv`` or ``tt_block``, and the call itself with its gradients.

An engine with kernels gets a call plan: in eager mode a call is one ``autograd.Function`` on one cached plan, under
``torch.compile`` it is a custom operator of torch (:mod:`lora_edge.ops.custom_ops`), whose dispatch is slower. Both consist of
the same launches. A call that the chosen engine does not support goes to the torch engine under "auto" and is an error where
the engine was named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lora_edge.ops import custom_ops, plan, reference
from lora_edge.ops.backends import choose_backend, requested
from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors, suffix_of
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.engines import registry as engines
from lora_edge.ops.engines.protocol import DoraEngine, FusingEngine
from lora_edge.ops.engines.torch import launch as torch_engine
from lora_edge.ops.half_precision import narrowed
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.plan import BlockPlan, DoraPlan, Epilogue, FusePlan, Saves, WeightSizes
from lora_edge.ops.strides import use_copy
from lora_edge.ops.trained_kernel import kernel_grad, projected, projected_grad, record
from lora_edge.tt import is_kernel

REFUSED = "does not support this call"  # what the error of a backend says that was named and leaves the call to torch


def block(
    op: str,
    backend: str,
    tensors: BlockTensors,
    args: ConvArgs,
    epilogue: Epilogue,
    route: str = "auto",
    keep_layout: bool = False,
) -> Tensor:
    """``y`` of checked arguments. ``keep_layout`` leaves it in the layout that the engine keeps from block to block.

    Raises:
        RuntimeError: the named backend does not work here or does not support this call; the message says why.
    """
    wanted = choose_backend(backend, op)
    x, weight, core, bias, residual, factors, *_ = tensors
    traced = _is_traced()
    name = engines.chosen(wanted, x.device, op, traced)
    if name == engines.TORCH:
        return torch_engine.block(op, tensors, args, epilogue, route)
    saves = saves_of(tensors, epilogue)
    kernel = core is not None and is_kernel(core)
    why = None if wanted == "auto" else engines.reason(name, x.device) or engines.leaves(name, op, True, traced)
    why = why or plan.trained(weight, factors)
    if why is None and kernel and traced:
        why = "a trained kernel (O, r, *K) under torch.compile; the operators have cores (O, r1)"
    if why is None and kernel and route == "dense":
        why = "the dense route of a trained kernel's gradient, by choice; beside the kernels there is the factor route"
    if why is None and traced:
        why = custom_ops.block_refusal(name, plan.sizes_of(tensors), args, epilogue, saves, route)
        if why is None:
            return custom_ops.block(name, tensors, args, epilogue, saves)
    elif why is None:
        engine = engines.engine(name)
        if kernel:  # the kernels run the fused weight as a frozen one
            saves, sizes = Saves(False, saves.bits), plan.sizes_of(tensors._replace(core=None, factors=[]))
        else:
            sizes = plan.sizes_of(tensors)
        planned = plan.block_plan(engine, engine.plan_type(), sizes, args, epilogue, saves, route, plan.precision(x.dtype))
        if not isinstance(planned, str):
            if torch.is_grad_enabled() and (
                x.requires_grad
                or (core is not None and core.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                if kernel:
                    y = _Kernel.apply(x, core, bias, residual, planned, tensors, args, epilogue)
                else:
                    y = _Block.apply(x, core, bias, residual, planned, tensors)
            else:
                y = engine.block_forward(planned, _fused(tensors, epilogue.scale) if kernel else tensors)[0]
            if keep_layout or not hasattr(engine, "in_layout_of"):
                return y
            return engine.in_layout_of(y, x, weight)
        why = planned
    _refuse(op, wanted, str(why))
    return torch_engine.block(op, tensors, args, epilogue, route)


def fuse(backend: str, weight: Tensor, core: Tensor, factors: list[Tensor], scale: float) -> Tensor:
    """The fused weight of checked arguments; raises as :func:`block`."""
    wanted = choose_backend(backend, "tt_fuse")
    traced = _is_traced()
    name = engines.chosen(wanted, weight.device, "tt_fuse", traced)
    if name == engines.TORCH:
        return torch_engine.fuse(weight, core, factors, scale)
    why = None if wanted == "auto" else engines.reason(name, weight.device) or engines.leaves(name, "tt_fuse", True, traced)
    if why is None and is_kernel(core):
        why = "a trained kernel (O, r, *K); the kernels fuse cores (O, r1)"
    if why is None and torch.is_grad_enabled() and any(t.requires_grad for t in factors):
        why = "suffix requires a gradient; the kernels compute it for weight and core"
    if why is None:
        shapes, dtypes = tuple([t.shape for t in factors]), tuple([t.dtype for t in factors])
        sizes = WeightSizes(weight.shape, weight.dtype, core.dtype, shapes, dtypes)
        if traced:
            why = custom_ops.fuse_refusal(name, sizes)
            if why is None:
                return custom_ops.fuse(name, weight, core, factors, scale)
        else:
            engine = cast(FusingEngine, engines.engine(name))
            planned = plan.fuse_plan(engine, engine.plan_type(), sizes, scale)
            if not isinstance(planned, str):
                return _Fuse.apply(weight, core, factors, planned)
            why = planned
    _refuse("tt_fuse", wanted, why)
    return torch_engine.fuse(weight, core, factors, scale)


def dora(
    backend: str, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, scale: float, squares: Tensor | None
) -> Tensor:
    """The weight of ``dora_fuse`` of checked arguments; raises as :func:`block`. Kernels need no ``squares``."""
    wanted = choose_backend(backend, "dora_fuse")
    traced = _is_traced()
    name = engines.chosen(wanted, weight.device, "dora_fuse", traced)
    if name == engines.TORCH:
        return torch_engine.dora(weight, core, suffix, magnitude, scale, squares)
    why = None if wanted == "auto" else engines.reason(name, weight.device) or engines.leaves(name, "dora_fuse", True, traced)
    if why is None and torch.is_grad_enabled() and weight.requires_grad:
        why = "weight requires a gradient; the kernels compute it for core, suffix and magnitude"
    if why is None:
        sizes = WeightSizes(weight.shape, weight.dtype, core.dtype, (suffix.shape,), (suffix.dtype,))
        if traced:
            why = custom_ops.dora_refusal(name, sizes, magnitude.dtype)
            if why is None:
                return custom_ops.dora_fuse(weight, core, suffix, magnitude, name, scale)[0]
        else:
            engine = cast(DoraEngine, engines.engine(name))
            planned = plan.dora_plan(engine, engine.plan_type(), sizes, magnitude.dtype, scale)
            if not isinstance(planned, str):
                return _Dora.apply(weight, core, suffix, magnitude, planned)
            why = planned
    _refuse("dora_fuse", wanted, why)
    return torch_engine.dora(weight, core, suffix, magnitude, scale, squares)


def refusal(name: str, tensors: BlockTensors, args: ConvArgs, epilogue: Epilogue) -> str | None:
    """What an engine with kernels does not support of a training step's call, None where it supports it.

    ``tensors.x`` may be on "meta".
    """
    core = tensors.core
    saves = Saves(core is not None and core.requires_grad, epilogue.activation is not None)
    why = engines.reason(name, tensors.weight.device) or plan.trained(tensors.weight, tensors.factors)
    if why is not None:
        return why
    if core is not None and is_kernel(core):
        tensors, saves = tensors._replace(core=None, factors=[]), Saves(False, saves.bits)
    engine, sizes, precision = engines.engine(name), plan.sizes_of(tensors), plan.precision(tensors.x.dtype)
    planned = plan.block_plan(engine, engine.plan_type(), sizes, args, epilogue, saves, "auto", precision)
    return planned if isinstance(planned, str) else None


def laid_out(x: Tensor) -> Tensor:
    """A block's input in the layout of the engine that will run the block; its gradient comes back in ``x``'s own strides."""
    if x.dim() not in (3, 4) or (x.shape[1] > 1 and x.stride(1) == 1):
        return x
    name = engines.chosen(requested("auto")[0], x.device)
    if name not in engines.WITH_KERNELS or engines.reason(name, x.device) is not None:  # the op itself says what is wrong
        return x
    engine = engines.engine(name)
    return use_copy(x, engine.lay_out(x.detach())) if hasattr(engine, "lay_out") else x


def factors_of(suffix: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """The contracted suffix as a list of one, or the frozen cores; empty for None."""
    if suffix is None:
        return []
    return [suffix] if isinstance(suffix, Tensor) else list(suffix)


def saves_of(tensors: BlockTensors, epilogue: Epilogue) -> Saves:
    """What backward of a call will need."""
    if not torch.is_grad_enabled():
        return Saves(False, False)
    x, _, core, bias, residual, *_ = tensors
    trains = core is not None and core.requires_grad
    if epilogue.activation is None:
        return Saves(trains, False)
    passes = x.requires_grad or (bias is not None and bias.requires_grad)
    return Saves(trains, trains or passes or (residual is not None and residual.requires_grad))


class _Block(torch.autograd.Function):
    """Has as few arguments as it can, since each costs time in ``apply``; ``tensors`` holds the first four again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        planned: BlockPlan,
        tensors: BlockTensors,
    ) -> Tensor:
        y, saved = planned.engine.block_forward(planned, tensors)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(saved, tensors.weight, core, tensors.a, tensors.residual_a, *tensors.factors)
        ctx.plan = planned
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, weight, core, a, residual_a, *factors = ctx.saved_tensors
        planned = ctx.plan
        needs_x, needs_core, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        passed_on = needs_residual and plan.is_passed_on(planned.saves, residual_a)
        needs = (needs_x, needs_core, needs_bias, needs_residual and not passed_on)
        tensors = BackwardTensors(dy, saved, weight, core, factors, a, residual_a)
        dx, dcore, dbias, dresidual = planned.engine.block_backward(planned, tensors, needs)
        return dx, dcore, dbias, dy if passed_on else dresidual, None, None


class _Kernel(torch.autograd.Function):
    """A trained kernel: the engine runs the fused weight as a frozen one, and its masked ``dy`` gives the kernel's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        planned: BlockPlan,
        tensors: BlockTensors,
        args: ConvArgs,
        epilogue: Epilogue,
    ) -> Tensor:
        suffix = suffix_of(tensors.factors)
        q = None
        if ctx.needs_input_grad[1]:  # before x is overwritten
            q = narrowed(projected(x, suffix, args.groups), epilogue.saved_dtype or x.dtype)
        y, saved = planned.engine.block_forward(planned, _fused(tensors, epilogue.scale))
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(saved, q, tensors.weight, core, suffix, tensors.a, tensors.residual_a)
        ctx.plan, ctx.args, ctx.scale, ctx.size, ctx.call = planned, args, epilogue.scale, x.shape[2:], record(suffix)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, q, weight, core, suffix, a, residual_a = ctx.saved_tensors
        planned, scale = ctx.plan, ctx.scale
        needs_x, needs_core, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        needs_z = (needs_core or needs_residual) and planned.saves.bits  # the masked dy, which a residual without affine gets
        per_channel = None if a is None else a.to(core.dtype).reshape(-1, *[1] * (core.dim() - 1))
        fused = reference.tt_fuse(weight, core, suffix, scale)
        needs = (needs_x, False, needs_bias, needs_z)
        dx, _, dbias, dz = planned.engine.block_backward(planned, BackwardTensors(dy, saved, fused, None, [], a, None), needs)
        dz = dy if dz is None else dz
        dcore = dresidual = None
        if needs_core:
            dcore = kernel_grad(dz, q, core, ctx.args, scale)
            dcore = dcore if per_channel is None else dcore.mul_(per_channel)
        if needs_residual:
            dresidual = dz if residual_a is None else dz * residual_a.to(dz.dtype).reshape(-1, *[1] * (dz.dim() - 2))
        if ctx.call is not None:
            kernel = core if per_channel is None else core * per_channel
            ctx.call.dq = projected_grad(dz, kernel, ctx.size, ctx.args, scale)
        return dx, dcore, dbias, dresidual, *[None] * 4


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, core: Tensor, factors: list[Tensor], planned: FusePlan) -> Tensor:
        ctx.save_for_backward(core, *factors)
        ctx.plan = planned
        return planned.engine.fuse_forward(planned, weight, core, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        core, *factors = ctx.saved_tensors
        dcore = ctx.plan.engine.fuse_backward(ctx.plan, dout, core, factors) if ctx.needs_input_grad[1] else None
        return dout if ctx.needs_input_grad[0] else None, dcore, None, None


class _Dora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, planned: DoraPlan) -> Tensor:
        out, norms = planned.engine.dora_forward(planned, weight, core, suffix, magnitude)
        ctx.save_for_backward(weight, core, suffix, magnitude, norms)
        ctx.plan = planned
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.plan.engine.dora_backward(ctx.plan, dout, *ctx.saved_tensors, ctx.needs_input_grad[1:4]), None


def _fused(tensors: BlockTensors, scale: float) -> BlockTensors:
    """The call with the fused weight as a frozen one, for a pass of a trained kernel."""
    assert tensors.core is not None
    fused = reference.tt_fuse(tensors.weight, tensors.core, suffix_of(tensors.factors), scale)
    return tensors._replace(weight=fused, core=None, factors=[])


def _is_traced() -> bool:
    """Whether torch.compile is tracing. A function, so that it also holds in a frame that torch.compile gave up and runs."""
    return torch.compiler.is_compiling()


def _refuse(op: str, wanted: str, why: str) -> None:
    """Raise where the engine was named; under "auto" the call is torch's."""
    if wanted != "auto":
        raise RuntimeError(f"{op}: backend {wanted!r} {REFUSED}: {why}")
