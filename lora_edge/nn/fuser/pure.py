"""What a forward may call and still be proven pure: its result depends only on its arguments and on what is guarded.

Everything here computes on tensors, sizes and numbers. It may draw from torch's generator (dropout) or write into a tensor in
place (:func:`writes`), because a plan keeps the order of calls; it reads no other state, stores nothing and calls nothing back.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TENSOR, TENSORS, NUMBER, NUMBERS, VALUE = "tensor", "tensors", "number", "numbers", "value"

_ELEMENTWISE = """abs acos asin atan atan2 ceil clamp clamp_max clamp_min clip cos cosh erf erfc exp expm1
floor fmod frac log
log10 log1p log2 logaddexp neg negative pow reciprocal relu remainder round rsqrt sigmoid sign sin sinh softplus
sqrt square tan tanh trunc add sub subtract mul multiply div divide true_divide maximum minimum where lerp
addcmul addcdiv eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
bitwise_not isnan isinf isfinite nan_to_num"""
_SHAPES = """reshape flatten unflatten squeeze unsqueeze permute transpose swapaxes movedim moveaxis t flip roll
repeat_interleave tile narrow select index_select gather take_along_dim masked_fill diagonal tril triu cat
concat concatenate stack hstack vstack dstack zeros_like ones_like full_like rot90 broadcast_to channel_shuffle
pixel_shuffle pixel_unshuffle"""
_REDUCTIONS = "mean sum amax amin prod std var norm logsumexp cumsum cumprod argmax argmin all any numel softmax log_softmax"
_PRODUCTS = "matmul mm bmm mv dot addmm baddbmm einsum outer conv1d conv2d conv3d conv_transpose1d conv_transpose2d prelu"
_SEVERAL = "chunk split tensor_split unbind var_mean std_mean meshgrid broadcast_tensors"
_EITHER = "max min median mode topk sort kthvalue"
_NEW = "zeros ones full arange linspace eye tensor empty_like"

_TORCH_LAYERS = """relu relu_ layer_norm group_norm batch_norm dropout max_pool1d max_pool2d max_pool3d avg_pool1d
adaptive_avg_pool1d celu selu rrelu hardshrink clone"""

_FUNCTIONAL = """relu relu6 leaky_relu hardtanh hardsigmoid hardswish silu gelu elu selu celu mish sigmoid tanh
softplus softsign
tanhshrink hardshrink softshrink logsigmoid softmax log_softmax softmin normalize glu prelu rrelu threshold
linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pad interpolate upsample
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d
layer_norm group_norm instance_norm local_response_norm batch_norm dropout dropout1d dropout2d dropout3d
alpha_dropout feature_alpha_dropout pixel_shuffle pixel_unshuffle channel_shuffle unfold fold one_hot
grid_sample affine_grid cosine_similarity scaled_dot_product_attention relu_ relu6_ leaky_relu_ hardtanh_ elu_
selu_ celu_ threshold_ rrelu_"""

_METHODS = f"""{_ELEMENTWISE} {_SHAPES} {_REDUCTIONS} matmul mm bmm mv dot addmm baddbmm outer view view_as
reshape_as expand
expand_as repeat contiguous clone detach float double half bfloat16 int long bool to type_as type softmax
log_softmax hardshrink norm new_zeros new_ones new_full new_tensor unfold as_strided"""
_WRITING_METHODS = """abs_ add_ addcdiv_ addcmul_ ceil_ clamp_ clamp_max_ clamp_min_ clip_ copy_ cos_ div_
divide_ exp_ fill_ floor_
fmod_ hardtanh_ leaky_relu_ lerp_ log_ masked_fill_ mul_ multiply_ nan_to_num_ neg_ negative_ pow_ reciprocal_
relu_ relu6_ remainder_ round_ rsqrt_ sigmoid_ sin_ sqrt_ square_ sub_ subtract_ tanh_ true_divide_ zero_
index_copy_ index_fill_ index_add_ scatter_ scatter_add_"""


def _table(owners: Iterable[Any], names: str, kind: str) -> dict[Any, str]:
    found = (getattr(owner, name, None) for owner in owners for name in names.split())
    return {function: kind for function in found if callable(function)}


FUNCTIONS: dict[Any, str] = {
    **_table([torch], f"{_ELEMENTWISE} {_SHAPES} {_REDUCTIONS} {_PRODUCTS} {_NEW} {_TORCH_LAYERS}", TENSOR),
    **_table([torch], _SEVERAL, TENSORS),
    **_table([torch], _EITHER, VALUE),
    **_table([F], _FUNCTIONAL, TENSOR),
    **_table([F], "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices", VALUE),
    **_table([torch], "_assert is_floating_point", VALUE),
}  # fmt: skip
for _name in ("numel",):
    FUNCTIONS[getattr(torch, _name)] = NUMBER
_INDICES_AT = {  # position of return_indices
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), 6),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), 2),
}


def kind_of_call(function: Any, args: list[Any], kwargs: dict[str, Any], kind: str) -> str:
    """Return the kind of result of a call of one of :data:`FUNCTIONS`, whose usual kind is ``kind``."""
    if function in _INDICES_AT and (kwargs.get("return_indices") or len(args) > _INDICES_AT[function]):
        return VALUE
    if function is torch.where and len(args) + len(kwargs) == 1:
        return VALUE
    return kind


METHODS: dict[str, str] = {
    **dict.fromkeys([*_METHODS.split(), *_WRITING_METHODS.split()], TENSOR),
    **dict.fromkeys(_SEVERAL.split(), TENSORS),
    **dict.fromkeys(_EITHER.split(), VALUE),
    "size": NUMBERS, "dim": NUMBER, "ndimension": NUMBER, "numel": NUMBER, "nelement": NUMBER, "stride": NUMBERS,
    "is_contiguous": VALUE, "is_floating_point": VALUE, "get_device": NUMBER, "element_size": NUMBER,
}  # fmt: skip
ATTRIBUTES: dict[str, str] = {
    "shape": NUMBERS, "ndim": NUMBER, "dtype": VALUE, "device": VALUE, "is_cuda": VALUE, "T": TENSOR, "mT": TENSOR,
    "requires_grad": VALUE,
}  # fmt: skip

BINARY: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv, "FloorDiv": operator.floordiv,
    "Mod": operator.mod, "Pow": operator.pow, "MatMult": operator.matmul, "BitAnd": operator.and_, "BitOr": operator.or_,
    "BitXor": operator.xor, "LShift": operator.lshift, "RShift": operator.rshift,
}  # fmt: skip
IN_PLACE: dict[str, Callable[..., Any]] = {
    "Add": operator.iadd, "Sub": operator.isub, "Mult": operator.imul, "Div": operator.itruediv, "FloorDiv": operator.ifloordiv,
    "Mod": operator.imod, "Pow": operator.ipow, "MatMult": operator.imatmul, "BitAnd": operator.iand, "BitOr": operator.ior,
    "BitXor": operator.ixor, "LShift": operator.ilshift, "RShift": operator.irshift,
}  # fmt: skip
UNARY: dict[str, Callable[..., Any]] = {
    "USub": operator.neg, "UAdd": operator.pos, "Invert": operator.invert, "Not": operator.not_,
}  # fmt: skip
COMPARE: dict[str, Callable[..., Any]] = {
    "Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
}  # fmt: skip

# functions of numbers: computed at once on known numbers, part of the graph on sizes
NUMERIC: set[Any] = {
    builtins.abs, builtins.float, builtins.int, builtins.max, builtins.min, builtins.round, builtins.divmod, builtins.pow,
    math.ceil, math.floor, math.sqrt, math.log, math.log2, math.log10, math.exp, math.prod, math.trunc, math.isqrt, math.gcd,
}  # fmt: skip
# what these return whenever a plan runs: gradients are on and nothing is scripted, traced or compiled
CONSTANT: dict[Any, bool] = {
    torch.jit.is_scripting: False, torch.jit.is_tracing: False, torch.compiler.is_compiling: False, torch.is_grad_enabled: True,
}  # fmt: skip

_NUMBER_TYPES = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device)
SCALARS = frozenset([*_NUMBER_TYPES, torch.memory_format, torch.layout])

# batch_norm and instance_norm update the statistics that they are given
WRITES_FUNCTIONS = frozenset([*IN_PLACE.values(), operator.setitem, F.batch_norm, F.instance_norm, torch.batch_norm])


def _inplace_positions() -> dict[Any, int]:
    found = {}
    for function in vars(F).values():
        if type(function) is FunctionType:
            names = function.__code__.co_varnames[: function.__code__.co_argcount]
            if "inplace" in names:
                found[function] = names.index("inplace")
    return found


_INPLACE_POSITIONS = _inplace_positions()


def by_name(function: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the same arguments with ``inplace`` passed by name, which tells whether the call writes."""
    at = _INPLACE_POSITIONS.get(function)
    if at is None or len(args) <= at:
        return args, kwargs
    names = function.__code__.co_varnames[at : len(args)]
    return args[:at], {**dict(zip(names, args[at:], strict=True)), **kwargs}


def writes(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function, or a method given by its name, writes into its first argument."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if function in WRITES_FUNCTIONS or (name.endswith("_") and not name.endswith("__")):
        return True
    return bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def _layers() -> dict[type[nn.Module], Any]:
    found = {}
    for cls in vars(nn).values():
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith("torch.nn.modules."):
            is_container = cls.__module__ == "torch.nn.modules.container" or cls is nn.Module
            is_lazy = issubclass(cls, nn.modules.lazy.LazyModuleMixin)
            if not is_container and not is_lazy:
                found[cls] = cls.forward
    return found


LAYERS = _layers()  # torch's own layers, with their forwards at import
_SEVERAL_OUTPUTS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)


def layer_kind(layer: nn.Module) -> str:
    """Return the kind of result of a call of one of torch's layers."""
    if isinstance(layer, _SEVERAL_OUTPUTS) or getattr(layer, "return_indices", False):
        return VALUE
    return TENSOR
