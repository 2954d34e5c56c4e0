"""What the Triton kernels support, and the bytes that a call needs besides its tensors.

:class:`Plan` has the fields of csrc/problem.h's Problem, like the compiled extension's plans, so that the same code fills both
and the same test cases cover both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # indexed by enum Type of csrc/problem.h
UNITS = ("ieee", "tf32", "half")  # by enum Precision
ACTIVATIONS = ("none", "relu", "clamp")  # by enum Activation
MOST_RANK = 16  # of tt_block: its sums and h are tiles of 16
MOST_FUSE_RANK = 64
MOST_BOND = 64  # of the frozen cores: the rows of a tile of the contracted tail
MOST_ELEMENTS = 2**31 - 4096  # tiles round up in 32 bits
WHOLE = 16  # rows of a composed weight are padded to a multiple of this, so their addresses are multiples of 16 bytes


class Plan(NamedTuple):
    """A convolution, its dtypes and its epilogue: the fields of ``Problem`` in csrc/problem.h."""

    batch: int
    channels: int
    outputs: int
    groups: int
    rank: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    type: int
    weight_type: int
    core_type: int
    suffix_type: int
    saved_type: int
    affine_type: int
    precision: int
    activation: int
    low: float
    high: float
    scale: float
    cores: int
    bond2: int
    bond3: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.type]

    @property
    def unit(self) -> str:
        return UNITS[self.precision]

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def positions(self) -> int:
        """Output positions, over the batch."""
        return self.batch * self.out_h * self.out_w

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.groups

    @property
    def is_depthwise(self) -> bool:
        return self.channels == self.groups

    @property
    def octets(self) -> int:
        """Bytes of bits per position (depthwise), or per position and group."""
        return -(-(self.outputs if self.is_depthwise else self.group_outputs) // 8)

    @property
    def forward_pitch(self) -> int:
        """Elements per row of the weight composed for forward: column = tap * I/g + channel."""
        return whole(self.taps * self.group_channels)

    @property
    def backward_pitch(self) -> int:
        """Elements per row, an input channel, of the weight composed for backward: column = tap * O/g + output."""
        return whole(self.taps * self.group_outputs)

    def refusal(self, op: str) -> str | None:
        """What the kernels do not support of ``tt_block``, ``tt_fuse`` or ``dora_fuse``, None where they support the call."""
        most = MOST_RANK if op == "tt_block" else MOST_FUSE_RANK
        if self.rank > most:
            return f"rank {self.rank}: the kernels support up to {most}"
        if max(self.bond2, self.bond3) > MOST_BOND:
            return f"a bond of {max(self.bond2, self.bond3)} between the frozen cores: the kernels support up to {MOST_BOND}"
        if op != "tt_block":
            return None
        elements = max(self.batch * self.channels * self.in_h * self.in_w, self.positions * self.outputs)
        if elements > MOST_ELEMENTS:
            return f"{elements} elements: the kernels support up to {MOST_ELEMENTS}"
        return None

    def scratch(self) -> dict[str, int]:
        """Bytes by name. Partial sums depend on the tiles, so the launch allocates them."""
        rows = (self.outputs + self.rank) * self.taps
        forward = rows * 4 if self.is_depthwise else (self.outputs + self.rank) * self.forward_pitch * self.dtype.itemsize
        backward = rows * 4 if self.is_depthwise else self.channels * self.backward_pitch * self.dtype.itemsize
        groups = 1 if self.is_depthwise else self.groups
        return {
            "packed_forward": forward,
            "packed_backward": backward,
            "partial": 0,
            "fuse_partial": 0,
            "h": self.positions * self.groups * self.rank * DTYPES[self.saved_type].itemsize,
            "bits": self.positions * groups * self.octets,
        }


def whole(columns: int) -> int:
    """``columns`` rounded up to :data:`WHOLE`."""
    return -(-columns // WHOLE) * WHOLE
