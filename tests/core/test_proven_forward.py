"""Forwards on which a fuser that follows Python or autograd only nearly goes wrong, each beside its stock twin."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_edge
from helpers.twins import compare_steps, take_step, twins
from lora_edge.nn.blocks import LeanModule

EXACT = 1e-10  # of the largest value, in float64: some ten roundings a layer
ROUGH = 0.1  # under autocast: the same in bfloat16


class Case(nn.Module):
    """What the cases share: two convolutions, what follows them, and what happens between the steps."""

    requires_grad = True  # of the inputs
    count = 1  # of inputs
    autocast = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.more()

    def more(self) -> None:
        """Further layers and attributes."""

    def block(self, x):
        return self.act(self.bn(self.conv(x)))

    def change(self, step: int) -> None:
        """What happens before a step."""

    def layout(self, x):
        """How an input lies in memory."""
        return x


CASES: list[type[Case]] = []


def case(cls: type[Case]) -> type[Case]:
    CASES.append(cls)
    return cls


# what a block reads may be written before its place, and what it writes may be somebody else's


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


# numbers and sizes are values, not places


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


# a symbol is no key, no text, and no known type


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
    class Opaque(nn.Module):
        def forward(self, x):
            try:
                return x * 1
            except ValueError:
                return x

    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x)) * (1 if x.dim() == 4 else 3)

    def more(self):
        self.parts = nn.Sequential(self.Opaque(), self.Child(), self.Opaque(), self.Child())

    def forward(self, x):
        return self.parts(x)


# Python's own order and scopes


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
        return self.block(x) * len([y for _ in (1,) for y in y])  # unbound, as Python has it


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


# classes that answer by themselves, and those that change


@case
class IsFalse(Case):
    class Part(nn.Module):
        def __bool__(self):
            return False

    class Parts(nn.ModuleList):
        def __len__(self):
            return 1

    def more(self):
        self.part, self.parts = self.Part(), self.Parts([nn.ReLU(), nn.ReLU()])

    def forward(self, x):
        y = self.block(x) * len(self.parts)
        return y * 2 if self.part else y


class Meta(type):
    @property
    def factor(cls):
        return 3


class Settings(metaclass=Meta):
    factor = 2


@case
class ReadsMetaclass(Case):
    def forward(self, x):
        return self.block(x) * Settings.factor


@case
class AsksForItsClass(Case):
    calls = 0

    def forward(self, x):
        if not self.training:
            return self.block(x)
        type(self).calls += 1
        return self.block(x) * (2 if type(self) is AsksForItsClass else 1) * (2 if self.__class__ is AsksForItsClass else 1)


@case
class NamesOfPython(Case):
    def more(self):
        self.parts = nn.ModuleDict({"in": nn.Conv2d(8, 8, 3), "is": nn.ReLU()})

    def forward(self, x):
        return self.parts["is"](self.bn(self.parts["in"](x)))


@case
class ChangesClassOfChild(Case):
    class One(nn.Module):
        pass

    class Other(nn.Module):
        pass

    def more(self):
        self.part = self.One()

    def forward(self, x):
        return self.block(x) * (2 if isinstance(self.part, self.Other) else 1)

    def change(self, step):
        if step == 2:
            self.part.__class__ = self.Other


@case
class ChangesLayers(Case):
    def more(self):
        self.down = None
        self.register_module("none", None)
        self.register_buffer("shift", None)

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        if self.none is not None:
            shortcut = self.none(shortcut)
        if self.shift is not None:
            shortcut = shortcut + self.shift
        return self.act(self.bn(self.conv(x)) + shortcut)

    def change(self, step):
        if step == 1:
            self.down = nn.Tanh()
        if step == 2:
            self.none = nn.Tanh()
            self.bn.eps = 0.5
        if step == 3:
            self.shift = torch.ones((), dtype=torch.float64)
            self.conv.padding, self.conv.stride = (2, 2), (1, 1)
            self.conv.dilation = (2, 2)


@case
class TrainsWeights(Case):
    def forward(self, x):
        x = self.block(x)
        y = self.act(self.norm(self.again(x)))
        return self.act(self.conv(y) + x)

    def change(self, step):
        if step == 2:
            self.conv.weight.requires_grad_(True)
        if step == 3:
            self.bn.weight.requires_grad_(True)


# calls by keyword


@case
class CallsByKeyword(Case):
    def forward(self, x):
        return self.drop(input=self.act(input=self.bn(input=self.conv(input=F.relu(input=x)))))


@case
class CallsByAnotherKeyword(Case):
    def forward(self, x):
        return self.act(x=self.bn(self.conv(x)))  # raises


# strides


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


def run(cls: type[Case], **options: object) -> None:
    """Four steps of a case's twins, in both modes."""
    torch.manual_seed(0)
    base = cls().double()
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    pair = twins(base, **options)
    for step in range(4):
        inputs = [base.layout(torch.randn(2, 8, 6, 6, dtype=torch.float64)) for _ in range(cls.count)]
        outcomes = []
        for model in pair:
            model.train(step % 2 == 0)
            model.change(step)
            own = [x.clone(memory_format=torch.preserve_format).requires_grad_(cls.requires_grad) for x in inputs]
            with torch.autocast("cpu", torch.bfloat16, enabled=cls.autocast):
                outcomes.append(take_step(model, lambda m, own=own: (m(*own), own), step))
        compare_steps(pair, *outcomes, ROUGH if cls.autocast else EXACT)


