"""The case matrix of the compiled kernels: inputs, their launch, and the expected results in float64.

The emulator, the mutation run and a CUDA device all run the same cases. A new case is one line of a table below.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from helpers.cases import CASES, ConvCase
from helpers.emulator import problem
from lora_edge.ops import reference
from lora_edge.ops.conv_args import ConvArgs, conv, conv_args
from lora_edge.tt import contract_suffix

TOLERANCE = {"fp32": 1e-5, "tf32": 1e-3, "half": 1e-2}
ACTIVATIONS: dict[str | None, tuple[str | None, float, float]] = {
    None: (None, 0.0, 0.0), "relu": ("relu", 0.0, 0.0), "relu6": ("clamp", 0.0, 6.0), "hardtanh": ("clamp", -0.5, 0.7),
}  # fmt: skip


@dataclass
class Launch:
    """One launch: the fields of its Problem, tensors and empty outputs by the names of ``csrc/fields.h``."""

    name: str
    op: str
    fields: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    scratch: tuple[str, ...]
    expected: dict[str, Tensor]
    tolerance: dict[str, float]  # by output

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Relative error ``|a - b| / |b|`` of each output, to compare with ``tolerance``; infinite where a NaN is misplaced."""
        return {name: _error(results[name], want) for name, want in self.expected.items()}


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    difference, size = (got - want).nan_to_num(0.0).norm(), want.nan_to_num(0.0).norm()
    return float(difference / size) if size > 0 else float(difference)


@dataclass(frozen=True)
class Case:
    """A block on one convolution, forward and backward."""

    conv: ConvCase
    unit: str = "fp32"  # fp32, tf32, f16, bf16
    adapted: bool = True
    cores: bool = False
    affine: bool = False
    residual: bool = False
    residual_affine: bool = False
    activation: str | None = None
    saved: torch.dtype | None = None
    core_dtype: torch.dtype | None = None
    scale: float = 1.0
    dx: bool = True
    misaligned: bool = False  # x and dy begin 4 or 2 bytes past an aligned address
    expanded: bool = False  # x and dy are one sample, repeated with stride 0
    not_a_number: bool = False  # one NaN in x and dy, which must reach only its own outputs

    @property
    def name(self) -> str:
        words = [self.conv.name, self.unit]
        words += [f for f in ("cores", "affine", "residual", "residual_affine", "misaligned", "expanded") if getattr(self, f)]
        words += [] if self.activation is None else [self.activation]
        words += ["not adapted"] if not self.adapted else []
        words += ["no dx"] if not self.dx else []
        words += ["NaN"] if self.not_a_number else []
        words += [] if self.saved is None else [f"h in {str(self.saved)[6:]}"]
        return ", ".join(words)

    @property
    def dtype(self) -> torch.dtype:
        return {"f16": torch.float16, "bf16": torch.bfloat16}.get(self.unit, torch.float32)

    @property
    def precision(self) -> str:
        return "half" if self.dtype != torch.float32 else self.unit

    def launches(self) -> Iterator[Launch]:
        inputs = _Inputs(self)
        yield _forward(self, inputs)
        yield _backward(self, inputs)


