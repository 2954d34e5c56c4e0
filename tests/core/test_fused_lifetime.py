"""Fusing holds no strong reference, so that models and classes can be collected; copies of a fused model keep working."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lora_edge
from helpers.forward_cases import EXACT, Case
from helpers.twins import compare_steps, take_step, twins
from lora_edge.nn.blocks import LeanModule


class Twice(Case):
    """Behaves differently in the two modes, and leaves a generator unfinished."""

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
def test_a_model_can_be_collected(make):
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


def test_a_class_can_be_collected_with_its_models():
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
        compare_steps(pair, *outcomes, tolerance=EXACT)
        assert isinstance(pair.ours, LeanModule)
