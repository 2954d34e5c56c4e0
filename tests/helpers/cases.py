"""One table of convolution cases for every op, layer and backend; a new case is one line."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class ConvCase:
    """``nn.Conv{dims}d(inputs, outputs, kernel, ...)`` on an input of spatial ``size``."""

    name: str
    dims: int = 2
    inputs: int = 6
    outputs: int = 8
    kernel: int | tuple[int, ...] = 3
    size: tuple[int, ...] = (9, 8)
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    rank: int = 2
    batch: int = 3
    channels_last: bool = False

    def conv(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return CONV[self.dims](
            self.inputs, self.outputs, self.kernel, self.stride, self.padding, self.dilation, self.groups, self.bias,
            self.padding_mode, dtype=dtype,
        )  # fmt: skip

    def x(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        x = torch.randn(self.batch, self.inputs, *self.size, dtype=torch.float64).to(dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last if self.dims == 2 else torch.channels_last_3d)
        return x


_BASE = [
    ConvCase("plain"),
    ConvCase("1x1", kernel=1),
    ConvCase("odd channels", inputs=97, outputs=17, kernel=1),  # rows of 97 are never aligned
    ConvCase("stride", stride=2),
    ConvCase("stride leaves a rest", stride=3, size=(10, 11)),  # some inputs are never read: dx is zero there
    ConvCase("uneven stride and padding", stride=(2, 1), padding=(1, 2)),
    ConvCase("padding", padding=1),
    ConvCase("padding wider than kernel/2", padding=4),
    ConvCase("same", padding="same"),
    ConvCase("same, even kernel", padding="same", kernel=(4, 2)),  # the shorter side first
    ConvCase("same, even kernel, dilated", padding="same", kernel=(4, 2), dilation=(1, 3)),
    ConvCase("valid", padding="valid"),
    ConvCase("dilation", dilation=2),
    ConvCase("dilation, stride, padding", dilation=2, stride=2, padding=2),
    ConvCase("groups", groups=2),
    ConvCase("groups not dividing the rank", groups=2, rank=3),  # PEFT requires r % groups == 0
    ConvCase("depthwise", inputs=8, groups=8),
    ConvCase("depthwise multiplier", inputs=4, groups=4, stride=2, padding=1),
    ConvCase("no bias", bias=False),
    ConvCase("reflect", padding=(1, 2), padding_mode="reflect"),
    ConvCase("replicate", padding=2, padding_mode="replicate"),
    ConvCase("circular", padding=(2, 1), padding_mode="circular"),
    ConvCase("circular, same, even kernel", padding="same", kernel=(4, 3), padding_mode="circular"),
    ConvCase("reflect, stride, dilation", padding=3, stride=2, dilation=2, padding_mode="reflect"),
    ConvCase("one output channel", outputs=1, rank=4),  # r1 is 1 at every rank
    ConvCase("rank above what is attainable", inputs=2, kernel=1, rank=16),
    ConvCase("one position", size=(3, 3)),
    ConvCase("one sample", batch=1),
    ConvCase("empty batch", batch=0),
]

CASES: list[ConvCase] = [
    *_BASE,
    *[replace(case, name=f"{case.name}, channels-last", channels_last=True) for case in _BASE if case.dims == 2],
    ConvCase("1-D", dims=1, kernel=5, size=(20,)),
    ConvCase("1-D same, even kernel", dims=1, kernel=8, size=(20,), padding="same", bias=False),  # T-ResNet's first
    ConvCase("1-D stride, dilation", dims=1, kernel=3, size=(21,), stride=2, dilation=3, padding=2),
    ConvCase("1-D groups", dims=1, kernel=3, size=(12,), groups=2),
    ConvCase("1-D depthwise", dims=1, kernel=3, size=(12,), inputs=8, groups=8, padding=1),
    ConvCase("1-D reflect", dims=1, kernel=5, size=(12,), padding=2, padding_mode="reflect"),
    ConvCase("3-D", dims=3, size=(5, 6, 4)),
    ConvCase("3-D channels-last", dims=3, size=(5, 6, 4), channels_last=True),
    ConvCase("3-D stride, padding, groups", dims=3, size=(5, 6, 4), stride=2, padding=1, groups=2),
    ConvCase("3-D same, even kernel", dims=3, size=(5, 6, 4), kernel=(2, 3, 4), padding="same"),
    ConvCase("3-D replicate", dims=3, size=(4, 4, 4), padding=1, padding_mode="replicate"),
]
