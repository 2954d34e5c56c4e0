"""BatchNorm that stays on its running statistics through ``model.train()``: a fixed scale and shift, which saves nothing.

:func:`freeze_bn` re-classes a BatchNorm in place, :func:`unfreeze_bn` re-classes it back.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.unchanged import Beside, Bytes


class _Affine(NamedTuple):
    """A frozen BatchNorm's scale and shift, and what they were made of."""

    made_of: list[Bytes | None]
    eps: float
    affine: tuple[Tensor, Tensor]


_affines: Beside[_Affine] = Beside()


def _hold(bytes_: Bytes | None, tensor: Tensor | None) -> bool:
    return tensor is None if bytes_ is None else tensor is not None and bytes_.hold(tensor)


class FrozenBatchNorm(_BatchNorm):
    """What the frozen classes share: ``training`` stays False, the mode asked for is kept for the way back."""

    stock: ClassVar[type[_BatchNorm]]
    dims: ClassVar[tuple[int, ...]] = ()  # of an input that needs none of the stock layer's own checks
    mode_asked_for: bool
    lean: bool

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        self.mode_asked_for = mode
        super().train(False)
        return self

    def is_lean(self) -> bool:
        """Whether nothing needs to be saved: not where somebody trains the scale or shift after all."""
        affine = (self.weight, self.bias)
        return self.lean and not any(p is not None and p.requires_grad for p in affine)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The scale and shift ``(C,)`` that this layer is, kept while nothing changes; not to be written to."""
        if torch.compiler.is_compiling():
            return self._scale_and_shift()
        kept = _affines.get(self)
        if kept is not None and kept.eps == self.eps:
            tensors = self._tensors()
            if len(tensors) == len(kept.made_of) and all(map(_hold, kept.made_of, tensors)):
                return kept.affine
        _affines.drop(self)
        affine = self._scale_and_shift()
        tensors = self._tensors()
        if len(tensors) == 4 and all(t is None or Bytes.readable(t) for t in tensors) and not affine[0].is_inference():
            _affines.put(self, _Affine([None if t is None else Bytes(t) for t in tensors], self.eps, affine))
        return affine

    def _tensors(self) -> list[Tensor | None]:
        """Statistics and affine, without those that are computed by a parametrization."""
        buffers, parameters = self._buffers, self._parameters
        named = [buffers["running_mean"], buffers["running_var"]]
        return named + [parameters[name] for name in ("weight", "bias") if name in parameters]

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.detach()
        if self.bias is None:
            return scale, -self.running_mean * scale
        return scale, torch.addcmul(self.bias.detach(), self.running_mean, scale, value=-1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.is_lean():
            self._check_input_dim(x)
            return _FrozenBatchNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        if x.is_cpu and not self.training and x.dim() in self.dims and not torch.compiler.is_compiling():
            # the stock layer's own call, without its questions: they take longer than a small map does
            parameters, buffers = self._parameters, self._buffers
            if "weight" in parameters and "bias" in parameters and (mean := buffers["running_mean"]) is not None:
                affine = (parameters["weight"], parameters["bias"])
                return torch.batch_norm(x, *affine, mean, buffers["running_var"], False, 0.0, self.eps, True)
        return self.stock.forward(self, x)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        if x.dim() == 3 and not x.is_contiguous() and x.stride(1) == 1:  # (N, C, 1, L) in channels-last, which torch keeps
            return F.batch_norm(x.unsqueeze(2), mean, var, weight, bias, False, 0.0, eps).squeeze(2)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        var, weight = ctx.saved_tensors
        scale = torch.rsqrt(var + ctx.eps)
        if weight is not None:
            scale = scale * weight
        return dy * scale.to(dy.dtype).reshape(-1, *[1] * (dy.dim() - 2)), None, None, None, None, None


class FrozenBatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that stays on its running statistics."""

    stock = nn.BatchNorm1d
    dims = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that stays on its running statistics."""

    stock = nn.BatchNorm2d
    dims = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that stays on its running statistics."""

    stock = nn.BatchNorm3d
    dims = (5,)


class FrozenSyncBatchNorm(FrozenBatchNorm, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that stays on its running statistics."""

    stock = nn.SyncBatchNorm


FROZEN_CLASS: dict[type[nn.Module], type[FrozenBatchNorm]] = {
    cls.stock: cls for cls in (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, FrozenSyncBatchNorm)
}


def freeze_bn(bn: nn.Module, lean: bool = False) -> None:
    """Re-class a stock BatchNorm with running statistics to its frozen form, in place."""
    mode = bn.training
    bn.__class__ = FROZEN_CLASS[type(bn)]  # type: ignore[assignment]
    bn.lean = lean  # type: ignore[assignment]
    bn.train(mode)


def unfreeze_bn(bn: FrozenBatchNorm) -> None:
    """Back to the stock class, in the training mode that was last asked for."""
    mode = bn.mode_asked_for
    del bn.mode_asked_for, bn.lean
    bn.__class__ = bn.stock  # type: ignore[assignment]
    bn.train(mode)


def why_not_frozen(bn: nn.Module) -> str | None:
    """Why a BatchNorm cannot be frozen (None if it can): a subclass, or one that has no running statistics."""
    if type(bn) not in FROZEN_CLASS:
        return f"{type(bn).__name__} is a subclass of BatchNorm, left alone"
    if bn.running_mean is None:
        return "BatchNorm without running statistics cannot be frozen, left alone"
    return None
