"""Valid calls of a block with their values, and the mistakes that a careless caller might make: used by ``fuzz_doors.py``."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from lora_edge.environment.extension import load
from lora_edge.ops import reference
from lora_edge.ops.conv_args import conv_args
from lora_edge.ops.route import choose_route


class Call:
    """A valid block: tensors and numbers by ``tt_block``'s names."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        dims = dice.choice((1, 1, 2))
        batch, inputs, outputs = dice.choice((1, 2, 5, 9)), dice.randint(1, 19), dice.randint(1, 33)
        size, kernel = [dice.randint(5, 14) for _ in range(dims)], [dice.randint(1, 4) for _ in range(dims)]
        self.stride, self.dilation = dice.randint(1, 4), dice.randint(1, 2)
        self.padding = dice.randint(0, 2)
        if any(n + 2 * self.padding < self.dilation * (k - 1) + 1 for n, k in zip(size, kernel, strict=True)):
            self.padding, self.dilation = 2, 1
        depthwise = dice.random() < 0.1
        if depthwise:
            inputs = outputs = 8 * dice.randint(1, 3)
        self.groups = inputs if depthwise else 1
        rank = dice.randint(1, 4)
        make = torch.Generator().manual_seed(dice.getrandbits(32))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make)

        self.scale = dice.choice((1.0, 0.5))
        self.tensors: dict[str, Any] = {
            "x": normal(batch, inputs, *size),
            "weight": normal(outputs, 1 if depthwise else inputs, *kernel),
            "core": None if depthwise else normal(outputs, rank),
            "suffix": None if depthwise else normal(rank, inputs, *kernel),
            "bias": normal(outputs) if dice.random() < 0.5 else None,
            "a": None, "b": None, "residual": None,
        }  # fmt: skip
        if dice.random() < 0.5:
            self.tensors["a"], self.tensors["b"] = normal(outputs), normal(outputs)
        self.activation = dice.choice((None, "relu", "relu6"))
        out = [
            (n + 2 * self.padding - self.dilation * (k - 1) - 1) // self.stride + 1 for n, k in zip(size, kernel, strict=True)
        ]
        self.y_shape = (batch, outputs, *out)
        if dice.random() < 0.5:
            self.tensors["residual"] = normal(*self.y_shape)
        self.dy = normal(*self.y_shape)
        self.keep_clear_of_bounds()

    def keep_clear_of_bounds(self) -> None:
        """No gradient where rounding could flip a bit: 1e-5 of the largest sum is 20 times the engine's error."""
        activation, self.activation = self.activation, None
        positional, options = self.arguments()
        z = reference.tt_block(*positional, **options)
        self.activation = activation
        for bound in (0.0, 6.0):
            self.dy = self.dy.where((z - bound).abs() > 1e-5 * float(z.abs().max()), 0.0)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        t = self.tensors
        positional = (
            t["x"],
            t["weight"],
            t["core"],
            t["suffix"],
            t["bias"],
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.scale,
        )
        affine = None if t["a"] is None and t["b"] is None else (t["a"], t["b"])
        return positional, {"affine": affine, "residual": t["residual"], "activation": self.activation}

    def want(self) -> tuple[Tensor, list[Tensor | None]]:
        """The reference's value and its gradients to x, core, bias and residual."""
        positional, options = self.arguments()
        doubled = [t.double() if isinstance(t, Tensor) else t for t in positional]
        leaves = [t.requires_grad_() if isinstance(t, Tensor) else None for t in (doubled[0], doubled[2], doubled[4])]
        if options["affine"] is not None:
            options["affine"] = tuple(t.double() for t in options["affine"])
        if options["residual"] is not None:
            options["residual"] = options["residual"].double().requires_grad_()
        y = reference.tt_block(*doubled, **options)
        wanted = [*leaves, options["residual"]]
        found = iter(torch.autograd.grad(y, [t for t in wanted if t is not None], self.dy.double()))
        return y.detach(), [None if t is None else next(found) for t in wanted]


