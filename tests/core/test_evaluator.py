"""What the evaluator proves pure, what it refuses and why, and which changes a plan's guards notice."""

from __future__ import annotations

import copy
import dataclasses
import enum
import linecache
import random
import textwrap
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_edge
from lora_edge.nn import blocks
from lora_edge.nn.blocks import LeanModule
from lora_edge.nn.forward_plan import ForwardPlan, NoPlan, make_plan
from lora_edge.nn.fuser.access import base_of
from lora_edge.nn.fuser.source import source_of

GAIN = [2.0]
SETTINGS = {"gain": 2.0, "deep": True}
CONFIG = types.SimpleNamespace(gain=2.0)


@dataclasses.dataclass
class Options:
    gain: float = 2.0


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Net(nn.Module):
    """Two convolutions whose forward is a function given from outside."""

    flag = True

    def __init__(self, function=None) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm1d(4)
        self.relu = nn.ReLU()
        self.b = nn.Conv1d(4, 3, 3, padding=1)
        self.function = function
        self.options = Options()
        self.table = {"gain": 2.0}
        self.numbers = [1.0, 2.0]
        self.mode = Mode.FAST
        self.register_buffer("seen", torch.zeros(()))

    def block(self, x):
        return self.relu(self.bn(self.a(x)))

    def forward(self, x):
        return self.function(self, x)


def adapted(function) -> nn.Module:
    torch.manual_seed(0)
    model = lora_edge.adapt(Net(function), 2).train()
    for core in lora_edge.trainable_parameters(model):
        nn.init.normal_(core, std=0.1)
    return model


def plan_of(model: nn.Module):
    return make_plan(model, ((("tensor", 3),), ()))


def _helper(x, times=2, *more, scale=1.0, **rest):
    for _ in range(times):
        x = x * scale
    return x + sum(more) + rest.get("shift", 0.0)


def _loop(m, x):
    maps = [x]
    for k, layer in enumerate((m.a, m.b)):
        maps.append(layer(maps[-1]))
        if k == 1:
            break
    else:
        return x
    return torch.cat([maps[-1], maps[0]], 1)


def _unpacks(m, x):
    n, c, length = x.shape
    first, second = m.block(x).chunk(2, dim=1)
    return torch.cat([second, first], 1).view(n, 2 * (c - 1), length)


PURE = {
    "method": lambda m, x: m.block(x),
    "helper": lambda m, x: _helper(m.a(x), 3, 0.5, scale=2.0, shift=1.0),
    "defaults": lambda m, x: _helper(m.a(x), scale=2.0),
    "flag": lambda m, x: m.block(x) if m.flag and m.training is not None else x,
    "dictionary": lambda m, x: m.block(x) * m.table["gain"] + SETTINGS.get("gain", 1.0),
    "list": lambda m, x: m.block(x) * m.numbers[-1] * len(m.numbers) * GAIN[0],
    "object": lambda m, x: m.block(x) * m.options.gain * CONFIG.gain,
    "enumeration": lambda m, x: m.block(x) if m.mode is Mode.FAST else m.block(x) * 2,
    "class attribute": lambda m, x: m.block(x) if Net.flag else x,
    "type test": lambda m, x: m.block(x) if isinstance(x, torch.Tensor) and torch.is_tensor(x) and hasattr(m, "bn") else x,
    "comprehension": lambda m, x: sum([c(x).mean() for c in m.children() if isinstance(c, nn.Conv1d) and c is m.a]),
    "loop": _loop,
    "sizes": _unpacks,
    "in place on its own map": lambda m, x: m.block(x).mul_(2.0).add_(m.a(x)),
    "getattr": lambda m, x: getattr(m, "block")(x),  # noqa: B009
    "keyword": lambda m, x: m.relu(m.bn(input=m.a(input=x))),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PURE))
def test_a_pure_forward_has_a_plan_that_computes_the_same(name):
    model = adapted(PURE[name])
    reference = copy.deepcopy(model)
    plan = plan_of(model)
    assert isinstance(plan, ForwardPlan), plan.why
    assert plan.blocks
    x = torch.randn(2, 3, 8)
    got, want = plan.run(model, [x.clone()]), Net.forward(reference, x.clone())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # rounding of float32 sums of 12 products


def _no_grad(m, x):
    with torch.no_grad():
        x = m.a(x)
    return m.b(x)


def _tries(m, x):
    try:
        return m.block(x)
    except RuntimeError:
        return x


def _counts(m, x):
    m.count = getattr(m, "count", 0) + 1
    return m.block(x)


def _counts_in_a_buffer(m, x):
    m.seen += 1
    return m.block(x)


def _keeps(m, x):
    m.numbers.append(m.a(x))
    return m.numbers[-1]


def _clears(m, x):
    m.numbers[:] = [1.0]
    return m.block(x)


FOUND = None


def _writes_a_global(m, x):
    global FOUND
    FOUND = x
    return m.block(x)


