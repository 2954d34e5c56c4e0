"""The convolutions of the workloads as a training step runs them, and the floor of DESIGN, section 5, for each op on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest import mock

from torch import nn

import lora_edge
from lora_edge.nn import blocks

from .workloads import WORKLOADS

BATCH = 64
RANK = 2


@dataclass(frozen=True)
class Layer:
    """One block: a convolution and what is fused to it. A 1-D convolution has height 1; ``rank`` 0 is not adapted."""

    batch: int
    channels: int
    outputs: int
    groups: int
    rank: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]  # zeros before
    dilation: tuple[int, int]
    has_bias: bool
    has_affine: bool
    has_residual: bool
    has_residual_affine: bool
    activation: str | None
    needs_dx: bool  # not where the block's input is the model's
    needs_backward: bool  # not where nothing in front of it, nor in it, is trained
    needs_dresidual: bool

    @property
    def weight(self) -> int:
        """Elements of the kernel."""
        return self.outputs * self.channels // self.groups * math.prod(self.kernel)

    @property
    def suffix(self) -> int:
        """Elements of the suffix."""
        return self.rank * self.channels // self.groups * math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """Output positions, over the batch."""
        return self.batch * math.prod(self.out_size)

    @property
    def bits_bytes(self) -> int:
        """Bytes of the packed bits: whole bytes a group, or of all channels of a depthwise convolution."""
        return self.positions * self.octets if self.has_bits else 0

    @property
    def has_bits(self) -> bool:
        return self.activation is not None and self.needs_backward

    @property
    def octets(self) -> int:
        """Bytes of bits of a position."""
        groups = 1 if self.is_depthwise else self.groups
        return groups * -(-self.outputs // groups // 8)

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.channels

    @property
    def multiply_adds(self) -> int:
        """The floor's: ``N L (O + r1) (I/g) ΠK``, of either direction."""
        return self.positions * (self.outputs + self.rank) * self.channels // self.groups * math.prod(self.kernel)

    @property
    def read_positions(self) -> int:
        """Input positions that some tap reaches, over the batch: a 1x1 kernel with stride 2 reads a quarter of x."""
        reached = self.batch
        for i, o, k, s, p, d in zip(
            self.in_size, self.out_size, self.kernel, self.stride, self.pad, self.dilation, strict=True
        ):
            reached *= len({j * s - p + tap * d for j in range(o) for tap in range(k)} & set(range(i)))
        return reached

    def forward_bytes(self, itemsize: int) -> int:
        """What a pass must read and write: x, W', S, residual; y, h, bits."""
        x = self.channels * self.read_positions
        maps = self.positions * self.outputs * (2 if self.has_residual else 1)
        h = self.positions * self.groups * self.rank
        return itemsize * (x + maps + h + self.weight + self.suffix) + self.bits_bytes

    def backward_bytes(self, itemsize: int) -> int:
        """dy, bits, h, W'; dx, dB, and the masked dy where it goes to a residual."""
        dx = self.batch * self.channels * math.prod(self.in_size) + self.weight if self.needs_dx else 0
        maps = self.positions * self.outputs * (2 if self.needs_dresidual else 1)
        h = self.positions * self.groups * self.rank
        return itemsize * (maps + h + dx + self.outputs * self.rank) + self.bits_bytes

    def backward_multiply_adds(self) -> int:
        """The floor's of backward: forward's, or dB alone where no dx is needed."""
        return self.multiply_adds if self.needs_dx else self.positions * self.outputs * self.rank

    def fuse_bytes(self, itemsize: int, op: str) -> int:
        """tt_fuse's: the kernel once in, and forward once out."""
        return (2 if op == "tt_fuse_forward" else 1) * itemsize * self.weight


def layers_of(workload: str) -> dict[str, Layer]:
    """The blocks of one workload's training step at batch 64 and rank 2, by the name of their convolution, in order."""
    model = WORKLOADS[workload].model()
    lora_edge.adapt(model, RANK, targets=WORKLOADS[workload].targets(model))
    names = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    with mock.patch.object(blocks, "run_block", wraps=blocks.run_block) as run_block:
        model.train()(WORKLOADS[workload].batch(2)[0])
    found = {names[id(call.args[1])]: _layer(*call.args) for call in run_block.call_args_list}
    if len(found) != len(names):
        raise RuntimeError(f"{workload}: {len(found)} of {len(names)} convolutions ran as blocks")
    return found


def _layer(x, weight, core, suffix, bias, args, scale, affine, residual, residual_affine, activation, *_) -> Layer:  # type: ignore[no-untyped-def]
    def two(values: tuple[int, ...], missing: int) -> tuple[int, int]:
        return (missing, values[0]) if len(values) == 1 else (values[0], values[1])

    kernel = tuple(weight.shape[2:])
    size = tuple(x.shape[2:])
    needs_dresidual = residual is not None and residual.requires_grad
    return Layer(
        BATCH, x.shape[1], weight.shape[0], args.groups, 0 if core is None else core.shape[1],
        two(size, 1), two(tuple(args.output_size(size, kernel)), 1), two(kernel, 1),
        two(tuple(args.stride), 1), two(tuple(low for low, _ in args.total_padding(kernel)), 0), two(tuple(args.dilation), 1),
        bias is not None, affine is not None, residual is not None, residual_affine is not None,
        None if activation is None else activation.name,
        needs_dx=x.requires_grad,
        needs_backward=x.requires_grad or core is not None or needs_dresidual,
        needs_dresidual=needs_dresidual and (activation is not None or residual_affine is not None),
    )  # fmt: skip
