"""Whole-block fusing: the gradients of the unfused model on the workloads and on random networks, and what ends a block."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_edge
from benchmarks.workloads import WORKLOADS
from helpers.networks import BUILD, network, output, train
from lora_edge.memory import saved_bytes
from lora_edge.nn import blocks
from lora_edge.nn.blocks import LeanModule


def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give BatchNorm statistics and scales that keep the activations alive."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def pair(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """The adapted model with fused blocks and its unfused reference, with the same random cores, in train mode."""
    reference = lora_edge.adapt(copy.deepcopy(model), 2, lean=False, **options)
    lora_edge.adapt(model, 2, **options)
    with torch.no_grad():
        for ours, theirs in zip(lora_edge.trainable_parameters(model), lora_edge.trainable_parameters(reference), strict=True):
            ours.normal_(std=0.1)
            theirs.copy_(ours)
    return model.train(), reference.train()


def compare(model: nn.Module, reference: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    """Compare the output, the gradient of every core and that of the input."""
    x = x.clone().requires_grad_()
    inputs, wanted = ([x, *lora_edge.trainable_parameters(m)] for m in (model, reference))
    torch.manual_seed(0)  # dropout draws the same masks
    y = model(x.clone())
    torch.manual_seed(0)
    want = reference(x.clone())
    assert float((y - want).detach().norm()) <= tolerance * float(want.detach().norm())
    dy = torch.randn_like(y)
    got, expected = (torch.autograd.grad(out, leaves, dy, allow_unused=True) for out, leaves in ((y, inputs), (want, wanted)))
    for g, w in zip(got, expected, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert float((g - w).norm()) <= tolerance * max(float(w.norm()), 1e-30)


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_gradients_of_the_workloads_are_those_of_the_unfused_model(name):
    """float64 shows that the arithmetic is the same; in float32 single ReLU signs flip at zero, which needs a looser bound."""
    work = WORKLOADS[name]
    x, _ = work.batch(4)
    model = settle(work.model(), work.batch(16)[0])
    base = copy.deepcopy(model)
    ours, reference = pair(copy.deepcopy(model).double(), targets=work.targets(model))
    compare(ours, reference, x.double(), 1e-11)
    ours, reference = pair(model, targets=work.targets(model))
    compare(ours, reference, x, 2e-2)
    exact = output(copy.deepcopy(base).double(), x.double())
    fused, stock = lora_edge.adapt(copy.deepcopy(base), 2)(x).detach(), output(base, x)
    error, stock_error = (float((y - exact).norm() / exact.norm()) for y in (fused, stock))
    assert error <= max(1e-6, 2 * stock_error), "no more rounding than the stock layers make"
    state = ours._lora_edge
    unfused = [conv for conv, why in state.not_fused.items() if "users" not in why]
    assert unfused == [], state.not_fused


BYTES = {"W1": (0.83e6, 0.65e6), "W2": (8.40e6, 7.0e6), "W3": (8.0e6, 6.3e6)}


@pytest.mark.parametrize("name", list(BYTES))
def test_saved_bytes_of_the_workloads(name):
    work = WORKLOADS[name]
    for bound, saved_dtype in zip(BYTES[name], (None, "float16"), strict=True):
        model = work.model()
        lora_edge.adapt(model, 2, targets=work.targets(model), saved_dtype=saved_dtype)
        assert saved_bytes(model.train(), work.batch(64)[0]) <= bound


class Net(nn.Module):
    """A random network: its layers as data, so that hypothesis can shrink it.

    Every step maps ``(N, C, H, W)`` to the same or another number of channels; earlier outputs are kept for shortcuts.
    """

    def __init__(self, steps: list[tuple], channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        self.layers = nn.ModuleList()
        self.plan: list[tuple] = []
        width = channels
        for kind, number, style in steps:
            if kind == "conv":
                groups = width if style == "depthwise" else 2 if style == "groups" and width % 2 == 0 and number % 2 == 0 else 1
                outputs = width if style == "depthwise" else number
                stride = 2 if style == "stride" else 1
                padding = "same" if style == "same" else 1
                kernel = 4 if style == "same" else 3
                mode = "circular" if style == "circular" else "zeros"
                layer = nn.Conv2d(
                    width, outputs, kernel, stride, padding, groups=groups, bias=style == "bias", padding_mode=mode
                )
                width = outputs
            elif kind == "bn":
                layer = nn.BatchNorm2d(width)
            elif kind == "act":
                layer = {
                    "relu": nn.ReLU(),
                    "inplace": nn.ReLU(inplace=True),
                    "relu6": nn.ReLU6(),
                    "leaky": nn.LeakyReLU(0.1),
                }.get(style, nn.Identity())
            elif kind == "pool":
                layer = nn.MaxPool2d(2, stride=1, padding=1)
            else:
                layer = nn.Identity()
            self.layers.append(layer)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        kept = x
        for layer, (kind, _, style) in zip(self.layers, self.steps, strict=True):
            if kind == "keep":
                kept = x
            elif kind == "add":
                x = kept + x if style == "left" else x + kept
            elif kind == "act" and style == "functional":
                x = F.relu(x)
            elif kind == "act" and style == "method":
                x = x.relu()
            elif kind == "pad":
                x = F.pad(x, (1, 2, 0, 1) if style == "uneven" else (1, 1, 1, 1))
            else:
                x = layer(x)
        return self.head(x.mean(dim=(2, 3)))


def steps():
    conv = st.tuples(
        st.just("conv"), st.sampled_from([2, 4, 6]),
        st.sampled_from(["plain", "bias", "stride", "same", "depthwise", "groups", "circular"]),
    )  # fmt: skip
    act = st.tuples(st.just("act"), st.just(0), st.sampled_from(["relu", "inplace", "relu6", "leaky", "functional", "method"]))
    bn = st.just(("bn", 0, ""))
    keep = st.just(("keep", 0, ""))
    add = st.tuples(st.just("add"), st.just(0), st.sampled_from(["", "left"]))
    pad = st.tuples(st.just("pad"), st.just(0), st.sampled_from(["even", "uneven"]))
    pool = st.just(("pool", 0, ""))
    block = st.tuples(conv, bn, act).map(list)
    shortcut = st.tuples(keep, bn, act, conv, bn, add, act).map(list)
    piece = st.one_of(block, shortcut, *[s.map(lambda step: [step]) for s in (conv, act, bn, keep, pad, pool)])
    return st.lists(piece, min_size=1, max_size=5).map(lambda pieces: [step for p in pieces for step in p])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps(), seed=st.integers(0, 1000), shared=st.booleans(), hook=st.integers(0, 30))
def test_random_networks(steps, seed, shared, hook):
    """Branches, pre-activation, strided, padded, depthwise layers, in-place and functional forms, a shared module, a hook."""
    steps = _with_fitting_shortcuts([("conv", 4, "plain"), *steps, ("conv", 4, "plain"), ("bn", 0, ""), ("act", 0, "relu")])
    model = Net(steps, 3, seed).double()
    if shared:
        same = [k for k, m in enumerate(model.layers) if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels]
        for k in same[1:]:
            if repr(model.layers[k]) == repr(model.layers[same[0]]):
                model.layers[k] = model.layers[same[0]]
    x = torch.randn(9, 3, 9, 8, dtype=torch.float64)
    settle(model, x)
    ours, reference = pair(model)
    assert isinstance(ours, LeanModule)
    assert ours._lora_edge.blocks
    try:
        reference(x.clone().requires_grad_()).sum().backward()
    except RuntimeError as error:  # such as an in-place ReLU on the output of a ReLU, which stock torch refuses too
        assume("modified by an inplace operation" not in str(error))
        raise
    calls: dict[int, list] = {0: [], 1: []}
    for k, m in enumerate((ours, reference)):
        if hook < len(m.layers):
            m.layers[hook].register_forward_hook(lambda _, args, out, k=k: calls[k].append(out.shape))
    compare(ours, reference, x, 1e-9)
    assert calls[0] == calls[1]


def _with_fitting_shortcuts(steps: list[tuple]) -> list[tuple]:
    """Drop each addition whose shortcut has another shape than the trunk."""
    shape, kept, good = (3, 9, 8), (3, 9, 8), []
    for kind, number, style in steps:
        if kind == "conv":
            channels = shape[0] if style == "depthwise" else number
            size = tuple(-(-n // 2) for n in shape[1:]) if style == "stride" else shape[1:]
            shape = (channels, *size)
        elif kind == "pad":
            more = (1, 3) if style == "uneven" else (2, 2)
            shape = (shape[0], shape[1] + more[0], shape[2] + more[1])
        elif kind == "pool":
            shape = (shape[0], shape[1] + 1, shape[2] + 1)
        elif kind == "keep":
            kept = shape
        elif kind == "add" and kept != shape:
            continue
        good.append((kind, number, style))
    return good


def blocks_of(model: nn.Module) -> dict[str, str]:
    return lora_edge.adapt(model, 2)._lora_edge.blocks


class Functional(nn.Module):
    """The same block in functional and module forms; ``forward`` is set by the test."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.valid = nn.Conv2d(4, 4, 4)
        self.bn = nn.BatchNorm2d(4)
        self.other_bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


