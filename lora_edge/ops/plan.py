"""Call plans: which calls the kernels support, and everything about a call that its sizes decide, in a bounded cache.

The rule is explicit: :func:`rule` names what no kernels support, and an engine adds the limits of its tiles (``refusal`` in
csrc/plan.h and in engines/triton/plan.py). Nothing is tried first and caught afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_edge.environment.torch_private import constant_when_traced, convolutions_run_in_tf32
from lora_edge.ops.activation import Activation
from lora_edge.ops.block_tensors import BlockTensors
from lora_edge.ops.checks import check_weight_sizes
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.engines.launch_checks import check_factor_sizes, check_sizes
from lora_edge.ops.engines.protocol import DoraEngine, Engine, FusingEngine
from lora_edge.ops.engines.registry import engine
from lora_edge.ops.route import choose_route

PLANS = 1024
MOST_ELEMENTS = 2**31 - 1
MOST_REACH = 2**30  # kMostReach of csrc/check.h
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Type of csrc/problem.h
FP32, TF32, HALF = range(3)  # enum Precision
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "hardtanh": 2}  # enum Activation


class Sizes(NamedTuple):
    """Sizes and dtypes of a call's tensors. ``factors`` are the contracted suffix or the frozen cores, empty if not adapted."""

    x: Sequence[int]
    dtype: torch.dtype
    channels_last: bool
    weight: Sequence[int]
    weight_dtype: torch.dtype
    core_dtype: torch.dtype | None
    factors: tuple[Sequence[int], ...]
    factor_dtypes: tuple[torch.dtype, ...]
    affine_dtypes: tuple[torch.dtype, ...]


class WeightSizes(NamedTuple):
    """Sizes and dtypes of a call on the weight alone, ``tt_fuse`` or ``dora_fuse``; ``factors`` as in :class:`Sizes`."""

    weight: Sequence[int]
    weight_dtype: torch.dtype
    core_dtype: torch.dtype | None
    factors: tuple[Sequence[int], ...]
    factor_dtypes: tuple[torch.dtype, ...]


class Epilogue(NamedTuple):
    """What is fixed for a layer besides its convolution's arguments.

    ``overwrite`` says that ``x`` is not needed afterwards: a ``y`` of the same size may reuse its memory.
    """

    scale: float
    activation: Activation | None = None
    saved_dtype: torch.dtype | None = None
    overwrite: bool = False

    def without_overwriting(self) -> Epilogue:
        """The same for a call whose ``x`` is still needed; torch 2.4 cannot trace ``_replace``."""
        return Epilogue(self.scale, self.activation, self.saved_dtype)


class Saves(NamedTuple):
    """What backward will need: ``h`` where the core is trained, bits where a gradient passes through the activation."""

    h: bool
    bits: bool


class SavedLayout(NamedTuple):
    """The buffer kept for backward, in bytes: ``h (N, *L', g * r1)``, then the bits of csrc/problem.h."""

    h_bytes: int
    h_dtype: torch.dtype
    bits_at: int
    bytes: int


class Dtypes(NamedTuple):
    """The dtypes of a plan's tensors, None where there is no such tensor."""

    x: torch.dtype
    weight: torch.dtype
    core: torch.dtype | None
    factor: torch.dtype | None
    affine: torch.dtype | None


class BlockPlan(NamedTuple):
    """The call plan of ``tt_conv`` or ``tt_block``: everything but the addresses."""

    engine: Engine
    native: Any  # the engine's own plan
    y_shape: tuple[int, ...]
    y_stride: tuple[int, ...]
    dx_shape: tuple[int, ...]
    dx_stride: tuple[int, ...]
    saves: Saves
    saved: SavedLayout
    overwrites: bool  # y may reuse x's memory
    packed_forward: int  # bytes of scratch, like the next two
    packed_backward: int
    partial: int
    weight_shape: tuple[int, ...]  # from here on what launch_checks.py compares a call's tensors with
    core_shape: tuple[int, int] | None
    factor_shapes: tuple[tuple[int, ...], ...]
    vector_shape: tuple[int]
    dtypes: Dtypes


class DoraPlan(NamedTuple):
    """The call plan of ``dora_fuse``: everything but the addresses."""

    engine: DoraEngine
    native: Any
    weight_shape: tuple[int, ...]
    suffix_shape: tuple[int, ...]


class FusePlan(NamedTuple):
    """The call plan of ``tt_fuse``: everything but the addresses."""

    engine: FusingEngine
    native: Any
    partial: int  # bytes of scratch
    weight_shape: tuple[int, ...]
    factor_shapes: tuple[tuple[int, ...], ...]


