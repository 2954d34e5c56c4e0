"""Inputs in every memory layout: a fused block returns the strides that stock layers return."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.forward_cases import Case, case, every_case, every_option, overwrite_maps_of_every_size, run


class Strided(Case):
    count = 2

    def forward(self, x, z):
        y = self.block(x)
        mixed = self.block(z)
        sums = (y + x, x + y, mixed + x, x + mixed, self.act(self.again(z) + x), self.act(x + self.again(z)))
        parts = (y.mean(2), y.mean(1), y.sum((2, 3), keepdim=True), torch.cat([mixed, x], 1), torch.cat([y, x], 1))
        return y, self.drop(mixed), self.again(y), F.interpolate(y, scale_factor=2), F.pad(y, (1, 0)), *sums, *parts

    def layout(self, x):
        return x if bool(x.flatten()[0] > 0) else self.other(x)

    def other(self, x):
        raise NotImplementedError


@case
class ChannelsLast(Strided):
    def other(self, x):
        return x.contiguous(memory_format=torch.channels_last)


@case
class ChannelsLastUnderAutocast(ChannelsLast):
    autocast = True


@case
class Transposed(Strided):
    def other(self, x):
        return x.transpose(1, 3).contiguous().transpose(1, 3)


@case
class Rotated(Strided):
    def other(self, x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)


@case
class Sliced(Strided):
    def other(self, x):
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :8]


@every_option
@every_case(__name__)
def test_the_twins_agree(cls, options, monkeypatch):
    overwrite_maps_of_every_size(monkeypatch)
    run(cls, **options)