FORMS = {
    "module": (lambda m, x: m.relu(m.bn(m.conv(x))), "conv + bn + relu"),
    "functional": (lambda m, x: F.relu(m.bn(m.conv(x))), "conv + bn + relu"),
    "torch": (lambda m, x: torch.relu(m.bn(m.conv(x))), "conv + bn + relu"),
    "method": (lambda m, x: m.bn(m.conv(x)).relu(), "conv + bn + relu"),
    "in place": (lambda m, x: m.bn(m.conv(x)).relu_(), "conv + bn + relu"),
    "functional in place": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), "conv + bn + relu"),
    "hardtanh": (lambda m, x: F.hardtanh(m.bn(m.conv(x)), -0.5, max_val=0.5), "conv + bn + hardtanh"),
    "leaky": (lambda m, x: F.leaky_relu(m.conv(x), 0.2), "conv + leaky_relu"),
    "add": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), "conv + bn + add + relu"),
    "add on the left": (lambda m, x: torch.add(x, m.bn(m.conv(x))), "conv + bn + add"),
    "add method": (lambda m, x: m.bn(m.conv(x)).add(x), "conv + bn + add"),
    "bn on the shortcut": (lambda m, x: m.relu(m.bn(m.conv(x)) + m.other_bn(x)), "conv + bn + bn of the shortcut + add + relu"),
    "pad": (lambda m, x: m.relu(m.bn(m.valid(F.pad(x, (1, 2, 2, 1))))), "pad + conv + bn + relu"),
}


