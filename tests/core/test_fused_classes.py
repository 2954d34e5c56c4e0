"""Forwards whose classes have operators of their own, or change between the steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_edge
from helpers.forward_cases import Case, Opaque, case, every_case, every_option, overwrite_maps_of_every_size, run
from lora_edge.nn.blocks import LeanModule


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


@every_option
@every_case(__name__)
def test_the_twins_agree(cls, options, monkeypatch):
    overwrite_maps_of_every_size(monkeypatch)
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
        Base: type
        Middle: type
        Part: type
        Parts: type

        def more(self):
            rest = [Opaque()] if opaque else []
            self.part, self.parts = self.Part(), self.Parts(nn.Conv2d(8, 8, 1), nn.ReLU(), *rest)

        def forward(self, x):
            y = self.part(self.parts(self.block(x)))
            return y * getattr(self, "ghost", 1.0) * (2 if self.part else 1)

        def change(self, step):
            if step == 2:
                patch(Patched)

    Patched.Base, Patched.Middle, Patched.Part, Patched.Parts = Base, Middle, Part, Parts
    run(Patched)


def test_a_class_that_registers_its_subclasses_does_not_see_ours():
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