def sizes_of(tensors: BlockTensors) -> Sizes:
    """The sizes of a call's tensors."""
    x, weight, core, _, _, factors, *affines = tensors
    return Sizes(
        x.shape,
        x.dtype,
        is_channels_last(x) or is_channels_last(weight),
        weight.shape,
        weight.dtype,
        None if core is None else core.dtype,
        tuple([t.shape for t in factors]),
        tuple([t.dtype for t in factors]),
        tuple([t.dtype for t in affines if t is not None]),
    )


def rank_of(sizes: Sizes) -> int:
    """``r1``, 0 where the convolution is not adapted. Not a property, which torch 2.4 cannot trace."""
    return sizes.factors[0][0] if sizes.factors else 0


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are adjacent in memory. If they are in x or the weight, outputs are laid out so as well, in 1-D too."""
    return not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1


def rule(sizes: Sizes, args: ConvArgs, epilogue: Epilogue, saves: Saves, route: str) -> str | None:
    """What the kernels do not support of a call, None where they may support it. Plain Python, so that it can be traced."""
    if len(sizes.weight) == 5:
        return "a 3-D convolution; the kernels support 1-D and 2-D"
    named = [("weight", sizes.weight_dtype), ("x", sizes.dtype), ("core", sizes.core_dtype)]
    named += [("suffix", dtype) for dtype in sizes.factor_dtypes] + [("affine", dtype) for dtype in sizes.affine_dtypes]
    named += [("saved_dtype", epilogue.saved_dtype)]
    for name, dtype in named:
        if dtype is not None and dtype not in TYPES:
            return f"{name} is {dtype}; the kernels support float32, float16 and bfloat16"
    if any(dtype != sizes.factor_dtypes[0] for dtype in sizes.factor_dtypes):
        return "frozen cores of several dtypes; the kernels support one"
    if any(dtype != sizes.affine_dtypes[0] for dtype in sizes.affine_dtypes):
        return "affines of several dtypes; the kernels support one"
    if epilogue.activation is not None and epilogue.activation.name not in ACTIVATIONS:
        return f"activation {epilogue.activation.name}; the kernels support relu, relu6 and hardtanh"
    if any(n == 0 for n in sizes.x[1:]):
        return "an input without channels or positions"
    if any(n == 0 for n in sizes.weight) or any(n == 0 for shape in sizes.factors for n in shape):
        return "a weight or suffix without elements"
    if saves.h:
        if route == "auto":
            itemsize = (epilogue.saved_dtype or sizes.dtype).itemsize
            route = choose_route(sizes.weight, rank_of(sizes), args, sizes.x[2:], itemsize / sizes.dtype.itemsize)
        if route == "dense":
            return (
                "the dense route of the core's gradient, by choice or by the cost model; the kernels support the factor route"
            )
    y_shape = output_shape(sizes, args)
    weight, batch = math.prod(sizes.weight), max(1, sizes.x[0])
    elements = {
        "x": batch * math.prod(sizes.x[1:]),
        "y": batch * math.prod(y_shape[1:]),
        "h": batch * math.prod(y_shape[2:]) * args.groups * rank_of(sizes),
        "weight": weight,
        "core": sizes.weight[0] * rank_of(sizes),
        "suffix": max([weight // sizes.weight[0] * rank_of(sizes), *[math.prod(shape) for shape in sizes.factors]]),
    }
    for name, count in elements.items():
        if count > MOST_ELEMENTS:
            return f"{name} has {count} elements; the kernels support fewer than 2**31"
    padding, kernel = args.total_padding(sizes.weight[2:]), sizes.weight[2:]
    for n, m, k, s, (low, _), d in zip(sizes.x[2:], y_shape[2:], kernel, args.stride, padding, args.dilation, strict=True):
        if n + low + d * k + s * m > MOST_REACH:
            return f"a reach of {n + low + d * k + s * m} positions along an axis; the kernels support up to 2**30"
    return None


def trained(weight: Tensor, factors: Sequence[Tensor]) -> str | None:
    """Which tensor requires a gradient that the convolution kernels do not compute, None where there is none."""
    if torch.is_grad_enabled():
        if weight.requires_grad:
            return "weight requires a gradient; the kernels compute it for x, core, bias and residual"
        if any(t.requires_grad for t in factors):
            return "suffix requires a gradient; the kernels compute it for x, core, bias and residual"
    return None


def precision(dtype: torch.dtype) -> int:
    """The unit that multiplies, by torch's own setting for convolutions, which is read at every call."""
    if dtype != torch.float32:
        return HALF
    return TF32 if convolutions_run_in_tf32() else FP32