def another(dice: random.Random, t: Tensor | None) -> Any:
    """A tensor that a careless caller might pass in the place of another."""
    if t is None:
        return torch.randn(dice.choice(((3,), (2, 2), (1, 4, 5), ())))
    shape = list(t.shape)
    kind = dice.randrange(16)
    if kind == 0:
        return None
    if kind == 1:
        return t.to(
            dice.choice((torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64))
        )
    if kind == 2:
        return t.to("meta")
    if kind == 3:
        return t.movedim(0, -1)
    if kind == 4:
        return t.flatten()
    if kind == 5:
        return t[..., None]
    if kind == 6:
        return t[:0]
    if kind == 7:
        if shape:  # more than 32 bits of elements, without that memory
            shape[dice.randrange(len(shape))] = dice.choice((2**31, 2**32 + 1, 2**33))
        return torch.zeros(()).expand(shape)
    if kind == 8:
        return torch.zeros(()).expand(shape)
    if kind == 9:
        return t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t
    if kind == 10 and t.dim():
        return t.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == 11:
        return t.to_sparse() if t.dim() else t
    if kind == 12:
        return t.tolist()
    if kind == 13 and t.dim():
        shape[dice.randrange(len(shape))] += dice.choice((-1, 1, 100))
        return torch.zeros([max(0, n) for n in shape])
    if kind == 14 and t.dim():
        return t[: max(1, shape[0] // 2)]
    return t.contiguous().view(torch.uint8) if t.dim() else t


class Launch:
    """A valid launch of the CPU engine, built from a call's tensors: plain addresses and numbers, which can be changed."""

    def __init__(self, call: Call, backward: bool) -> None:
        self.call, self.backward = call, backward
        t = call.tensors
        flat = t["weight"].dim() == 3

        def map_of(value: Tensor) -> Tensor:
            value = value.unsqueeze(2) if value.dim() == 3 else value
            return value.contiguous(memory_format=torch.channels_last) if value.shape[1] > 1 else value.contiguous()

        def strides(value: Tensor | None) -> list[int]:
            if value is None:
                return [0] * 4
            _, c, h, w = value.shape
            return [h * w * c, 1, w * c, c]

        pad = [0, call.padding] if flat else [call.padding] * 2
        kernel = [1, *t["weight"].shape[2:]] if flat else list(t["weight"].shape[2:])
        size, out = ([1, *s] if flat else list(s) for s in (t["x"].shape[2:], call.y_shape[2:]))
        stride, dilation = ([1, n] if flat else [n, n] for n in (call.stride, call.dilation))
        rank = 0 if t["core"] is None else t["core"].shape[1]
        self.fields: dict[str, Any] = dict.fromkeys(load().call_fields("Plan"), 0)
        self.fields |= {
            "batch": call.y_shape[0], "channels": t["x"].shape[1], "outputs": call.y_shape[1], "groups": call.groups,
            "rank": rank,
            "in_h": size[0], "in_w": size[1], "out_h": out[0], "out_w": out[1], "kernel_h": kernel[0], "kernel_w": kernel[1],
            "stride_h": stride[0], "stride_w": stride[1], "pad_h": pad[0], "pad_w": pad[1],
            "dilation_h": dilation[0], "dilation_w": dilation[1],
            "activation": {None: 0, "relu": 1, "relu6": 2}[call.activation], "low": 0.0, "high": 6.0, "scale": call.scale,
        }  # fmt: skip
        plan = load().Plan(**self.fields)
        assert plan.cpu_refusal() is None, plan.cpu_refusal()
        scratch = plan.cpu_scratch()["packed_backward" if backward else "packed_forward"]
        n, o = call.y_shape[0], call.y_shape[1]
        positions = n * out[0] * out[1]
        octets = (o + 7) // 8
        shape = (n, o, *out)
        self.held: dict[str, Tensor | None] = {
            "weight": t["weight"], "core": t["core"], "suffix": t["suffix"], "bias": t["bias"],
            "affine_scale": t["a"], "affine_shift": t["b"],
            "packed": torch.full((scratch,), 255, dtype=torch.uint8),
            "h": torch.full((positions * rank,), float("nan")) if rank else None,
            "bits": torch.zeros(positions * octets, dtype=torch.uint8) if call.activation else None,
        }  # fmt: skip
        if backward:
            maps = {
                "dy": map_of(call.dy),
                "dx": map_of(torch.full_like(t["x"], float("nan"))),
                "dresidual": map_of(torch.full(shape, float("nan"))),
            }
            self.held |= {
                "dcore": torch.full((o, rank), float("nan")) if rank else None,
                "dbias": torch.full((o,), float("nan")),
            }
        else:
            maps = {
                "x": map_of(t["x"]),
                "y": map_of(torch.full(shape, float("nan"))),
                "residual": None if t["residual"] is None else map_of(t["residual"]),
            }
        self.held |= maps
        self.numbers: dict[str, int] = dict.fromkeys(load().call_fields(self.op), 0)
        for name, tensor in self.held.items():
            if tensor is not None and name in self.numbers:
                self.numbers[name], self.numbers[f"{name}_bytes"] = tensor.data_ptr(), tensor.nbytes
        for name, tensor in maps.items():
            for axis, value in zip("nchw", strides(tensor), strict=True):
                self.numbers[f"{name}_{axis}"] = value

    @property
    def op(self) -> str:
        return "cpu_block_backward" if self.backward else "cpu_block_forward"

    def run(self, threads: Any = 1, numbers: tuple[Any, ...] | None = None) -> None:
        plan = load().Plan(**self.fields)
        getattr(plan, self.op)(tuple(self.numbers.values()) if numbers is None else numbers, threads)


def cpu_takes(call: Call) -> bool:
    t = call.tensors
    if t["core"] is None:
        return True
    args = conv_args(call.stride, call.padding, call.dilation, call.groups, t["weight"].dim() - 2, "fuzz")
    return choose_route(t["weight"].shape, t["core"].shape[1], args, t["x"].shape[2:], 1.0) == "factor"