generator, dice = np.random.default_rng(0), random.Random(0)
IMPURE = {
    "context": (_no_grad, "it has a with statement"),
    "try": (_tries, "it has a try statement"),
    "counter": (_counts, "it writes the attribute count"),
    "buffer": (_counts_in_a_buffer, "it writes an attribute"),
    "stored": (_keeps, "it calls .append of a list"),
    "list written": (_clears, "existed before"),
    "global": (_writes_a_global, "it has a global statement"),
    "random": (lambda m, x: m.block(x) * random.random(), "random, which is not known to be pure"),
    "random.Random": (lambda m, x: m.block(x) * dice.random(), "Random.random is a method_descriptor"),
    "numpy": (lambda m, x: m.block(x) * np.random.rand(), "which is not known to be pure"),
    "numpy generator": (lambda m, x: m.block(x) * generator.random(), "it reads .random of a Generator"),
    "torch.rand": (lambda m, x: m.block(x) * torch.rand(()), "which is not known to be pure"),
    "print": (lambda m, x: print("x") or m.block(x), "print, which is not known to be pure"),
    "value": (lambda m, x: m.block(x) if x.sum() > 0 else x, "control flow depends on a tensor"),
    "item": (lambda m, x: m.block(x) * x.sum().item(), "it uses .item of a tensor"),
    "size": (lambda m, x: m.block(x) if x.shape[-1] > 4 else x, "control flow depends on a tensor or a size"),
    "type": (lambda m, x: m.block(x) if type(x) is torch.Tensor else x, "type, which is not known to be pure"),
    "attribute of a tensor": (lambda m, x: m.block(x) if hasattr(x, "mask") else x, "what attributes a tensor"),
    "hook on a tensor": (lambda m, x: m.block(x) * bool(x.register_hook), "it uses .register_hook of a tensor"),
    "autograd": (lambda m, x: m.block(x.requires_grad_()), "it uses .requires_grad_ of a tensor"),
    "lambda": (lambda m, x: (lambda y: m.block(y))(x), "it has a Lambda expression"),
}