@functools.lru_cache(maxsize=PLANS)
def block_plan(
    engine: Engine, plan_type: Any, sizes: Sizes, args: ConvArgs, epilogue: Epilogue, saves: Saves, route: str, precision: int
) -> BlockPlan | str:
    """The plan of ``tt_conv`` or ``tt_block``, or what the engine does not support of the call.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if engine.CHANNELS_LAST:
        sizes = sizes._replace(channels_last=True)
    check_sizes(sizes, args, "tt_block")
    why = rule(sizes, args, epilogue, saves, route)
    if why is not None:
        return why
    native = plan_type(**_fields(sizes, args, epilogue, precision))
    why = native.refusal("tt_block")
    if why is not None:
        return why
    scratch = native.scratch()
    y_shape, y_stride = output_layout(sizes, args)
    overwrites = epilogue.overwrite and y_shape == tuple(sizes.x)
    dx_stride = dense_stride(sizes.x, sizes.channels_last)
    return BlockPlan(
        engine, native, y_shape, y_stride, tuple(sizes.x), dx_stride, saves,
        saved_layout(sizes, args, epilogue, saves), overwrites,
        scratch["packed_forward"], scratch["packed_backward"], scratch["partial"],
        tuple(sizes.weight), (sizes.weight[0], rank_of(sizes)) if sizes.factors else None,
        tuple([tuple(shape) for shape in sizes.factors]), (sizes.weight[0],),
        Dtypes(
            sizes.dtype, sizes.weight_dtype, sizes.core_dtype, sizes.factor_dtypes[0] if sizes.factors else None,
            sizes.affine_dtypes[0] if sizes.affine_dtypes else None,
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=PLANS)
def fuse_plan(engine: FusingEngine, plan_type: Any, sizes: WeightSizes, scale: float) -> FusePlan | str:
    """The plan of ``tt_fuse``, or what the engine does not support of the call; raises as :func:`block_plan`."""
    check_weight_sizes(sizes.weight, "tt_fuse")
    check_factor_sizes(sizes.weight, sizes.factors, "tt_fuse")
    why = fuse_rule(sizes)
    if why is not None:
        return why
    native = plan_type(**_fuse_fields(sizes, scale))
    why = native.refusal("tt_fuse")
    if why is not None:
        return why
    shapes = tuple([tuple(shape) for shape in sizes.factors])
    return FusePlan(engine, native, native.scratch()["fuse_partial"], tuple(sizes.weight), shapes)


def fuse_rule(sizes: WeightSizes) -> str | None:
    """The :func:`rule` of ``tt_fuse``."""
    return rule(*_one_position(sizes), Epilogue(1.0), Saves(False, False), "factor")


@functools.lru_cache(maxsize=PLANS)
def dora_plan(
    engine: DoraEngine, plan_type: Any, sizes: WeightSizes, magnitude_dtype: torch.dtype, scale: float
) -> DoraPlan | str:
    """The plan of ``dora_fuse``, whose one factor is the suffix; otherwise as :func:`fuse_plan`."""
    check_weight_sizes(sizes.weight, "dora_fuse")
    check_factor_sizes(sizes.weight, sizes.factors, "dora_fuse")
    why = dora_rule(sizes, magnitude_dtype)
    if why is not None:
        return why
    native = plan_type(**_fuse_fields(sizes, scale) | {"affine_type": TYPES[magnitude_dtype]})
    why = native.refusal("dora_fuse")
    return DoraPlan(engine, native, tuple(sizes.weight), tuple(sizes.factors[0])) if why is None else why


def dora_rule(sizes: WeightSizes, magnitude_dtype: torch.dtype) -> str | None:
    """The :func:`rule` of ``dora_fuse``."""
    if magnitude_dtype not in TYPES:
        return f"magnitude is {magnitude_dtype}; the kernels support float32, float16 and bfloat16"
    return fuse_rule(sizes)


@constant_when_traced
def refused_when_traced(
    name: str,
    weight: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    factors: tuple[tuple[int, ...], ...],
    factor_dtypes: tuple[torch.dtype, ...],
    args: tuple[Any, ...],
    op: str,
) -> str | None:
    """What an engine by this name does not support of a layer under ``torch.compile``, where the sizes of ``x`` may be symbols.

    The engine is asked about one position: its limits are on the layer, and :func:`rule` has those on sizes.
    """
    weight_dtype, x_dtype, core_dtype = dtypes
    sizes, _ = _one_position(WeightSizes(weight, weight_dtype, core_dtype, factors, factor_dtypes))
    stride, padding, dilation, groups = args
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, weight[2:], strict=True)]
    sizes = sizes._replace(x=(1, weight[1] * groups, *extent), dtype=x_dtype)
    fields = _fields(sizes, ConvArgs(stride, padding, dilation, groups), Epilogue(1.0), precision(x_dtype))
    return engine(name).plan_type()(**fields).refusal(op)


def is_passed_on(saves: Saves, residual_a: Tensor | None) -> bool:
    """Whether the residual's gradient is ``dy`` itself."""
    return not saves.bits and residual_a is None