class _Inputs:
    """Seeded random tensors of a case, each in its dtype; ``exact`` gives them in float64."""

    def __init__(self, case: Case) -> None:
        c = case.conv
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        kernel = (c.kernel,) * c.dims if isinstance(c.kernel, int) else tuple(c.kernel)
        self.args: ConvArgs = conv_args(c.stride, c.padding, c.dilation, c.groups, c.dims, "case")
        dtype, core_dtype = case.dtype, case.core_dtype or case.dtype
        fan_in = c.inputs // c.groups * torch.Size(kernel).numel()
        self.weight = (self.normal(c.outputs, c.inputs // c.groups, *kernel) / fan_in**0.5).to(dtype)
        rank = min(c.rank, c.outputs, fan_in) if case.adapted else 0
        self.rank = rank
        sizes = [c.inputs // c.groups, *kernel]
        bonds = [rank, min(c.rank + 1, 3), min(c.rank, 2)]
        ends = [*bonds[: c.dims + 1], 1]
        self.cores = [self.normal(ends[i], n, ends[i + 1]).to(core_dtype) for i, n in enumerate(sizes)] if rank else []
        self.suffix = contract_suffix([core.double() for core in self.cores]).div(fan_in**0.5) if rank else None
        if self.suffix is not None and case.cores:
            self.cores[0] = (self.cores[0].double() / fan_in**0.5).to(core_dtype)
            self.suffix = contract_suffix([core.double() for core in self.cores])
        elif self.suffix is not None:
            self.suffix = self.suffix.to(core_dtype)
        self.core = self.normal(c.outputs, rank).to(core_dtype) if rank else None
        self.x = self._map(case, (c.batch, c.inputs, *c.size))
        out = tuple(self.args.output_size(c.size, kernel))
        self.y_shape = (c.batch, c.outputs, *out)
        self.dy = self._map(case, self.y_shape)
        self.bias = self.normal(c.outputs).to(dtype) if c.bias else None
        self.affine = (self.normal(c.outputs) * 0.5 + 1, self.normal(c.outputs)) if case.affine else None
        self.residual = self._map(replace(case, misaligned=False, expanded=False, not_a_number=False), self.y_shape)
        self.residual_affine = (self.normal(c.outputs) * 0.5 + 1, self.normal(c.outputs)) if case.residual_affine else None

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _map(self, case: Case, shape: tuple[int, ...]) -> Tensor:
        """A random map in the case's layout."""
        value = self.normal(*(shape if not case.expanded else (1, *shape[1:]))).to(case.dtype)
        if case.not_a_number:
            value[0, 0][tuple(n // 2 for n in shape[2:])] = float("nan")
        value = _laid_out(value, case.conv)
        if case.misaligned:
            storage = torch.empty(value.numel() + 1, dtype=value.dtype)[1:]
            value = storage.as_strided(value.shape, value.stride(), 1).copy_(value)
        return value.expand(shape) if case.expanded else value


def _laid_out(value: Tensor, case: ConvCase) -> Tensor:
    if case.channels_last and value.dim() == 3:  # (N, C, 1, L) in channels_last, viewed as (N, C, L)
        return value.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return value.contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)


def _problem(case: Case, inputs: _Inputs) -> dict[str, Any]:
    c = case.conv
    kernel = inputs.weight.shape[2:]
    pads = inputs.args.total_padding(kernel)
    activation, low, high = ACTIVATIONS[case.activation]
    return problem(
        batch=c.batch, channels=c.inputs, outputs=c.outputs, size=c.size, kernel=kernel, groups=c.groups, rank=inputs.rank,
        stride=inputs.args.stride, dilation=inputs.args.dilation,
        padding=[p[0] for p in pads], padding_end=[p[1] for p in pads],
        dtype=case.dtype, core_dtype=case.core_dtype, suffix_dtype=case.core_dtype, saved_dtype=case.saved,
        affine_dtype=torch.float32, precision=case.precision, activation=activation, low=low, high=high, scale=case.scale,
        bonds=[core.shape[0] for core in inputs.cores[1:]] if case.cores else (),
    )  # fmt: skip


def _factors(case: Case, inputs: _Inputs) -> dict[str, Tensor]:
    if inputs.core is None:
        return {"weight": inputs.weight}
    factors = {"weight": inputs.weight, "core": inputs.core}
    if case.cores:
        return factors | {f"core{i + 2}": core for i, core in enumerate(inputs.cores)}
    return factors | {"suffix": inputs.suffix}


def _exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_exact, value))
    return None if value is None else value.double()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, case: ConvCase) -> Tensor:
    return _laid_out(torch.empty(shape, dtype=dtype), case)


def _tolerances(case: Case, expected: dict[str, Tensor]) -> dict[str, float]:
    kept = {"h": case.saved, "dcore": case.core_dtype}  # in a dtype of their own
    return {
        name: max(TOLERANCE[case.precision], TOLERANCE["half"] if (kept.get(name) or torch.float32).itemsize == 2 else 0.0)
        for name in expected
    }


def _forward(case: Case, inputs: _Inputs) -> Launch:
    c, exact = case.conv, _exact
    named = {"bias": inputs.bias, "residual": inputs.residual if case.residual else None}
    named["affine_scale"], named["affine_shift"] = inputs.affine or (None, None)
    named["residual_scale"], named["residual_shift"] = (inputs.residual_affine if case.residual else None) or (None, None)
    z = reference.tt_block(
        exact(inputs.x), exact(inputs.weight), exact(inputs.core), exact(inputs.suffix), exact(inputs.bias),
        *inputs.args[:4], case.scale, affine=exact(inputs.affine), residual=exact(named["residual"]),
        residual_affine=exact(inputs.residual_affine) if case.residual else None,
    )  # fmt: skip
    kind, low, high = ACTIVATIONS[case.activation]
    expected = {"y": z}
    outputs = {"y": _empty(inputs.y_shape, case.dtype, c)}
    if kind:
        expected["y"] = z.clamp(min=low) if kind == "relu" else z.clamp(low, high)
        mask = (z <= low).logical_or(z >= high if kind == "clamp" else torch.zeros_like(z, dtype=torch.bool)).logical_not()
        expected["bits"] = pack_bits(mask, c)
        outputs["bits"] = torch.empty_like(expected["bits"])
    if inputs.rank:
        rows = exact(inputs.suffix).repeat(c.groups, *[1] * (inputs.suffix.dim() - 1))
        expected["h"] = conv(exact(inputs.x), rows, None, inputs.args).movedim(1, -1)
        outputs["h"] = torch.empty(expected["h"].shape, dtype=case.saved or case.dtype)
    tensors = _factors(case, inputs) | {"x": inputs.x} | {name: value for name, value in named.items() if value is not None}
    tolerances = _tolerances(case, expected)
    launch = Launch(
        f"forward: {case.name}", "tt_block_forward", _problem(case, inputs), tensors, outputs, ("packed",), expected, tolerances
    )
    return _BitsNearZero(**vars(launch), z=z, conv=c, bounds=(low, high)) if kind else launch


@dataclass
class _BitsNearZero(Launch):
    """Where bits may differ: the exact value is within rounding of the activation's bound."""

    z: Tensor = field(default_factory=lambda: torch.empty(0))
    conv: ConvCase = field(default_factory=lambda: CASES[0])
    bounds: tuple[float, float] = (0.0, 0.0)

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        found = super().errors(results)
        near = sum(
            (self.z - bound).abs() <= 4 * self.tolerance["y"] * self.z.nan_to_num(0.0).abs().max() for bound in self.bounds
        )
        wrong = results["bits"] ^ self.expected["bits"]
        found["bits"] = float("inf") if (wrong & ~pack_bits(near.bool(), self.conv)).any() else 0.0
        return found


def _backward(case: Case, inputs: _Inputs) -> Launch:
    c, args, exact = case.conv, inputs.args, _exact
    kind = ACTIVATIONS[case.activation][0]
    mask = torch.rand(inputs.y_shape, generator=inputs.generator) < 0.5 if kind else None
    dz = exact(inputs.dy) if mask is None else torch.where(mask, exact(inputs.dy), 0.0)
    a = exact(inputs.affine[0]) if inputs.affine else torch.ones(c.outputs, dtype=torch.float64)
    channels = (-1, *[1] * (dz.dim() - 2))
    named: dict[str, Tensor | None] = {"affine_scale": inputs.affine[0] if inputs.affine else None}
    expected, outputs = {}, {}
    if case.dx:
        weight = exact(inputs.weight)
        if inputs.core is not None:
            weight = reference.tt_fuse(weight, exact(inputs.core), exact(inputs.suffix), case.scale)
        x = torch.zeros(inputs.x.shape, dtype=torch.float64, requires_grad=True)
        y = conv(x, weight * a.reshape(-1, *[1] * (weight.dim() - 1)), None, args)
        (expected["dx"],) = torch.autograd.grad(y, x, dz)
        outputs["dx"] = _empty(tuple(inputs.x.shape), case.dtype, c)
    if inputs.core is not None:
        h = _Map(inputs, (c.batch, *inputs.y_shape[2:], c.groups * inputs.rank), case.saved or case.dtype).value
        named["h"] = h
        per_group = exact(h).unflatten(-1, (c.groups, inputs.rank)).flatten(1, -3)
        dz_groups = dz.unflatten(1, (c.groups, -1)).flatten(3)
        sums = torch.einsum("ngol,nlgq->goq", dz_groups, per_group).reshape(c.outputs, inputs.rank)
        expected["dcore"] = case.scale * a[:, None] * sums
        outputs["dcore"] = torch.empty(c.outputs, inputs.rank, dtype=case.core_dtype or case.dtype)
    if c.bias:
        expected["dbias"] = a * dz.sum(dim=[0, *range(2, dz.dim())])
        outputs["dbias"] = torch.empty(c.outputs, dtype=case.dtype)
    if case.residual:
        scale = inputs.residual_affine[0] if inputs.residual_affine else None
        named["residual_scale"] = scale
        expected["dresidual"] = dz if scale is None else dz * exact(scale).reshape(channels)
        outputs["dresidual"] = _empty(inputs.y_shape, case.dtype, c)
    if mask is not None:
        named["bits"] = pack_bits(mask, c)
    tensors = {name: value for name, value in named.items() if value is not None}
    return Launch(f"backward: {case.name}", "tt_block_backward", _problem(case, inputs),
               _factors(case, inputs) | {"dy": inputs.dy} | tensors, outputs, ("packed", "partial"), expected,
               _tolerances(case, expected))  # fmt: skip


class _Map:
    def __init__(self, inputs: _Inputs, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.value = inputs.normal(*shape).to(dtype)


def pack_bits(mask: Tensor, case: ConvCase) -> Tensor:
    """Bits of a mask ``(N, O, *L)`` in the layout of csrc/problem.h: one byte per 8 outputs of a position and group."""
    groups = 1 if case.groups == case.inputs else case.groups
    rows = mask.movedim(1, -1).unflatten(-1, (groups, -1))
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (rows.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).flatten(-2)


@dataclass(frozen=True)
class FuseCase:
    """tt_fuse and its backward on one weight."""

    name: str
    weight: tuple[int, ...]
    rank: int = 2
    cores: bool = False
    dtype: torch.dtype = torch.float32
    core_dtype: torch.dtype | None = None
    scale: float = 1.0

    def launches(self) -> Iterator[Launch]:
        conv_case = ConvCase(
            self.name, dims=len(self.weight) - 2, inputs=self.weight[1], outputs=self.weight[0], kernel=self.weight[2:],
            size=self.weight[2:], rank=self.rank, bias=False, batch=1,
        )  # fmt: skip
        unit = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(self.dtype, "fp32")
        case = Case(conv_case, unit, cores=self.cores, core_dtype=self.core_dtype, scale=self.scale)
        inputs = _Inputs(case)
        problem, factors = _problem(case, inputs), _factors(case, inputs)
        assert inputs.core is not None
        assert inputs.suffix is not None
        dtypes = {self.dtype, self.core_dtype or self.dtype}
        tolerance = TOLERANCE["fp32"] if dtypes == {torch.float32} else TOLERANCE["half"]
        fused = reference.tt_fuse(inputs.weight.double(), inputs.core.double(), inputs.suffix.double(), self.scale)
        kinds = unit if self.core_dtype is None else f"{unit}, {str(self.core_dtype)[6:]} core"
        words = f"{self.name}, {kinds}{', cores' if self.cores else ''}, rank {inputs.rank}"
        yield Launch(f"fuse: {words}", "tt_fuse_forward", problem, factors, {"out": torch.empty_like(inputs.weight)}, (),
                  {"out": fused}, {"out": tolerance})  # fmt: skip
        dout = inputs.normal(*self.weight).to(self.dtype)
        dcore = self.scale * dout.double().flatten(1) @ inputs.suffix.double().flatten(1).T
        frozen = {name: value for name, value in factors.items() if name not in ("weight", "core")}
        yield Launch(f"fuse backward: {words}", "tt_fuse_backward", problem, frozen | {"dout": dout},
                  {"dcore": torch.empty_like(inputs.core)}, ("partial",), {"dcore": dcore}, {"dcore": tolerance})  # fmt: skip


@dataclass(frozen=True)
class DoraCase:
    """dora_fuse and its backward on one weight; ``gradients`` names those that are computed."""

    name: str
    weight: tuple[int, ...]
    rank: int = 2
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype = torch.float32  # of core, suffix and magnitude
    scale: float = 1.0
    gradients: tuple[str, ...] = ("dcore", "dsuffix", "dmagnitude")
    misaligned: bool = False  # weight and dout begin 4 or 2 bytes past an aligned address
    dead: bool = False  # the first row's weight, core and magnitude are 0
    not_a_number: bool = False  # one NaN in the last row of the weight, which must reach only what depends on it

    def launches(self) -> Iterator[Launch]:
        words = f"{self.name}, {str(self.dtype)[6:]}, {str(self.factor_dtype)[6:]} factors"
        generator = torch.Generator().manual_seed(zlib.crc32(words.encode()))
        outputs, columns = self.weight[0], torch.Size(self.weight[1:]).numel()

        def normal(*shape: int, dtype: torch.dtype = self.factor_dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        weight, dout = normal(*self.weight, dtype=self.dtype), normal(*self.weight, dtype=self.dtype)
        core, suffix = normal(outputs, self.rank), (normal(self.rank, *self.weight[1:]).float() / self.rank**0.5)
        suffix, magnitude = suffix.to(self.factor_dtype), normal(outputs)
        if self.dead:
            weight[0], core[0], magnitude[0] = 0.0, 0.0, 0.0
        if self.not_a_number:
            weight.view(outputs, -1)[-1, columns // 2] = float("nan")
        if self.misaligned:
            weight, dout = (torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (weight, dout))
        fields = problem(
            batch=1, channels=self.weight[1], outputs=outputs, size=self.weight[2:], kernel=self.weight[2:], rank=self.rank,
            dtype=self.dtype, core_dtype=self.factor_dtype, suffix_dtype=self.factor_dtype, affine_dtype=self.factor_dtype,
            scale=self.scale,
        )  # fmt: skip
        operands = {"weight": weight, "core": core, "suffix": suffix, "magnitude": magnitude}
        exact = {name: value.double().requires_grad_(name != "weight") for name, value in operands.items()}
        out = reference.dora_fuse(**exact, scale=self.scale)
        norms = reference.dora_norm(exact["weight"], exact["core"], exact["suffix"], self.scale).detach()
        found = torch.autograd.grad(out, [exact[name] for name in ("core", "suffix", "magnitude")], dout.double())
        gradients = dict(zip(("dcore", "dsuffix", "dmagnitude"), found, strict=True))

        def tolerance(dtype: torch.dtype) -> float:
            return TOLERANCE["fp32" if dtype == torch.float32 else "half"]

        yield Launch(
            f"dora: {words}", "dora_fuse_forward", fields, operands,
            {"out": torch.empty(self.weight, dtype=self.dtype), "norms": torch.empty(outputs)}, (),
            {"out": out.detach(), "norms": norms}, {"out": tolerance(self.dtype), "norms": TOLERANCE["fp32"]},
        )  # fmt: skip
        names = {"dcore": core, "dsuffix": suffix, "dmagnitude": magnitude}
        yield Launch(
            f"dora backward: {words}", "dora_fuse_backward", fields, {"dout": dout, **operands, "norms": norms.float()},
            {name: torch.empty_like(names[name]) for name in self.gradients}, (),
            {name: gradients[name] for name in self.gradients}, dict.fromkeys(self.gradients, tolerance(self.factor_dtype)),
        )  # fmt: skip


def _kernel_takes(case: ConvCase) -> bool:
    """Whether a case reaches the kernels: at most two dimensions, zeros as padding, not empty."""
    return case.dims <= 2 and case.padding_mode == "zeros" and case.batch > 0


UNITS = ("fp32", "tf32", "f16", "bf16")
_EPILOGUES: list[dict[str, Any]] = [
    {},
    {"affine": True, "activation": "relu"},
    {"affine": True, "residual": True, "activation": "relu"},
    {"residual": True, "residual_affine": True, "activation": "hardtanh"},
    {"affine": True, "activation": "relu6", "cores": True, "saved": torch.float16},
    {"residual": True, "affine": True, "residual_affine": True, "cores": True, "scale": 0.5},
    {"adapted": False, "affine": True, "activation": "relu"},
    {"dx": False, "activation": "relu6", "residual": True},
]

# Every convolution of the table under every unit; the epilogues rotate, and each unit starts at a different one.
_EVERY = [
    Case(conv_case, unit, **_EPILOGUES[(i + 2 * u) % len(_EPILOGUES)])
    for i, conv_case in enumerate(filter(_kernel_takes, CASES))
    for u, unit in enumerate(UNITS)
]

# Beyond the table: several tiles, the extra fragment, borders of tiles, phases, unusual memory layouts.
_LAST = {"channels_last": True}
_WIDE = ConvCase("two row tiles, 16-byte channels", inputs=16, outputs=16, batch=2, size=(12, 11), padding=1, **_LAST)
_SINGLE_CHANNELS = ConvCase("channels that fill no 16 bytes", inputs=5, outputs=8, size=(9, 8), padding=1, **_LAST)
_TILES = [
    _WIDE,
    ConvCase("extra fragment: 64 outputs and h", inputs=16, outputs=64, kernel=1, size=(5, 7), **_LAST),
    ConvCase("extra fragment in the second tile", inputs=8, outputs=128, kernel=1, rank=8, size=(3, 5), **_LAST),
    ConvCase("two column tiles of h", inputs=8, outputs=60, kernel=3, rank=16, size=(5, 5), **_LAST),
    ConvCase("dx with an extra fragment", inputs=72, outputs=8, kernel=1, size=(6, 5), **_LAST),
    ConvCase("dx of 65 channels", inputs=65, outputs=9, kernel=(1, 2), size=(4, 5)),
    ConvCase("k that fills no tile", inputs=12, outputs=20, kernel=(3, 2), size=(6, 6), padding=1, **_LAST),
    ConvCase("star without dx's rows", inputs=8, outputs=8, kernel=3, padding=5, size=(4, 5), **_LAST),
    ConvCase("1x1, stride 2: phases without taps", inputs=16, outputs=16, kernel=1, stride=2, size=(7, 8), **_LAST),
    ConvCase("3x3, stride 2", inputs=16, outputs=16, stride=2, padding=1, size=(9, 8), **_LAST),
    ConvCase("stride 4, dilation 2", inputs=8, outputs=8, kernel=5, stride=4, padding=3, dilation=2, size=(14, 13), **_LAST),
    ConvCase("stride 3, dilation 3", inputs=8, outputs=8, stride=3, padding=2, dilation=3, size=(13, 12)),
    ConvCase("phases that no input has", inputs=4, outputs=4, kernel=(1, 4), stride=(4, 4), padding=(0, 2), size=(2, 3)),
    ConvCase("groups of 5 outputs", inputs=12, outputs=15, groups=3, size=(5, 6), padding=1, rank=3),
    ConvCase("groups of 16, 16-byte channels", inputs=32, outputs=32, groups=2, size=(5, 6), padding=1, rank=3, **_LAST),
    ConvCase("1-D, channels-last", dims=1, inputs=16, outputs=24, kernel=8, size=(20,), padding="same", bias=False, **_LAST),
    ConvCase("1-D, 97 channels, channels-last", dims=1, inputs=97, outputs=10, kernel=5, size=(9,), padding="same", **_LAST),
    ConvCase("1-D, 97 channels", dims=1, inputs=97, outputs=66, kernel=3, size=(9,), padding="same"),
    ConvCase("depthwise, 16-byte channels", inputs=32, outputs=32, groups=32, padding=1, size=(6, 5), rank=3, **_LAST),
    ConvCase(
        "depthwise, stride 2, 16-byte channels", inputs=16, outputs=16, groups=16, padding=1, stride=2, size=(7, 6), **_LAST
    ),
    ConvCase("depthwise of 5", inputs=5, outputs=5, groups=5, padding=2, dilation=2, size=(7, 6), rank=1),
    ConvCase("depthwise, 3 outputs a channel", inputs=3, outputs=9, groups=3, padding=4, size=(4, 5)),
    ConvCase(
        "depthwise, stride 3, dilation 2",
        inputs=9,
        outputs=18,
        groups=9,
        padding=1,
        stride=3,
        dilation=2,
        size=(11, 9),
        **_LAST,
    ),
    ConvCase(
        "depthwise of 24: an octet lane without channels", inputs=24, outputs=24, groups=24, padding=1, size=(5, 6), **_LAST
    ),
    ConvCase("a phase of fewer row tiles", dims=1, inputs=4, outputs=4, stride=2, padding=1, dilation=2, size=(257,), batch=1),
    ConvCase("two channel tiles to pack", inputs=60, outputs=8, size=(4, 5), padding=1),
    ConvCase(
        "1-D depthwise, channels-last", dims=1, inputs=8, outputs=8, groups=8, kernel=5, padding="same", size=(11,), **_LAST
    ),
    # wide blocks: a stride along the rows, 16 tiles or more, an even number along the columns; a half passes over several taps,
    # over the end of one, over the middle of one
    ConvCase("wide, 102 columns of 8 groups", inputs=72, outputs=800, groups=8, stride=2, padding=1, size=(6, 7), batch=2),
    ConvCase("wide, extra fragment", inputs=20, outputs=256, kernel=2, stride=2, size=(32, 27), rank=3, batch=2),
    ConvCase("wide, 502 columns", dims=1, inputs=96, outputs=500, kernel=2, stride=2, size=(90,)),
]
_LARGER = [Case(c, unit, **_EPILOGUES[(i + 3 * u + 1) % 6]) for i, c in enumerate(_TILES) for u, unit in enumerate(UNITS)]

_ODD_MEMORY = [
    Case(replace(c, name=f"{c.name} {name}"), unit, affine=True, residual=True, activation="relu", **{flag: True})
    for c in (_WIDE, _SINGLE_CHANNELS, CASES[0], CASES[6])
    for unit in ("fp32", "f16")
    for name, flag in (("shifted", "misaligned"), ("repeated", "expanded"), ("with a NaN", "not_a_number"))
] + [
    Case(_WIDE, "fp32", saved=torch.bfloat16, activation="relu"),
    Case(_WIDE, "f16", core_dtype=torch.float32, saved=torch.float32, cores=True),
    Case(_WIDE, "fp32", residual=True, dx=False),
    Case(_WIDE, "tf32", residual=True, residual_affine=True, dx=False, activation="relu"),
    Case(replace(_WIDE, name="rank 16, no bias", bias=False, rank=16), "fp32", affine=True, activation="relu"),
    Case(replace(_WIDE, name="rank 16", rank=16), "tf32", affine=True, activation="relu"),
]

CASES_OF_BLOCKS: list[Case] = [*_EVERY, *_LARGER, *_ODD_MEMORY]

CASES_OF_FUSE: list[FuseCase] = [
    FuseCase(name, weight, rank, cores, dtype, core_dtype, scale)
    for name, weight, rank, scale in (
        ("1-D, 97 channels", (17, 97, 8), 2, 1.0),
        ("flat in 16 bytes", (12, 8, 3, 3), 3, 0.5),
        ("odd", (5, 3, 3, 5), 1, 1.0),
        ("1x1", (9, 7, 1, 1), 5, 2.0),
        ("one row", (1, 6, 2, 2), 1, 1.0),
        ("rank 17", (24, 16, 3, 1), 17, 1.0),
        ("rank 64", (70, 70, 1), 64, 1.0),
        ("several blocks", (40, 48, 5, 3), 2, 1.0),
    )
    for cores in (False, True)
    for dtype, core_dtype in (
        (torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.float16, torch.float32),
    )
]  # fmt: skip


_DORA: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
    ("1-D, 97 channels", (17, 97, 8), 2, {}),
    ("flat in 16 bytes", (12, 8, 3, 3), 3, {"scale": 0.5}),
    ("odd", (5, 3, 3, 5), 1, {}),
    ("one row", (1, 6, 2, 2), 1, {"scale": 2.0}),
    ("rank 9", (6, 16, 4), 9, {}),
    ("rank 17, 70 rows", (70, 5, 3), 17, {}),
    ("rank 64", (66, 36, 2), 64, {}),
    ("wider than a pass of all threads", (7, 300, 4), 2, {}),
    ("rows that are not kept", (5, 4100), 3, {}),
    ("rows that are not kept, not in vectors", (6, 4101), 2, {}),
    ("shifted", (9, 8, 4), 2, {"misaligned": True}),
    ("a dead row", (6, 8, 3), 2, {"dead": True}),
    ("a NaN", (6, 8, 3), 2, {"not_a_number": True}),
]
_DORA_DTYPES = (
    (torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.float32, torch.bfloat16),
)  # fmt: skip
CASES_OF_DORA: list[DoraCase] = [
    DoraCase(name, weight if len(weight) > 2 else (*weight, 1), rank, dtype, factor_dtype, **options)
    for i, (name, weight, rank, options) in enumerate(_DORA)
    for j, (dtype, factor_dtype) in enumerate(_DORA_DTYPES)
    if j < 3 or (i + j) % 3 == 0
] + [
    DoraCase(f"only {' and '.join(names)}", (9, 6, 4), 3, gradients=names)
    for names in (("dcore",), ("dsuffix",), ("dmagnitude",), ("dcore", "dsuffix"))
]


def launches() -> Iterator[Launch]:
    """Every launch of the matrix."""
    for fuse in CASES_OF_FUSE:
        yield from fuse.launches()
    for block in CASES_OF_BLOCKS:
        yield from block.launches()
    for dora in CASES_OF_DORA:
        yield from dora.launches()