@pytest.mark.parametrize("name", list(IMPURE))
def test_what_is_not_proven_pure_is_refused_by_name_and_runs_unchanged(name):
    function, why = IMPURE[name]
    model = adapted(function)
    plan = plan_of(model)
    assert isinstance(plan, NoPlan)
    assert why in plan.why
    assert not isinstance(model, LeanModule)
    assert all(why in reason for reason in model._lora_edge.not_fused.values())
    results = []
    for run in (model, lambda x: Net.forward(model, x)):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        dice.seed(0)
        generator.bit_generator.state = np.random.default_rng(0).bit_generator.state
        results.append(run(torch.ones(2, 3, 8)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def _dict_of_the_module(m):
    m.table["gain"] = 3.0


CHANGES = {
    "module's dictionary": ("dictionary", _dict_of_the_module),
    "global dictionary": ("dictionary", lambda m: SETTINGS.__setitem__("gain", 5.0)),
    "module's list": ("list", lambda m: m.numbers.append(4.0)),
    "global list": ("list", lambda m: GAIN.__setitem__(0, 7.0)),
    "dataclass": ("object", lambda m: setattr(m.options, "gain", 3.0)),
    "namespace": ("object", lambda m: setattr(CONFIG, "gain", 3.0)),
    "another object": ("object", lambda m: setattr(m, "options", Options(4.0))),
    "enumeration": ("enumeration", lambda m: setattr(m, "mode", Mode.SLOW)),
    "class attribute": ("class attribute", lambda m: setattr(Net, "flag", False)),
    "instance over class": ("flag", lambda m: setattr(m, "flag", False)),
    "method replaced": ("method", lambda m: setattr(m, "block", lambda x: x * 2)),
    "class's method replaced": ("method", lambda m: setattr(Net, "block", lambda self, x: x * 3)),
    "child's forward replaced": ("method", lambda m: setattr(m.relu, "forward", lambda x: x * 5)),
    "global function": ("helper", lambda m: globals().__setitem__("_helper", lambda x, *a, **k: x)),
    "its defaults": ("defaults", lambda m: setattr(_helper, "__defaults__", (5,))),
    "its code": ("helper", lambda m: setattr(_helper, "__code__", (lambda x, times=2, *more, scale=1.0, **rest: x).__code__)),
    "a child more": ("comprehension", lambda m: m.add_module("third", nn.ReLU())),
    "another child": ("method", lambda m: setattr(m, "relu", nn.Tanh())),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_of_what_was_read_is_noticed(name):
    form, change = CHANGES[name]
    saved = (
        dict(SETTINGS),
        list(GAIN),
        CONFIG.gain,
        Net.flag,
        Net.block,
        globals()["_helper"],
        _helper.__code__,
        _helper.__defaults__,
    )
    try:
        model = adapted(PURE[form])
        x = torch.randn(2, 3, 8)
        before = model(x)
        change(model)
        after, own = model(x), Net.forward(model, x)
        torch.testing.assert_close(after, own, rtol=1e-4, atol=1e-5)
        is_same = before.shape == after.shape and torch.allclose(before, after)
        assert form == "comprehension" or not is_same, "the change does change the output"
    finally:
        SETTINGS.update(saved[0])
        GAIN[:] = saved[1]
        CONFIG.gain, Net.flag, Net.block = saved[2:5]
        globals()["_helper"] = saved[5]
        saved[5].__code__, saved[5].__defaults__ = saved[6:]


def test_changes_of_closures_are_noticed():
    gain = 2.0

    def function(m, x):
        return m.block(x) * gain

    model = adapted(function)
    x = torch.randn(2, 3, 8)
    first = model(x)
    gain = 4.0
    torch.testing.assert_close(model(x), 2 * first)
    assert isinstance(plan_of(model), ForwardPlan)


SOURCE = """
import torch
from torch import nn
class Made(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv1d(3, 3, 3)
        self.r = nn.ReLU()
    def forward(self, x):
        return self.r(self.c(x)) * FACTOR
"""


def made(filename: str, text: str, shown: str | None) -> type[nn.Module]:
    """The class of a source text whose file shows another text, or none."""
    if shown is not None:
        linecache.cache[filename] = (len(shown), None, shown.splitlines(keepends=True), filename)
    scope: dict = {"FACTOR": 2.0}
    exec(compile(text, filename, "exec"), scope)
    return scope["Made"]


def test_a_source_is_used_only_if_it_is_that_of_the_code():
    x = torch.randn(2, 3, 8)
    cases = ((SOURCE, True), (None, False), (SOURCE.replace("* FACTOR", "* 3.0"), False), ("x =", False))
    for k, (shown, fused) in enumerate(cases):
        own = SOURCE.replace("FACTOR", f"FACTOR + {k}")  # other code each time, or the first one's source would be found for it
        shown = own if shown is SOURCE else shown
        torch.manual_seed(0)
        model = lora_edge.adapt(made(f"<made {k}>", own, shown)(), 2)
        assert isinstance(model, LeanModule) == fused
        torch.testing.assert_close(model(x), base_of(type(model)).forward(model, x), rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
        if not fused:
            assert "source" in model._lora_edge.not_fused["c"]


def test_lambdas_on_one_line_are_told_apart():
    pair = (lambda m, x: m.block(x) * 2, lambda m, x: m.block(x) * 3)
    x = torch.randn(2, 3, 8)
    outputs = [adapted(function)(x) for function in pair]
    torch.testing.assert_close(outputs[0] * 1.5, outputs[1])
    assert all(source_of(function.__code__) is not None for function in pair)


def test_a_sequence_runs_its_pure_children_together():
    class Noisy(nn.Module):
        def forward(self, x):
            return x * (1 + 0 * random.random())

    layers = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), Noisy(), nn.Conv1d(4, 4, 3), nn.ReLU()]
    model = lora_edge.adapt(nn.Sequential(*layers), 2)
    assert model._lora_edge.blocks == {"0": "conv + bn + relu", "4": "conv + relu"}
    reference = lora_edge.adapt(copy.deepcopy(lora_edge.merge(copy.deepcopy(model))), 2, lean=False)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


def test_no_plan_is_made_for_what_changes_at_every_step():
    model = adapted(lambda m, x: m.block(x) * m.gain)
    x = torch.randn(2, 3, 8)
    with pytest.raises(AttributeError):
        model(x)
    unit = None
    for k in range(2 * blocks.MOST_MADE):
        model.gain = 1.0 + k
        y = model(x)
        unit = y if unit is None else unit
        torch.testing.assert_close(y, unit * model.gain, rtol=1e-5, atol=1e-6)


def test_the_signature_is_the_models_own():
    import inspect

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv1d(3, 4, 3)

        def forward(self, first, second=None, *, scale=1.0):
            y = F.relu(self.c(first))
            return y * scale if second is None else y + self.c(second)

    model = lora_edge.adapt(Two(), 2)
    assert inspect.signature(model.forward) == inspect.signature(Two().forward)
    x = torch.randn(2, 3, 8)
    for args, kwargs in (
        ((x,), {}),
        ((x, x), {}),
        ((), {"first": x, "scale": 2.0}),
        ((x,), {"second": x}),
        ((x,), {"scale": torch.ones(())}),
    ):
        torch.testing.assert_close(model(*args, **kwargs), Two.forward(model, *args, **kwargs), rtol=1e-4, atol=1e-5)


def test_the_evaluation_writes_nothing():
    model = Net(lambda m, x: m.block(x) + m.seen)
    text = textwrap.dedent(repr(model))
    states = torch.get_rng_state(), random.getstate()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    plan_of(model)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert text == repr(model)
    for name, module in model.named_modules():
        assert all(module.__dict__[key] is value for key, value in before[name].items())