def output_shape(sizes: Sizes, args: ConvArgs) -> tuple[int, ...]:
    """Shape of ``y``."""
    return (sizes.x[0], sizes.weight[0], *args.output_size(sizes.x[2:], sizes.weight[2:]))


def output_layout(sizes: Sizes, args: ConvArgs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and stride of ``y``."""
    shape = output_shape(sizes, args)
    return shape, dense_stride(shape, sizes.channels_last)


def dense_stride(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Strides of a dense ``(N, C, *L)``, channels last or first."""
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    stride = [0] * len(shape)
    step = 1
    for way in reversed(order):
        stride[way] = step
        step *= shape[way]
    return tuple(stride)


def saved_layout(sizes: Sizes, args: ConvArgs, epilogue: Epilogue, saves: Saves) -> SavedLayout:
    """What backward will need of a call, in one buffer."""
    y_shape = output_shape(sizes, args)
    positions = y_shape[0] * math.prod(y_shape[2:])
    dtype = epilogue.saved_dtype or sizes.dtype
    h = positions * args.groups * rank_of(sizes) * dtype.itemsize if saves.h else 0
    bits_at = (h + 15) // 16 * 16 if saves.bits else h
    groups = 1 if sizes.weight[1] == 1 else args.groups  # the bits of a depthwise position have no gaps
    bits = positions * groups * ((y_shape[1] // groups + 7) // 8) if saves.bits else 0
    return SavedLayout(h, dtype, bits_at, bits_at + bits)


def _one_position(of: WeightSizes) -> tuple[Sizes, ConvArgs]:
    """Sizes of an ungrouped convolution with this weight at one position, for what depends on the weight alone."""
    dims = len(of.weight) - 2
    x = (1, *of.weight[1:])
    sizes = Sizes(x, of.weight_dtype, False, of.weight, of.weight_dtype, of.core_dtype, of.factors, of.factor_dtypes, ())
    return sizes, ConvArgs((1,) * dims, (0,) * dims, (1,) * dims, 1)


def _fuse_fields(sizes: WeightSizes, scale: float) -> dict[str, int | float]:
    return _fields(*_one_position(sizes), Epilogue(scale), HALF if sizes.weight_dtype != torch.float32 else FP32)


def _fields(sizes: Sizes, args: ConvArgs, epilogue: Epilogue, precision: int) -> dict[str, int | float]:
    """The fields of ``Problem`` in csrc/problem.h. A 1-D convolution has height 1."""
    kernel = sizes.weight[2:]
    flat = len(kernel) == 1

    def pair(name: str, values: Sequence[int], height: int) -> dict[str, int]:
        h, w = (height, values[0]) if flat else values
        return {f"{name}_h": int(h), f"{name}_w": int(w)}

    activation = epilogue.activation
    name = None if activation is None else activation.name
    bounds = {"relu6": (0.0, 6.0), "hardtanh": () if activation is None else activation.numbers}.get(name or "", (0.0, 0.0))
    cores = len(sizes.factors) if len(sizes.factors) > 1 else 0
    return {
        "batch": sizes.x[0], "channels": sizes.x[1], "outputs": sizes.weight[0], "groups": args.groups, "rank": rank_of(sizes),
        **pair("in", sizes.x[2:], 1),
        **pair("out", output_shape(sizes, args)[2:], 1),
        **pair("kernel", kernel, 1),
        **pair("stride", args.stride, 1),
        **pair("pad", [low for low, _ in args.total_padding(kernel)], 0),
        **pair("dilation", args.dilation, 1),
        "type": TYPES[sizes.dtype],
        "weight_type": TYPES[sizes.weight_dtype],
        "core_type": TYPES[sizes.core_dtype or sizes.weight_dtype],
        "suffix_type": TYPES[sizes.factor_dtypes[0] if sizes.factors else sizes.weight_dtype],
        "saved_type": TYPES[epilogue.saved_dtype or sizes.dtype],
        "affine_type": TYPES[sizes.affine_dtypes[0] if sizes.affine_dtypes else sizes.weight_dtype],
        "precision": precision,
        "activation": ACTIVATIONS[name], "low": bounds[0], "high": bounds[1],
        "scale": epilogue.scale,
        "cores": cores,
        "bond2": sizes.factors[0][2] if cores else 0,
        "bond3": sizes.factors[1][2] if cores else 0,
    }  # fmt: skip