def _iadd(m, x):
    y = m.bn(m.conv(x))
    y += x
    return m.relu(y)


FORMS["in-place add"] = (_iadd, "conv + bn + add + relu")


@pytest.mark.parametrize("form", list(FORMS))
def test_functional_and_module_forms_are_fused_alike(form):
    function, what = FORMS[form]
    x = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    model = settle(Functional(function).double(), x)
    ours, reference = pair(model)
    assert what in ours._lora_edge.blocks.values()
    compare(ours, reference, x, 1e-10)


def _written_twice(m, x):
    y = m.conv(x)
    x.mul_(2.0)  # between the parts of the block: it must not be delayed past this
    return m.relu(m.bn(y) + x)


def _used_twice(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) + y


NOT_FUSED = {
    "output used twice": (_used_twice, "conv"),
    "broadcast residual": (lambda m, x: m.relu(m.bn(m.conv(x)) + x.mean(dim=(2, 3), keepdim=True)), None),
    "number added": (lambda m, x: m.relu(m.bn(m.conv(x)) + 1.0), "conv + bn"),
    "scaled addition": (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), "conv + bn"),
}


@pytest.mark.parametrize("form", list(NOT_FUSED))
def test_what_is_not_a_block_still_computes_the_same(form):
    function, what = NOT_FUSED[form]
    x = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    ours, reference = pair(settle(Functional(function).double(), x))
    if what:
        assert ours._lora_edge.blocks == {"conv": what}
    compare(ours, reference, x, 1e-10)


def test_writing_in_place_between_the_parts_keeps_the_order():
    x = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    ours, reference = pair(settle(Functional(lambda m, x: _written_twice(m, x * 1.0)).double(), x))
    assert ours._lora_edge.not_fused == {"conv": "something is written in place between its parts"}
    compare(ours, reference, x, 1e-10)


