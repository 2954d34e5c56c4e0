"""BatchNorm that stays on its running statistics through ``model.train()``: a fixed scale and shift that saves nothing.

:func:`freeze_bn` re-classes a BatchNorm in place, :func:`unfreeze_bn` re-classes it back.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.error_text import in_words
from lora_edge.nn.frozen_trial import why_evaluation_moves
from lora_edge.nn.per_module import PerModule
from lora_edge.nn.staleness import Bytes
from lora_edge.ops.once import linear_once_differentiable
from lora_edge.ops.strides import no_view
from lora_edge.ops.transforms import plain_ops_only, refuse_proxy


class _Affine(NamedTuple):
    """A frozen BatchNorm's scale and shift, and what they were computed from."""

    made_of: list[Bytes | None]
    eps: float
    affine: tuple[Tensor, Tensor]


_affines: PerModule[_Affine] = PerModule()


def _hold(bytes_: Bytes | None, tensor: Tensor | None) -> bool:
    return tensor is None if bytes_ is None else tensor is not None and bytes_.hold(tensor)


class FrozenNorm(_BatchNorm):
    """Base of every frozen BatchNorm: ``training`` stays False; :func:`unfreeze_bn` restores the requested mode."""

    stock: ClassVar[type[_BatchNorm]]  # the class that it had
    requested_mode: bool
    lean: bool

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)  # the submodules of a subclass follow the requested mode
        self.requested_mode = mode
        self.training = False
        return self

    def reset_running_stats(self) -> None:
        """Keep the statistics and warn; ``torch.optim.swa_utils.update_bn`` calls this first."""
        warnings.warn(
            "the statistics of a frozen BatchNorm do not move; to move them, call lora_edge.calibrate_bn(model, batches) "
            'or adapt with bn="batch"',
            stacklevel=2,
        )

    def is_lean(self) -> bool:
        """Whether the layer is a fixed scale and shift: not if these are trained, or if the instance has its own forward."""
        affine = (self.weight, self.bias)
        return self.lean and "forward" not in self.__dict__ and not any(p is not None and p.requires_grad for p in affine)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the layer's scale and shift ``(C,)``, cached while nothing changes; do not write to them."""
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
        """Return statistics and affine parameters, without those that a parametrization computes."""
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

    def _frozen(self, x: Tensor) -> Tensor:
        return _FrozenBatchNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


class FrozenBatchNorm(FrozenNorm):
    """A frozen BatchNorm whose forward is the stock layer's."""

    dims: ClassVar[tuple[int, ...]] = ()  # of inputs for which the stock layer's checks may be skipped

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        if torch.is_grad_enabled() and self.is_lean() and not plain_ops_only():
            self._check_input_dim(input)
            return self._frozen(input)
        if input.is_cpu and not self.training and input.dim() in self.dims and not torch.compiler.is_compiling():
            # the stock layer's own call without its checks, which take longer than a small map
            parameters, buffers = self._parameters, self._buffers
            if "weight" in parameters and "bias" in parameters and (mean := buffers["running_mean"]) is not None:
                affine = (parameters["weight"], parameters["bias"])
                return torch.batch_norm(input, *affine, mean, buffers["running_var"], False, 0.0, self.eps, True)
        return self.stock.forward(self, input)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        if x.dim() == 3 and not x.is_contiguous() and x.stride(1) == 1:  # (N, C, 1, L) channels-last, which torch keeps
            return no_view(F.batch_norm(x.unsqueeze(2), mean, var, weight, bias, False, 0.0, eps).squeeze(2))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @linear_once_differentiable
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


class FrozenSubclass(FrozenNorm):
    """A frozen subclass of BatchNorm: its own forward, in evaluation mode. :func:`frozen_class` makes the classes."""

    def is_lean(self) -> bool:
        return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc, str-unpack]
        if args and args[0] is type(self):
            return _rebuild, (make, self.stock, *args[1:]), *rest
        return (make, args, *rest)


