"""``LoRAEdgeConv1d/2d/3d``: ``nn.Conv*`` with a trained output-side TT core beside its frozen weight.

The state of a layer is the stock convolution's plus two parameters: ``core (O, r1)``, trained and initially zero, and
``suffix (r1, I/g, *K)``, frozen. Its update is ``layer.scale * layer.core @ layer.suffix``. In the form "kernel" the core is a
trained kernel ``(O, r, *K)`` and the suffix ``(r, I/g, 1, ...)`` (:mod:`lora_edge.ops.trained_kernel`). :func:`lora_edge.adapt`
re-classes existing convolutions to these classes in place and :func:`lora_edge.merge` re-classes them back.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_edge.nn import fused_weight_cache
from lora_edge.nn.per_module import PerModule
from lora_edge.ops import reference, tt_conv
from lora_edge.ops.backends import requested
from lora_edge.ops.checks import DTYPES, check_conv
from lora_edge.ops.padding import pad
from lora_edge.ops.strides import as_a_layer
from lora_edge.ops.transforms import plain_ops_only, refuse_proxy
from lora_edge.subspaces.weight import kernel_suffix, weight_suffix
from lora_edge.tt import attainable_ranks, check_rank, contract_suffix, is_kernel

_warned: PerModule[bool] = PerModule()  # layers that have warned that their weight is the base's
_Layer = TypeVar("_Layer", bound="LoRAEdgeConv")
_GUARDED = ("weight", "core", "suffix")


class LoRAEdgeConv(nn.modules.conv._ConvNd):
    """Base class of the three layers."""

    stock: ClassVar[type[nn.modules.conv._ConvNd]]
    convolve: ClassVar[Callable[..., Tensor]]  # the function that the stock layer calls
    core: nn.Parameter
    suffix: nn.Parameter
    scale: float
    bond_cap: int  # the requested rank; a renewed suffix is made with it and with ``scaling``
    scaling: str
    saved_dtype: torch.dtype | None  # of ``h`` between forward and backward, None for its own dtype
    backend: str = "auto"  # passed to its ops
    subspace: str = "weight"  # what its suffix was made from, or "random"; only one made from the weight can be renewed
    enabled: bool  # False inside lora_edge.disabled: the base convolution
    frozen_cores: list[Tensor] | None  # [G2, ..., Gd] on the CPU, None if the suffix was given contracted
    belongs_to_adapted: bool = False  # adapted with a whole model, which holds the state; else built on its own
    base_replaced: bool  # load_state_dict loaded another base weight since adapt
    trains_suffix: bool = False  # if False, a suffix gets no gradient even where it requires one
    _may_replace: bool = False  # inside load_state_dict, which assigns parameters with assign=True

    def __init__(self, *args: Any, rank: int = 4, **kwargs: Any) -> None:
        check_rank(rank)
        super().__init__(*args, **kwargs)
        check_adaptable(self)
        self.requires_grad_(False)
        add_core(self, weight_suffix(self.weight, rank), bond_cap=rank)

    @classmethod
    def from_conv(
        cls: type[_Layer], conv: nn.modules.conv._ConvNd, rank: int = 4, suffix: Tensor | Sequence[Tensor] | None = None
    ) -> _Layer:
        """Return an adapted copy of a stock convolution; ``conv`` itself is not changed.

        Args:
            conv: ``nn.Conv1d/2d/3d`` of the same dimension; weight ``(O, I/g, *K)``.
            rank: cap of every TT bond; ignored if ``suffix`` is given.
            suffix: ``(r1, I/g, *K)`` or the frozen cores ``[G2, ..., Gd]``; None for the balanced TT-SVD of the weight.

        Raises:
            TypeError: ``conv`` is not exactly the stock class, or ``rank`` is not an integer.
            ValueError: ``rank`` is below 1, the suffix does not fit, or the convolution is not supported.
        """
        if type(conv) is not cls.stock:
            raise TypeError(f"{cls.__name__}.from_conv: got a {type(conv).__name__}; give an nn.{cls.stock.__name__}")
        check_rank(rank)
        check_adaptable(conv)
        layer = copy.deepcopy(conv)
        layer.requires_grad_(False)
        frozen = weight_suffix(layer.weight, rank) if suffix is None else suffix
        check_suffix(layer.weight, frozen)
        layer.__class__ = cls
        add_core(layer, frozen)  # type: ignore[arg-type]
        return layer  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """``r1`` or ``r``, the attained rank of the bond between core and suffix."""
        return self.core.shape[1]

    @property  # type: ignore[override]
    def weight(self) -> Tensor:
        """The base's weight ``(O, I/g, *K)``, without the update; reading it warns once if there is an update."""
        for tensors in (self._parameters, self.__dict__, self._buffers):
            if (found := tensors.get("weight")) is not None:
                if not torch.compiler.is_compiling() and _read_from_outside():
                    fused_weight_cache.hand_out(self)
                    self._warn_that_weight_is_the_base()
                return found
        raise AttributeError(f"{type(self).__name__} has no weight")

    @weight.setter
    def weight(self, value: Any) -> None:  # weight_norm and the like store a computed weight as a plain attribute
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def _warn_that_weight_is_the_base(self) -> None:
        core = self._parameters.get("core")
        if _warned.get(self) is None and core is not None and bool(core.detach().count_nonzero()):
            _warned.put(self, True)
            warnings.warn(
                "the weight of an adapted convolution is the base's, without the update; call lora_edge.merge(model) first, or "
                "compute lora_edge.ops.tt_fuse(layer.weight, layer.core, layer.suffix, layer.scale)",
                stacklevel=3,
            )

    @property
    def form(self) -> str:
        """``"kernel"`` if the core is a trained kernel, else ``"core"``."""
        return "kernel" if is_kernel(self.core) else "core"

    def frozen_suffix(self) -> Tensor:
        """Return the suffix, detached if something made it require a gradient, so that it is not trained by accident."""
        suffix = self.suffix
        return suffix.detach() if suffix.requires_grad and not self.trains_suffix else suffix

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        if not self.enabled:
            return self.stock.forward(self, input)  # type: ignore[misc, arg-type]
        if plain_ops_only():
            fused = reference.tt_fuse(self.weight, self.core, self.frozen_suffix(), self.scale)
            return self._conv_forward(input, fused, self.bias)
        if not torch.is_grad_enabled() and input.is_cpu and not torch.compiler.is_compiling():
            weight = fused_weight_cache.get(self)
            if weight is not None:
                try:
                    if self.padding_mode == "zeros":  # as _conv_forward does, without its call and module attribute
                        return self.convolve(
                            input, weight, self._parameters["bias"], self.stride, self.padding, self.dilation, self.groups
                        )
                    return self._conv_forward(input, weight, self.bias)
                except RuntimeError:  # prefer our own error, which names the argument
                    check_conv(input, weight, self.bias, self.groups, "tt_conv")
                    raise
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = pad(input, self._reversed_padding_repeated_twice, self.padding_mode), 0  # type: ignore[assignment]
        y = tt_conv(
            input, self.weight, self.core, self.frozen_suffix(), self.bias, self.stride, padding, self.dilation, self.groups,
            self.scale, saved_dtype=self.saved_dtype, backend=self.backend,
        )  # fmt: skip
        if torch.compiler.is_compiling() or requested(self.backend)[0] in ("auto", "torch"):
            return y
        return as_a_layer(y, input, self.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GUARDED and not self._may_replace:
            own = self._parameters.get(name)
            if own is not None and own is not value:
                raise RuntimeError(
                    f"{name} of an adapted convolution cannot be replaced, because its update would be lost; "
                    f"call lora_edge.merge(model) first, or write into the tensor: {name}.data.copy_(...)"
                )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("torch.jit.script cannot compile an adapted convolution; call lora_edge.merge(model) first")

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        fused_weight_cache.drop(self)  # its entry would keep the old memory allocated
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual; a base checkpoint (no ``core``, no ``suffix``) keeps or renews the suffix: docs/design.md, section 4.

        A suffix made from inputs or gradients belongs to its base: a new weight is an error there even while the core is zero.
        """
        own = {name: prefix + name for name in ("weight", "core", "suffix")}
        weight = state_dict.get(own["weight"])
        is_new = weight is not None and weight.shape == self.weight.shape and not _equal(weight, self.weight)
        renew = is_new and own["suffix"] not in state_dict
        if renew and (own["core"] in state_dict or bool(self.core.detach().count_nonzero())):
            error_msgs.append(
                f"{prefix}weight is another base weight, but {prefix}core is already trained for the old one and "
                f"{prefix}suffix is not in the state dict; load it before training, or load a matching suffix too"
            )
            return
        if renew and self.subspace not in ("weight", "random"):
            error_msgs.append(
                f"{prefix}weight is another base weight, but {prefix}suffix was made from {self.subspace}s of the old one; "
                "merge, load it, and adapt again with batches, or load a matching suffix too"
            )
            return
        self._may_replace = True
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)  # type: ignore[no-untyped-call]
        finally:
            self.__dict__.pop("_may_replace", None)
        if own["core"] not in state_dict and own["suffix"] not in state_dict:
            for name in ("core", "suffix"):
                if own[name] in missing_keys:
                    missing_keys.remove(own[name])
        if is_new:
            self.base_replaced = True
        if renew and self.subspace == "weight" and self.form == "kernel":
            with torch.no_grad():
                self.suffix.copy_(kernel_suffix(self.weight, self.bond_cap, self.scaling).view(self.suffix.shape))
        elif renew and self.subspace == "weight":
            cores = weight_suffix(self.weight, self.bond_cap, self.scaling)
            with torch.no_grad():
                self.suffix.copy_(contract_suffix(cores))
            self.frozen_cores = cores
        elif own["suffix"] in state_dict:
            self._drop_stale_cores()

    def _drop_stale_cores(self) -> None:
        """Drop the frozen cores if they no longer contract to the suffix."""
        if self.frozen_cores is not None and not _equal(contract_suffix(self.frozen_cores), self.suffix):
            self.frozen_cores = None


class LoRAEdgeConv1d(LoRAEdgeConv, nn.Conv1d):
    """``nn.Conv1d`` with a trained output-side core; same arguments plus ``rank``. Input ``(N, I, L)`` or ``(I, L)``."""

    stock = nn.Conv1d
    convolve = F.conv1d


class LoRAEdgeConv2d(LoRAEdgeConv, nn.Conv2d):
    """``nn.Conv2d`` with a trained output-side core; same arguments plus ``rank``. Input ``(N, I, H, W)`` or without N."""

    stock = nn.Conv2d
    convolve = F.conv2d


class LoRAEdgeConv3d(LoRAEdgeConv, nn.Conv3d):
    """``nn.Conv3d`` with a trained output-side core; same arguments plus ``rank``. Input ``(N, I, D, H, W)`` or without N."""

    stock = nn.Conv3d
    convolve = F.conv3d


ADAPTED_CLASS: dict[type[nn.Module], type[LoRAEdgeConv]] = {
    nn.Conv1d: LoRAEdgeConv1d,
    nn.Conv2d: LoRAEdgeConv2d,
    nn.Conv3d: LoRAEdgeConv3d,
}


def check_adaptable(conv: nn.modules.conv._ConvNd) -> None:
    """Refuse a convolution that an adapted layer does not support.

    Raises:
        ValueError: a complex or integer weight, a weight on the meta device, or NaN or Inf in it.
    """
    if conv.weight.is_meta:
        raise ValueError("the weight is on the meta device; the TT-SVD needs its values, so build or load the model first")
    if conv.weight.dtype not in DTYPES:
        raise ValueError(f"dtype {conv.weight.dtype} is not supported; use float32, float16, bfloat16 or float64")
    if not bool(torch.isfinite(conv.weight).all()):
        raise ValueError("the weight holds NaN or Inf; load finite weights before adapting")


def check_suffix(weight: Tensor, suffix: Tensor | Sequence[Tensor], form: str = "core") -> None:
    """Raise ValueError unless the suffix, contracted or as frozen cores, fits ``weight (O, I/g, *K)`` and the form."""
    shape = tuple((suffix if isinstance(suffix, Tensor) else contract_suffix(suffix)).shape)
    sizes = (weight.shape[1], *(weight.shape[2:] if form == "core" else [1] * (weight.dim() - 2)))
    if len(shape) != weight.dim() or shape[1:] != sizes:
        raise ValueError(f"suffix has shape {shape}; for a weight {tuple(weight.shape)} give (r1, {_join(sizes)})")
    most = attainable_ranks(weight.shape, max(shape[0], 1))[0] if form == "core" else weight.shape[1]
    if not 1 <= shape[0] <= most:
        raise ValueError(f"suffix has {shape[0]} rows; for a weight {tuple(weight.shape)} give 1 to {most}")


def add_core(
    layer: LoRAEdgeConv,
    frozen: Tensor | Sequence[Tensor],
    core: Tensor | None = None,
    scale: float = 1.0,
    bond_cap: int | None = None,
    scaling: str = "balanced",
    saved_dtype: torch.dtype | None = None,
    backend: str = "auto",
    subspace: str = "weight",
    form: str = "core",
) -> None:
    """Give a re-classed convolution its core and suffix, in float32 for a half-precision weight.

    Args:
        layer: a convolution whose class is one of :data:`ADAPTED_CLASS`.
        frozen: the suffix ``(r1, I/g, *K)``, or the frozen cores ``[G2, ..., Gd]``; in the form "kernel" ``(r, I/g, 1, ...)``.
        core: ``(O, r1)`` or ``(O, r, *K)``, copied; None for zeros of the form.
        scale, bond_cap, scaling, saved_dtype, backend, subspace: see :class:`LoRAEdgeConv`; ``bond_cap`` defaults to ``r1``.
    """
    weight = layer.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    contracted = frozen if isinstance(frozen, Tensor) else contract_suffix(frozen)
    suffix = contracted.detach().to(weight.device, dtype, copy=True).contiguous()
    if core is None:
        core = torch.zeros(weight.shape[0], suffix.shape[0], *(weight.shape[2:] if form == "kernel" else ()))
    layer.core = nn.Parameter(core.detach().to(weight.device, dtype, copy=True))
    layer.suffix = nn.Parameter(suffix, requires_grad=False)
    layer.frozen_cores = None if isinstance(frozen, Tensor) else [c.detach().cpu() for c in frozen]
    layer.scale = float(scale)
    layer.bond_cap = suffix.shape[0] if bond_cap is None else bond_cap
    layer.scaling = scaling
    layer.saved_dtype = saved_dtype
    layer.backend = backend
    layer.subspace = subspace
    layer.enabled = True
    layer.base_replaced = False


def remove_core(layer: LoRAEdgeConv) -> None:
    """Undo :func:`add_core` and re-class to the stock convolution; the weight is not changed."""
    for name in ("core", "suffix"):
        del layer._parameters[name]
    for name in [name for name in layer._parameters if name != "weight"]:  # a weight that was computed in between comes last
        layer._parameters[name] = layer._parameters.pop(name)
    for name in ("frozen_cores", "scale", "bond_cap", "scaling", "saved_dtype", "enabled", "base_replaced"):
        delattr(layer, name)
    for name in ("backend", "subspace", "trains_suffix", "belongs_to_adapted"):
        layer.__dict__.pop(name, None)
    layer.__class__ = layer.stock  # type: ignore[assignment]


def require_whole(layers: Mapping[str, LoRAEdgeConv]) -> None:
    """Refuse to merge adapted layers whose tensors are computed from others since ``adapt``; ``layers`` are by dotted name.

    A frozen weight, which ``remove_parametrizations`` leaves as a buffer, becomes a parameter again.

    Raises:
        RuntimeError: a layer's weight, core or suffix is computed, or the layer is parametrized; says how to undo it.
    """
    for name, layer in layers.items():
        computed = [key for key in _GUARDED if layer._parameters.get(key) is None and layer._buffers.get(key) is None]
        if parametrize.is_parametrized(layer):
            computed = computed or list(layer.parametrizations)  # type: ignore[arg-type]
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {computed[0]!r})"
        elif not computed:
            continue
        elif f"{computed[0]}_mask" in layer._buffers:
            remedy = f"torch.nn.utils.prune.remove(layer, {computed[0]!r})"
        elif f"{computed[0]}_g" in layer._parameters:
            remedy = f"torch.nn.utils.remove_weight_norm(layer, {computed[0]!r})"
        else:
            remedy = f"torch.nn.utils.remove_spectral_norm(layer, {computed[0]!r}) or undo what else computes it"
        raise RuntimeError(f"{name or 'model'}.{computed[0]} is computed since adapt; call {remedy}, then merge")
    for layer in layers.values():
        for key in _GUARDED:
            if (buffer := layer._buffers.pop(key, None)) is not None:
                layer._parameters[key] = nn.Parameter(buffer.detach(), requires_grad=False)


def set_values(name: str, values: Mapping[nn.modules.conv._ConvNd, Tensor]) -> None:
    """Write each convolution's new weight or bias, by ``name``, in place; call it inside ``torch.no_grad()``.

    Convolutions that share a parameter go on sharing it if their new values are equal.
    """
    by_memory: dict[tuple[Any, ...], list[nn.modules.conv._ConvNd]] = {}
    for conv in values:
        old = getattr(conv, name)
        by_memory.setdefault((old.device, old.data_ptr(), old.shape), []).append(conv)
    for convs in by_memory.values():
        if all(torch.equal(values[conv], values[convs[0]]) for conv in convs[1:]):
            getattr(convs[0], name).copy_(values[convs[0]])
        else:  # built separately, they learned different updates and now need separate parameters
            for conv in convs:
                conv._parameters[name] = nn.Parameter(values[conv], getattr(conv, name).requires_grad)


def _read_from_outside() -> bool:
    """Whether the code that reads a property belongs neither to torch nor to this library."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.partition(".")[0] not in ("torch", "lora_edge")


def _equal(a: Tensor, b: Tensor) -> bool:
    a = a.detach().to(b.device, b.dtype)
    return a.shape == b.shape and torch.equal(a, b.detach())


def _join(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
