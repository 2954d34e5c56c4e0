"""Forwards that a fuser gets wrong if it only approximates Python's values, evaluation order and scopes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from helpers.forward_cases import Case, Opaque, case, every_case, every_option, overwrite_maps_of_every_size, run

# numbers and sizes are immutable values


@case
class CountsUp(Case):
    def forward(self, x):
        n = x.shape[0]
        m = n
        m += 1
        return self.block(x).reshape(n, -1), n, m


@case
class ExtendsSizes(Case):
    def forward(self, x):
        sizes = x.shape
        more = sizes
        more += (1,)
        return self.block(x).view(more), self.block(x).view(sizes)


@case
class MultipliesInPlace(Case):
    def forward(self, x):
        y = self.block(x)
        z = y
        z @= x
        return y, z


@case
class Calculates(Case):
    def forward(self, x):
        n = x.shape[-1]
        k = n * 0.5
        k /= 2
        j = k
        j += 1
        return self.block(x) * k, j, n // 4, -n, round(n / 4), int(k), float(n), max(n, 3), [n] * 2, divmod(n, 4), "%d" % n  # noqa: UP031


# a symbol cannot be a key or a text, and its type is unknown


@case
class LooksUpSize(Case):
    def forward(self, x):
        norm = {8: self.bn, 4: self.norm}.get(x.shape[1], self.norm)
        return self.act(norm(self.conv(x)))


@case
class NamesBySize(Case):
    def more(self):
        self.c8 = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        first = getattr(self, "c{}".format(x.shape[1]), self.conv)  # noqa: UP032
        second = getattr(self, "c%s" % (x.shape[1],), self.conv)  # noqa: UP031
        return self.act(second(first(x)))


@case
class AsksForTuples(Case):
    def forward(self, x):
        y = self.block(x)
        for value in (torch.where(x > 0), F.adaptive_max_pool2d(x, 1, True)):
            y = y * 2 if isinstance(value, tuple) else y
        return y * 2 if isinstance(x.type(), str) else y


@case
class AsksForDimensions(Case):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x)) * (1 if x.dim() == 4 else 3)

    def more(self):
        self.parts = nn.Sequential(Opaque(), self.Child(), Opaque(), self.Child())

    def forward(self, x):
        return self.parts(x)


# Python's evaluation order and scopes


@case
class SumsGeneratorTwice(Case):
    def forward(self, x):
        values = (v for v in (1, 2, 3))
        return self.block(x) * sum(values) + sum(values)


@case
class BindsLate(Case):
    def forward(self, x):
        k = 1
        values = (k * v for v in (1, 2, 3))
        k = 2
        return self.block(x) * sum(values)


@case
class GoesOnWithPairs(Case):
    def forward(self, x):
        pairs = zip((1, 2), (3, 4), strict=True)
        for _, _ in pairs:
            break
        return self.block(x) * sum(a for a, _ in pairs)


@case
class GrowsWhileCounted(Case):
    def forward(self, x):
        parts = [self.conv]
        for k, part in enumerate(parts):
            if k == 0:
                parts.append(self.again)
            x = self.act(self.bn(part(x)))
        return x


@case
class StopsEarly(Case):
    def scaled(self, x, k):
        x.mul_(k)
        return True

    def forward(self, x):
        x = x * 1
        any(self.scaled(x, k) for k in (1.5, 2.5))
        return self.block(x)


@case
class CountsSets(Case):
    def forward(self, x):
        found = {"a": 1}
        keys = found.keys()
        found["b"] = 2
        return self.block(x) * len({1, 1, 2}) * len(list(keys))  # noqa: B033


@case
class ShadowsInComprehension(Case):
    def forward(self, x):
        y = (1, 2)
        return self.block(x) * len([y for _ in (1,) for y in y])  # unbound, as in Python


@case
class ManglesNames(Case):
    def forward(self, x):
        __scale = 2.0
        return self.block(x) * __scale


@case
class CountsInMessage(Case):
    def more(self):
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        assert x.shape[0] > 0, self.seen.add_(1)
        return self.block(x)


@case
class ListsTwo(Case):
    def forward(self, x):
        return self.block(x) * len(list((1,), (2,)))  # raises


@case
class ReturnsItsOwnList(Case):
    def more(self):
        self.log = [1]

    def forward(self, x):
        return self.block(x), self.log


# calls by keyword


@case
class CallsByKeyword(Case):
    def forward(self, x):
        return self.drop(input=self.act(input=self.bn(input=self.conv(input=F.relu(input=x)))))


@case
class CallsByAnotherKeyword(Case):
    def forward(self, x):
        return self.act(x=self.bn(self.conv(x)))  # raises


@every_option
@every_case(__name__)
def test_the_twins_agree(cls, options, monkeypatch):
    overwrite_maps_of_every_size(monkeypatch)
    run(cls, **options)
