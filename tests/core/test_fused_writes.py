"""Forwards that write in place: a block's inputs may be overwritten before it runs, and what it writes may be aliased."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from helpers.forward_cases import Case, case, every_case, every_option, overwrite_maps_of_every_size, run


@case
class WritesInput(Case):
    requires_grad = False
    count = 2

    def forward(self, x, y):
        x += self.bn(self.conv(y))
        return self.act(self.again(y))


@case
class WritesView(Case):
    requires_grad = False

    def forward(self, x):
        doubled = x * 2
        view = doubled.view(2, 8, 36).view(2, 8, 6, 6)
        view += self.bn(self.conv(x))
        return doubled


@case
class WritesBehindPad(Case):
    def forward(self, x):
        x = x * 1
        padded = F.pad(x, (1, 1, 1, 1))
        x.mul_(2)
        return self.act(self.bn(self.conv(padded))), x


@case
class WritesBehindShortcut(Case):
    requires_grad = False

    def forward(self, x):
        x = x * 1
        shortcut = self.norm(x)
        x.mul_(2)
        return self.act(self.bn(self.conv(x)) + shortcut), x


@case
class WritesBufferOfBlock(Case):
    def forward(self, x):
        y = self.conv(x)
        self.bn.running_mean.add_(1)
        return self.act(self.bn(y))


@case
class WritesOneTensorOfTwoNames(Case):
    requires_grad = False

    def forward(self, x, y=None):
        z = self.bn(self.conv(x))
        y.add_(1)
        return self.act(z + x)

    def __call__(self, x):
        return nn.Module.__call__(self, x, x)


@case
class AddsInPlaceWithAnotherShape(Case):
    count = 2

    def forward(self, x, shortcut):
        y = self.bn(self.conv(x[:1]))
        y += shortcut
        return y


@case
class AddsInPlaceWithAnotherDtype(Case):
    count = 2

    def forward(self, x, shortcut):
        y = self.bn(self.conv(x))
        y += shortcut.float()
        return self.again(y)


@case
class WritesOut(Case):
    requires_grad = False

    def more(self):
        self.register_buffer("kept", torch.zeros(2, 8, 6, 6))

    def forward(self, x):
        doubled = torch.mul(x, 2, out=self.kept)
        return self.block(x), doubled + x


@case
class NormalizesByTorch(Case):
    def forward(self, x):
        z = x * 2
        y = torch.batch_norm(z, None, None, self.bn.running_mean, self.bn.running_var, False, 0.1, 1e-5, False)
        return self.conv(z) + y, z


@case
class WritesAliases(Case):
    def more(self):
        self.same, self.flat, self.nothing = nn.Identity(), nn.Flatten(0), nn.Dropout(0.0)

    def forward(self, x):
        y = self.block(x)
        z = self.same(y)
        z += 1
        self.flat(y).add_(1)
        w = self.nothing(y.contiguous()).to(torch.float64)
        w *= 2
        return self.again(y), y, z, w


@case
class RectifiesView(Case):
    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y.view(2, 8, -1), inplace=True)
        w = self.again(y)
        w.transpose(1, 2).relu_()
        return w, z


@case
class WritesTransposed(Case):
    requires_grad = False

    def forward(self, x):
        y = x.transpose(2, 3).clone()
        view = y.transpose(2, 3)
        y += self.block(x) * 2
        y.mul_(2)
        return y, view


@every_option
@every_case(__name__)
def test_the_twins_agree(cls, options, monkeypatch):
    overwrite_maps_of_every_size(monkeypatch)
    run(cls, **options)