class Awkward(nn.Module):
    """A model whose forward is not fused as a whole, with a block that is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.block = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
        self.tail = nn.Conv1d(4, 4, 3)
        self.seen = 0

    def forward(self, x, gain=None):
        y = self.block(x)
        if self.kind == "control flow" and y.sum() > 0:
            y = y * 2
        if self.kind == "writes":
            self.seen = self.seen + 1
        if self.kind == "random" and random.random() < 0.5:
            y = y * 3
        if self.kind == "torch random" and float(torch.rand(())) < 0.5:
            y = y * 3
        return self.tail(y) if gain is None else self.tail(y) * gain


@pytest.mark.parametrize("kind", ["control flow", "writes", "random", "torch random"])
def test_in_a_model_that_is_not_fused_as_a_whole_the_children_are(kind):
    x = torch.randn(4, 3, 20, dtype=torch.float64)
    ours, reference = pair(settle(Awkward(kind).double(), x))
    assert ours._lora_edge.blocks == {"block.0": "conv + bn + relu"}
    assert not isinstance(ours, LeanModule)
    assert isinstance(ours.block, LeanModule)
    assert "tail" in ours._lora_edge.not_fused
    for seed in range(4):
        results = []
        for model in (ours, reference):
            random.seed(seed)
            torch.manual_seed(seed)
            results.append(model(x))
        torch.testing.assert_close(*results)


def test_optional_arguments_run_the_models_own_forward():
    x = torch.randn(4, 3, 20, dtype=torch.float64)
    ours, reference = pair(settle(Awkward("plain").double(), x))
    assert isinstance(ours, LeanModule)
    compare(ours, reference, x, 1e-10)
    torch.testing.assert_close(ours(x, gain=2.0), reference(x, gain=2.0))
    torch.testing.assert_close(ours(x, 2.0), reference(x, 2.0))


def test_the_plan_follows_changes_of_the_model():
    x = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    ours, reference = pair(settle(Functional(FORMS["module"][0]).double(), x))
    seen = []
    for model in (ours, reference):
        model.bn.register_forward_hook(lambda module, args, out: seen.append(out.shape) or out * 2)
    compare(ours, reference, x, 1e-10)  # a hook ends the block, and what it returns counts
    assert len(seen) == 2
    assert lora_edge.summary(ours).layers[0].block == "(bn has a hook (<lambda>))"
    for model in (ours, reference):
        model.bn._forward_hooks.clear()
        model.relu = nn.LeakyReLU(0.3)
    compare(ours, reference, x, 1e-10)  # a replaced layer


class Flagged(nn.Module):
    """A block whose forward depends on plain attributes, which the plan was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
        self.gain = 1.5
        self.twice = False

    def forward(self, x):
        y = self.inner(x) * self.gain
        return self.tail(self.inner(y) if self.twice else y)


def _replace_hooks(model: nn.Module) -> None:
    model.inner[0]._forward_hooks = type(model.inner[0]._forward_hooks)()
    model.inner[0].register_forward_hook(lambda module, args, out: out * 2)


