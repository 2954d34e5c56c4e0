"""``tt_fuse``, ``tt_conv`` and ``tt_block`` on the compiled extension, where its kernels take the call.

In eager mode a call is one ``autograd.Function`` on one cached plan; under ``torch.compile`` it is an operator of torch
(:mod:`lora_edge.ops.custom_ops`), whose dispatch is slower. Both are made of the same launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_edge.ops import cuda_plan, custom_ops, extension
from lora_edge.ops.backends import choose_backend
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.cuda_launch import block_backward, block_forward, extension_module, fuse_backward, fuse_forward, is_passed_on
from lora_edge.ops.cuda_plan import BlockPlan, Epilogue, FusePlan, Saves

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
    plan: BlockPlan | str | None = extension.reason(x.device) or cuda_plan.trained(weight, factors)
    if plan is None:
        sizes = cuda_plan.sizes_of(x, weight, core, factors, (a, b, residual_a, residual_b))
        if torch.compiler.is_compiling():
            why = custom_ops.block_refusal(sizes, args, epilogue, saves, route)
            if why is None:
                tensors = (x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)
                return custom_ops.block(*tensors, args, epilogue, saves)
            plan = why
        else:
            unit = cuda_plan.precision(x.dtype)
            plan = cuda_plan.block_plan(extension_module(), sizes, args, epilogue, saves, route, unit)
    if isinstance(plan, str):
        _refuse(op, name, plan)
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, core, bias, residual)):
        return _Block.apply(x, core, bias, residual, plan, (weight, factors, a, b, residual_a, residual_b))
    return block_forward(plan, x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)[0]


def try_fuse(backend: str, weight: Tensor, core: Tensor, suffix: Tensor | Sequence[Tensor], scale: float) -> Tensor | None:
    """The fused kernel by the kernels, or None where the call is torch's; raises as :func:`try_block`."""
    name = choose_backend(backend, "tt_fuse")
    if name == "torch":
        return None
    factors = factors_of(suffix)
    plan: FusePlan | str | None = extension.reason(weight.device)
    if plan is None and torch.is_grad_enabled() and any(t.requires_grad for t in factors):
        plan = "suffix requires a gradient; the kernels compute it for weight and core"
    if plan is None:
        sizes = (weight.shape, weight.dtype, core.dtype, tuple([t.shape for t in factors]), tuple([t.dtype for t in factors]))
        if torch.compiler.is_compiling():
            why = custom_ops.fuse_refusal(*sizes)
            if why is None:
                return custom_ops.fuse(weight, core, factors, scale)
            plan = why
        else:
            plan = cuda_plan.fuse_plan(extension_module(), *sizes, scale)
    if isinstance(plan, str):
        _refuse("tt_fuse", name, plan)
        return None
    return _Fuse.apply(weight, core, factors, plan)


def refusal(
    x: Tensor, weight: Tensor, core: Tensor | None, suffix: Tensor | Sequence[Tensor] | None, args: ConvArgs, epilogue: Epilogue
) -> str | None:
    """The name of what the kernels do not take of a training step's call, None where they take it; ``x`` may be on "meta"."""
    factors = factors_of(suffix)
    saves = Saves(core is not None and core.requires_grad, epilogue.activation is not None)
    sizes = cuda_plan.sizes_of(x, weight, core, factors, ())
    why = extension.reason(weight.device) or cuda_plan.trained(weight, factors)
    if why is not None:
        return why
    plan = cuda_plan.block_plan(extension_module(), sizes, args, epilogue, saves, "auto", cuda_plan.precision(x.dtype))
    return plan if isinstance(plan, str) else None


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
        ctx: Any, x: Tensor, core: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: BlockPlan, frozen: _Frozen
    ) -> Tensor:
        weight, factors, a, b, residual_a, residual_b = frozen
        y, saved = block_forward(plan, x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)
        ctx.save_for_backward(saved, weight, core, a, residual_a, *factors)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, weight, core, a, residual_a, *factors = ctx.saved_tensors
        needs_x, needs_core, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        passed_on = needs_residual and is_passed_on(ctx.plan.saves, residual_a)
        needs = (needs_x, needs_core, needs_bias, needs_residual and not passed_on)
        dx, dcore, dbias, dresidual = block_backward(ctx.plan, dy, saved, weight, core, factors, a, residual_a, needs)
        return dx, dcore, dbias, dy if passed_on else dresidual, None, None


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, core: Tensor, factors: list[Tensor], plan: FusePlan) -> Tensor:
        ctx.save_for_backward(core, *factors)
        ctx.plan = plan
        return fuse_forward(plan, weight, core, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        core, *factors = ctx.saved_tensors
        dcore = fuse_backward(ctx.plan, dout, core, factors) if ctx.needs_input_grad[1] else None
        return dout if ctx.needs_input_grad[0] else None, dcore, None, None


def _refuse(op: str, name: str, why: str) -> None:
    """Raise where the kernels were asked for by name; else the call is torch's."""
    if name == "cuda":
        raise RuntimeError(f"{op}: backend 'cuda' does not take this call: {why}")