class FrozenThen(FrozenSubclass):
    """A frozen subclass whose forward is known: plain BatchNorm, then those of the submodules ``then`` that exist."""

    then: ClassVar[tuple[str, ...]]

    def is_lean(self) -> bool:
        return FrozenNorm.is_lean(self)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        if not (torch.is_grad_enabled() and self.is_lean()) or plain_ops_only():
            return self.stock.forward(self, input)
        y = self.normalized(input)
        for name in self.then:
            if (module := self._modules.get(name)) is not None:
                y = module(y)
        return y

    def normalized(self, x: Tensor) -> Tensor:
        """Apply plain BatchNorm without the submodules."""
        if torch.is_grad_enabled() and self.is_lean():
            return self._frozen(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _rebuild(make: Any, stock: type[_BatchNorm], *args: Any) -> Any:
    return make(frozen_class(stock), *args)


FROZEN_CLASS: dict[type[nn.Module], type[FrozenBatchNorm]] = {
    cls.stock: cls for cls in (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, FrozenSyncBatchNorm)
}
_subclasses: dict[type[nn.Module], type[FrozenSubclass]] = {}

# Subclasses whose forward is known to be BatchNorm and then those of these submodules that exist.
_THEN = {"timm.layers.norm_act.BatchNormAct2d": ("drop", "act")}


def frozen_class(kind: type[nn.Module]) -> type[FrozenNorm]:
    """Return the frozen class for BatchNorm or a subclass of it; the same one at every call.

    Raises:
        TypeError: ``kind`` cannot be subclassed.
    """
    if kind in FROZEN_CLASS:
        return FROZEN_CLASS[kind]
    if kind not in _subclasses:
        then = _THEN.get(f"{kind.__module__}.{kind.__qualname__}")
        names = {"__module__": kind.__module__, "__qualname__": f"Frozen{kind.__qualname__}", "stock": kind}
        frozen = FrozenSubclass if then is None else FrozenThen
        made = type(f"Frozen{kind.__name__}", (frozen, kind), names if then is None else {**names, "then": then})
        _subclasses.setdefault(kind, made)  # if two threads race, the first one's
    return _subclasses[kind]


def freeze_bn(bn: nn.Module, lean: bool = False) -> None:
    """Re-class a BatchNorm to its frozen class, in place; :func:`why_not_frozen` must return None for it.

    One that is frozen already keeps its class and the training mode that it will be given back.
    """
    if isinstance(bn, FrozenNorm):
        bn.lean = lean
        return
    bn.__class__ = frozen_class(type(bn))  # type: ignore[assignment]
    bn.lean, bn.requested_mode = lean, bn.training  # type: ignore[assignment]
    bn.training = False


def freeze_as(bn: nn.Module, frozen: FrozenNorm) -> None:
    """Freeze a BatchNorm that replaces a frozen one, with that one's settings and remembered statistics."""
    freeze_bn(bn, frozen.lean)
    bn.requested_mode = frozen.requested_mode  # type: ignore[assignment]
    if "_base_statistics" in frozen.__dict__:
        bn.__dict__["_base_statistics"] = frozen.__dict__["_base_statistics"]


def unfreeze_bn(bn: FrozenNorm) -> None:
    """Re-class a frozen BatchNorm back to its own class and restore the training mode that was last requested."""
    mode = bn.requested_mode
    del bn.requested_mode, bn.lean
    bn.__class__ = bn.stock  # type: ignore[assignment]
    bn.training = mode


def why_not_frozen(bn: nn.Module) -> str | None:
    """Return why a BatchNorm cannot be frozen (None if it can): no running statistics, or :func:`why_it_moves`."""
    if bn.running_mean is None:
        return "BatchNorm without running statistics cannot be frozen, left alone"
    return why_it_moves(bn)


def why_it_moves(bn: nn.Module) -> str | None:
    """Return why ``training = False`` does not freeze a BatchNorm with running statistics, None if it does.

    Stock layers are known to be frozen. Any other forward is tried: see :func:`lora_edge.nn.frozen_trial.why_evaluation_moves`.
    """
    if isinstance(bn, FrozenNorm) or (type(bn) in FROZEN_CLASS and "forward" not in bn.__dict__):
        return None
    try:
        kind = frozen_class(type(bn))
    except TypeError as error:
        return f"{type(bn).__name__} cannot be subclassed ({in_words(error)})"
    return why_evaluation_moves(bn, kind)


def unfreezable(model: nn.Module) -> dict[str, str]:
    """Return name and reason of every BatchNorm whose running statistics would move, or not be used, although frozen."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and (why := why_it_moves(module)):
            found[name] = why
    return found
