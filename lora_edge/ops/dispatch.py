"""``tt_fuse``, ``tt_conv`` and ``tt_block`` on an engine's kernels, where these take the call.

In eager mode a call is one ``autograd.Function`` on one cached plan; under ``torch.compile`` it is an operator of torch
(:mod:`lora_edge.ops.custom_ops`), whose dispatch is slower. Both are made of the same launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import custom_ops, plan
from lora_edge.ops.backends import choose_backend, requested
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.engines.memory_layout import channels_last
from lora_edge.ops.engines.registry import chosen, engine, reason
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.plan import BlockPlan, Epilogue, FusePlan, Saves

REFUSED = "does not take this call"  # what a backend says that was asked for by name and leaves the call to torch
_Affine = tuple[Tensor, Tensor] | None
_Frozen = tuple[Tensor, list[Tensor], Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def try_block(
    op: str,
    backend: str,
    x: Tensor,
    weight: Tensor,
    core: Tensor | None,
    suffix: Tensor | Sequence[Tensor] | None,
    bias: Tensor | None,
    residual: Tensor | None,
    affine: _Affine,
    residual_affine: _Affine,
    args: ConvArgs,
    epilogue: Epilogue,
    route: str = "auto",
) -> Tensor | None:
    """``y`` of checked arguments by the kernels, or None where the call is torch's.

    Raises:
        RuntimeError: the backend asked for does not work here, or the kernels do not take this call; the message says why.
    """
    name = choose_backend(backend, op)
    if name == "torch":
        return None
    factors = factors_of(suffix)
    a, b = affine or (None, None)
    residual_a, residual_b = residual_affine or (None, None)
    saves = saves_of(x, core, bias, residual, epilogue)
    kernels = chosen(name, x.device)
    planned: BlockPlan | str | None = reason(kernels, x.device) or plan.trained(weight, factors)
    if planned is None and kernels == "cpu":
        planned = _not_on_the_cpu(op, name)
    if planned is None:
        sizes = plan.sizes_of(x, weight, core, factors, (a, b, residual_a, residual_b))
        if kernels == "cpu":
            sizes = sizes._replace(channels_last=True)
        if torch.compiler.is_compiling():
            why = custom_ops.block_refusal(kernels, sizes, args, epilogue, saves, route)
            if why is None:
                tensors = (x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)
                return custom_ops.block(kernels, *tensors, args, epilogue, saves)
            planned = why
        else:
            found = engine(kernels)
            planned = plan.block_plan(found, found.plan_type(), sizes, args, epilogue, saves, route, plan.precision(x.dtype))
    if isinstance(planned, str):
        _refuse(op, name, planned)
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, core, bias, residual)):
        return _Block.apply(x, core, bias, residual, planned, (weight, factors, a, b, residual_a, residual_b))
    return planned.engine.block_forward(planned, x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)[0]


def try_fuse(backend: str, weight: Tensor, core: Tensor, suffix: Tensor | Sequence[Tensor], scale: float) -> Tensor | None:
    """The fused kernel by the kernels, or None where the call is torch's; raises as :func:`try_block`."""
    name = choose_backend(backend, "tt_fuse")
    if name == "torch":
        return None
    factors = factors_of(suffix)
    kernels = chosen(name, weight.device)
    planned: FusePlan | str | None = reason(kernels, weight.device)
    if planned is None and torch.is_grad_enabled() and any(t.requires_grad for t in factors):
        planned = "suffix requires a gradient; the kernels compute it for weight and core"
    if planned is None:
        sizes = (weight.shape, weight.dtype, core.dtype, tuple([t.shape for t in factors]), tuple([t.dtype for t in factors]))
        if torch.compiler.is_compiling():
            why = custom_ops.fuse_refusal(kernels, *sizes)
            if why is None:
                return custom_ops.fuse(kernels, weight, core, factors, scale)
            planned = why
        else:
            found = engine(kernels)
            planned = plan.fuse_plan(found, found.plan_type(), *sizes, scale)
    if isinstance(planned, str):
        _refuse("tt_fuse", name, planned)
        return None
    return _Fuse.apply(weight, core, factors, planned)


def refusal(
    kernels: str,
    x: Tensor,
    weight: Tensor,
    core: Tensor | None,
    suffix: Tensor | Sequence[Tensor] | None,
    args: ConvArgs,
    epilogue: Epilogue,
) -> str | None:
    """The name of what an engine does not take of a training step's call, None where it takes it; ``x`` may be on "meta"."""
    factors = factors_of(suffix)
    saves = Saves(core is not None and core.requires_grad, epilogue.activation is not None)
    sizes = plan.sizes_of(x, weight, core, factors, ())
    why = reason(kernels, weight.device) or plan.trained(weight, factors)
    if why is not None:
        return why
    found = engine(kernels)
    planned = plan.block_plan(found, found.plan_type(), sizes, args, epilogue, saves, "auto", plan.precision(x.dtype))
    return planned if isinstance(planned, str) else None


def factors_of(suffix: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """The contracted suffix as a list of one, the frozen cores as they are, nothing where there is neither."""
    if suffix is None:
        return []
    return [suffix] if isinstance(suffix, Tensor) else list(suffix)


def saves_of(x: Tensor, core: Tensor | None, bias: Tensor | None, residual: Tensor | None, epilogue: Epilogue) -> Saves:
    """What backward of a call will need."""
    if not torch.is_grad_enabled():
        return Saves(False, False)
    trains = core is not None and core.requires_grad
    if epilogue.activation is None:
        return Saves(trains, False)
    return Saves(trains, trains or any(t is not None and t.requires_grad for t in (x, bias, residual)))


class _Block(torch.autograd.Function):
    """Takes as few arguments as it can: each costs time in ``apply``. ``frozen`` is what no gradient goes to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        planned: BlockPlan,
        frozen: _Frozen,
    ) -> Tensor:
        weight, factors, a, b, residual_a, residual_b = frozen
        y, saved = planned.engine.block_forward(planned, x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(saved, weight, core, a, residual_a, *factors)
        ctx.plan = planned
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, weight, core, a, residual_a, *factors = ctx.saved_tensors
        needs_x, needs_core, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        passed_on = needs_residual and plan.is_passed_on(ctx.plan.saves, residual_a)
        needs = (needs_x, needs_core, needs_bias, needs_residual and not passed_on)
        backward = ctx.plan.engine.block_backward
        dx, dcore, dbias, dresidual = backward(ctx.plan, dy, saved, weight, core, factors, a, residual_a, needs)
        return dx, dcore, dbias, dy if passed_on else dresidual, None, None


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


def channels_last_for_the_cpu(x: Tensor) -> Tensor:
    """``x`` in the memory layout that the CPU engine keeps from block to block, copied once at a network's door."""
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.dim() not in (3, 4)
        or requested("auto")[0] not in ("auto", "cpu")
    ):
        return x
    return x if reason("cpu") is not None else channels_last(x)


def _not_on_the_cpu(op: str, name: str) -> str | None:
    """Why the CPU engine leaves a call to torch, None where it does not."""
    if torch.compiler.is_compiling():
        return "it is traced by torch.compile; the CPU engine runs in eager mode"
    if name == "auto" and op == "tt_conv":
        return "a convolution by itself, which on torch is bit-identical to the stock layer"
    return None


def _refuse(op: str, name: str, why: str) -> None:
    """Raise where the kernels were asked for by name; else the call is torch's."""
    if name != "auto":
        raise RuntimeError(f"{op}: backend {name!r} {REFUSED}: {why}")