PLAN_CHANGES = {
    "flag": lambda m: setattr(m, "twice", True),
    "number": lambda m: setattr(m, "gain", 2.5),
    "flag of a layer": lambda m: setattr(m.inner[1], "eps", 0.5),
    "hook on the convolution": lambda m: m.inner[0].register_forward_hook(lambda module, args, out: out * 2),
    "pre-hook below": lambda m: m.inner[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "hooks replaced": _replace_hooks,
    "layer replaced": lambda m: m.inner.__setitem__(2, nn.LeakyReLU(0.3)),
    "layer replaced by one of its class": lambda m: m.inner.__setitem__(0, copy.deepcopy(m.inner[0]).requires_grad_(False)),
    "layer added": lambda m: m.tail.append(nn.Hardtanh()),
    "layer taken away": lambda m: m.inner.pop(2),
    "statistics": lambda m: m.inner[1].running_var.mul_(2),
    "statistics under .data": lambda m: m.inner[1].running_mean.data.add_(1),
    "other statistics": lambda m: setattr(m.inner[1], "running_mean", torch.ones(4, dtype=torch.float64)),
    "scale under .data": lambda m: m.inner[1].weight.data.mul_(2),
    "other shift": lambda m: setattr(m.inner[1].bias, "data", torch.ones(4, dtype=torch.float64)),
    "no shift": lambda m: setattr(m.inner[1], "bias", None),
    "a trained scale": lambda m: m.inner[1].weight.requires_grad_(),
    "state dict": lambda m: m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", list(PLAN_CHANGES))
def test_every_change_between_training_steps_is_followed(change):
    x = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    ours, reference = pair(settle(Flagged().double(), x))
    assert ours._lora_edge.blocks["inner.0"] == "conv + bn + relu"
    for _ in range(2):  # the second run uses what the first one cached
        compare(ours, reference, x, 1e-10)
    with torch.no_grad():
        for model in (ours, reference):
            torch.manual_seed(0)
            PLAN_CHANGES[change](model)
    for _ in range(2):
        compare(ours, reference, x, 1e-10)


def test_a_plan_is_made_once_and_holds_no_model(monkeypatch):
    x = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    ours, _ = pair(settle(Flagged().double(), x))
    made: list[int] = []
    make_plan = blocks.make_plan
    monkeypatch.setattr(blocks, "make_plan", lambda *args: made.append(args[0]) or make_plan(*args))
    for _ in range(3):
        ours.train()(x)
        ours.eval()(x)
    with lora_edge.disabled(ours):
        ours(x)
    ours(x)
    assert sum(module is ours for module in made) == 1, "its forward does not read its mode"
    made.clear()
    assert not any(key.startswith("_lean") for key in copy.deepcopy(ours).__dict__)
    gc.collect()
    gone = weakref.ref(ours)
    gc.disable()
    try:
        del ours
        assert gone() is None, "a model goes with its last reference, not with the next collection"
    finally:
        gc.enable()


@pytest.mark.parametrize("name", list(BUILD))
def test_fused_models_survive_pickle_deepcopy_and_merge(name):
    model, x = network(name)
    base_types = [type(m) for m in model.modules()]
    ours, reference = pair(model.double())
    x = x.double()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(twin, LeanModule)
        assert not any(key.startswith("_lean_") for key in twin.__dict__)
        compare(twin, reference, x, 1e-10)
    assert repr(ours).splitlines()[0] == repr(reference).splitlines()[0]
    lora_edge.merge(ours)
    assert [type(m) for m in ours.modules()] == base_types
    assert not any(key.startswith("_lean_") for key in ours.__dict__)


def test_nothing_is_computed_backward_below_the_first_adapted_layer():
    """The first convolutions are frozen: nothing is saved for them and none of their input gradients is computed."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    lora_edge.adapt(model, 2, targets="6").train()
    x = torch.randn(4, 3, 16, 16)
    scale = 8 * 4  # of the block's BatchNorm
    assert saved_bytes(model, x) == 4 * 2 * 10 * 10 * 4 + 4 * 8 * 10 * 10 // 8 + scale  # h and the bits of the last block
    ran: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(str(func))
            return func(*args, **(kwargs or {}))

    loss = model(x).sum()
    with Record():
        loss.backward()
    assert not [name for name in ran if "convolution" in name], "dx of the first adapted layer is not needed"


@pytest.mark.parametrize("kind", ["plain", "control flow"])
def test_convolutions_that_are_not_adapted_save_nothing(kind):
    x = torch.randn(4, 3, 20, dtype=torch.float64)
    ours, reference = pair(settle(Awkward(kind).double(), x), targets="block.0")
    compare(ours, reference, x, 1e-10)
    block = 4 * 2 * 18 * 8 + 4 * 4 * 18 // 8 + 4 * 8  # h in float64, the bits, the scale of the BatchNorm
    assert saved_bytes(ours, x) == block


def test_bn_in_batch_mode_is_correct():
    model, x = network("2-D")
    ours, reference = pair(model.double(), bn="batch")
    compare(ours, reference, x.double(), 1e-10)
    for a, b in zip(ours.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert ours._lora_edge.blocks["twice"] == "conv + relu"


@pytest.mark.parametrize("saved_dtype", ["float16", "bfloat16", torch.float16])
def test_h_is_saved_in_half_precision(saved_dtype):
    model, x = network("2-D")
    exact = lora_edge.adapt(copy.deepcopy(model), 2)
    lora_edge.adapt(model, 2, saved_dtype=saved_dtype)
    parameters, wanted = list(lora_edge.trainable_parameters(model)), list(lora_edge.trainable_parameters(exact))
    got = torch.autograd.grad(model(x).square().sum(), parameters)
    want = torch.autograd.grad(exact(x).square().sum(), wanted)
    errors = [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
    assert 0 < max(errors) < 2e-2
    with pytest.raises(ValueError, match='saved_dtype is \'int8\'; give "float16", "bfloat16" or None'):
        lora_edge.adapt(network("2-D")[0], 2, saved_dtype="int8")


def test_training_is_the_same_with_lean_on_and_off():
    """Fifty steps with one seed and frozen BatchNorm: the same parameters up to rounding in float64."""
    model, x = network("1-D")
    ours, reference = pair(model.double())
    for m in (ours, reference):
        torch.manual_seed(0)
        train(m, x.double(), list(lora_edge.trainable_parameters(m)), steps=50)
    for a, b in zip(lora_edge.trainable_parameters(ours), lora_edge.trainable_parameters(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_second_backward_through_a_freed_graph_is_refused():
    model, x = network("1-D")
    loss = lora_edge.adapt(model, 2)(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