@pytest.mark.parametrize("options", [{}, {"backend": "torch"}, {"bn": "batch"}], ids=["lean", "torch", "batch"])
@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_the_twins_agree(cls, options, monkeypatch):
    monkeypatch.setattr(lora_edge.nn.fused_block, "OVERWRITE_BYTES", 0)
    run(cls, **options)


def patched_call(cls):
    cls.Part.__call__ = lambda self, x: nn.Module.__call__(self, x) * 2


def patched_forward(cls):
    cls.Base.forward = lambda self, x: x * 5


def patched_middle(cls):
    cls.Middle.forward = lambda self, x: x * 5


def patched_truth(cls):
    cls.Part.__bool__ = lambda self: False


def patched_order(cls):
    cls.Parts.__iter__ = lambda self: iter([*self._modules.values()][::-1])


def patched_sequence(cls):
    cls.Parts.forward = lambda self, x: nn.Sequential.forward(self, x) * 2


def patched_look_up(cls):
    cls.__getattr__ = lambda self, name: 3.0 if name == "ghost" else nn.Module.__getattr__(self, name)


def patched_attribute(cls):
    cls.ghost = 2.0


PATCHES = (
    patched_call, patched_forward, patched_middle, patched_truth, patched_order, patched_sequence, patched_look_up,
    patched_attribute,
)  # fmt: skip


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_classes_that_are_patched_later(patch, opaque):
    class Base(nn.Module):
        def forward(self, x):
            return x * 2

    class Middle(Base):
        pass

    class Part(Middle):
        def forward(self, x):
            return super().forward(x) + 1

    class Parts(nn.Sequential):
        pass

    class Patched(Case):
        def more(self):
            rest = [AsksForDimensions.Opaque()] if opaque else []
            self.part, self.parts = self.Part(), self.Parts(nn.Conv2d(8, 8, 1), nn.ReLU(), *rest)

        def forward(self, x):
            y = self.part(self.parts(self.block(x)))
            return y * getattr(self, "ghost", 1.0) * (2 if self.part else 1)

        def change(self, step):
            if step == 2:
                patch(Patched)

    Patched.Base, Patched.Middle, Patched.Part, Patched.Parts = Base, Middle, Part, Parts
    run(Patched)


def test_a_class_that_registers_its_subclasses_sees_none_of_ours():
    names = []

    class Registered(Case):
        def __init_subclass__(cls, *, name, **kwargs):
            names.append(name)

        def forward(self, x):
            return self.block(x)

    class Model(Registered, name="model"):
        pass

    assert isinstance(lora_edge.adapt(Model(), 2), LeanModule)
    assert names == ["model"]


class Twice(Case):
    """Two modes, and a plan that an exception ends."""

    def forward(self, x):
        values = (v for v in (1, 2) if v)
        for _ in values:
            break
        y = self.block(x) * sum(values)
        return y if self.training else self.again(y).reshape(-1)


class OpaqueTwice(Twice):
    def forward(self, x):
        try:
            return super().forward(x)
        except ValueError:
            return x


@pytest.mark.parametrize("make", [Twice, OpaqueTwice, lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), OpaqueTwice())])
def test_a_model_goes_with_its_last_reference(make):
    gc.collect()
    gc.disable()
    try:
        model = lora_edge.adapt(make(), 2)
        for training in (True, False):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format)
                model.train(training)(x).sum().backward()
        lora_edge.summary(model)
        alive = [weakref.ref(module) for module in model.modules()]
        del model
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_a_class_goes_with_its_models():
    def adapted() -> weakref.ref:
        class Local(Twice):
            pass

        lora_edge.adapt(Local(), 2)(torch.randn(2, 8, 6, 6)).sum().backward()
        return weakref.ref(Local)

    gone = adapted()
    gc.collect()
    assert gone() is None


def test_copies_between_the_steps():
    torch.manual_seed(0)
    pair = twins(Twice().double())
    for step in range(6):
        pair.ours = pickle.loads(pickle.dumps(pair.ours)) if step % 2 else copy.deepcopy(pair.ours)
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        outcomes = [take_step(m.train(step % 3 == 0), lambda m, x=x: (m(x.clone().requires_grad_()), [x]), step) for m in pair]
        compare_steps(pair, *outcomes, EXACT)
        assert isinstance(pair.ours, LeanModule)
