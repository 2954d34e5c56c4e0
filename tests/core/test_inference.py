"""The cached fused kernels: made once while nothing changes, and never stale, whatever changes them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_edge
from lora_edge import LoRAEdgeConv2d
from lora_edge.nn import fused_weight_cache
from lora_edge.nn.frozen_bn import FrozenBatchNorm2d, freeze_bn
from lora_edge.ops import reference
from lora_edge.ops.backends import VARIABLE, use_backend


def trained_layer(channels: int = 8) -> LoRAEdgeConv2d:
    torch.manual_seed(0)
    layer = LoRAEdgeConv2d(channels, 8, 3, rank=2, padding=1)
    nn.init.normal_(layer.core)
    return layer


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        fused = reference.tt_fuse(layer.weight, layer.core, layer.suffix, layer.scale)
        return F.conv2d(x, fused, layer.bias, padding=1)


def check(layer: nn.Module) -> None:
    """Check that the layer's output without gradients, twice, is bit for bit that of a newly fused kernel."""
    x = torch.randn(2, layer.weight.shape[1], 6, 5, dtype=layer.weight.dtype)
    for context in (torch.no_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(layer(x), expected(layer, x))


def in_place(name: str):
    def change(layer: nn.Module) -> None:
        with torch.no_grad():
            layer.get_parameter(name).mul_(1.5)

    return change


def in_inference_mode(name: str):
    def change(layer: nn.Module) -> None:
        with torch.inference_mode():
            layer.get_parameter(name).mul_(1.5)

    return change


def other_data(name: str):
    def change(layer: nn.Module) -> None:
        for _ in range(4):  # the allocator reuses addresses
            parameter = layer.get_parameter(name)
            parameter.data = parameter.data * 1.5
            check(layer)

    return change


def replaced(name: str):
    def change(layer: nn.Module) -> None:
        old = layer.get_parameter(name)
        layer._parameters[name] = nn.Parameter(torch.randn_like(old), old.requires_grad)  # as load_state_dict(assign=True)

    return change


def replaced_on_its_memory(name: str):
    def change(layer: nn.Module) -> None:
        layer._parameters[name] = nn.Parameter(layer.get_parameter(name).data.mul_(1.5), requires_grad=False)

    return change


def fewer_ranks(layer: nn.Module) -> None:
    layer.core.data, layer.suffix.data = layer.core.data[:, :1], layer.suffix.data[:1]


def fewer_inputs(layer: nn.Module) -> None:
    layer.weight.data, layer.suffix.data = layer.weight.data[:, :4], layer.suffix.data[:, :4]
    layer.in_channels = 4


def fewer_outputs(layer: nn.Module) -> None:
    for name in ("weight", "core", "bias"):
        layer.get_parameter(name).data = layer.get_parameter(name).data[:4]


def transposed(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data.transpose(0, 1)


def core_with_gaps(layer: nn.Module) -> None:
    layer.core.data = torch.randn(2, 8).t()
    check(layer)
    layer.core.data.normal_()


def half_precision(layer: nn.Module) -> None:
    layer.bfloat16()
    check(layer)
    layer.core.data.normal_()


def state_dict(layer: nn.Module, **options) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()}, **options)


def a_training_step(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD([layer.core], lr=0.1)
    layer(torch.randn(2, 8, 6, 5)).square().sum().backward()
    optimizer.step()


def nan(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.core.fill_(0.0)
    check(layer)
    layer.core.data.neg_()  # a zero of the other sign is another core
    check(layer)
    layer.core.data.normal_()


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def computed(name: str):
    def change(layer: nn.Module) -> None:
        parametrize.register_parametrization(layer, name, Twice())
        check(layer)
        with torch.no_grad():
            layer.parametrizations[name].original.mul_(1.5)

    return change


CHANGES = {
    **{f"{n} in place": in_place(n) for n in ("weight", "core", "suffix", "bias")},
    **{f"{n} in place in inference mode": in_inference_mode(n) for n in ("weight", "core", "suffix", "bias")},
    **{f"other data for {n}": other_data(n) for n in ("weight", "core", "suffix", "bias")},
    **{f"{n} replaced": replaced(n) for n in ("weight", "core", "suffix", "bias")},
    **{f"{n} replaced on its memory": replaced_on_its_memory(n) for n in ("weight", "core", "suffix", "bias")},
    **{f"{n} computed": computed(n) for n in ("weight", "core", "suffix", "bias")},
    "core under .data": lambda layer: layer.core.data.normal_(),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "fewer ranks": fewer_ranks,
    "fewer inputs": fewer_inputs,
    "fewer outputs": fewer_outputs,
    "weight transposed": transposed,
    "core with gaps": core_with_gaps,
    "scale": lambda layer: setattr(layer, "scale", 0.5),
    "double": lambda layer: layer.double(),
    "bfloat16": half_precision,
    "channels-last": lambda layer: layer.to(memory_format=torch.channels_last),
    "share_memory": lambda layer: layer.share_memory(),
    "state dict": state_dict,
    "state dict assigned": lambda layer: state_dict(layer, assign=True),
    "training step": a_training_step,
    "sign of zero": nan,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_every_change_is_followed(change):
    layer = trained_layer()
    check(layer)
    CHANGES[change](layer)
    check(layer)


WRITES = {
    "scaled": lambda t: t.mul_(0.5),
    "half the filters": lambda t: t[::2].zero_(),
    "pruned at random": lambda t: t.mul_(torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) < 0.5),
    "by numpy": lambda t: t.numpy().fill(0.25),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "with gaps", "bfloat16"])
@pytest.mark.parametrize("tensor", ["weight", "suffix"])
@pytest.mark.parametrize("write", list(WRITES))
def test_frozen_tensors_of_a_wide_layer_written_under_data(write, tensor, layout):
    if (write, layout) == ("by numpy", "bfloat16"):
        return  # numpy has none
    layer = LoRAEdgeConv2d(16, 64, 3, rank=20).requires_grad_(False)
    layer.core.data.normal_(std=0.3)
    if layout == "channels-last":
        layer = layer.to(memory_format=torch.channels_last)
    elif layout == "bfloat16":
        layer = layer.bfloat16()
    elif layout == "with gaps":
        for parameter in (layer._parameters["weight"], layer._parameters["suffix"]):
            parameter.data = torch.cat([parameter, parameter], 1)[:, : parameter.shape[1]]
    x = torch.randn(2, 16, 5, 5, dtype=layer.core.dtype)
    with torch.no_grad():
        before = layer(x)
        assert fused_weight_cache._entries.get(layer) is not None
        WRITES[write](layer._parameters[tensor].data)  # by no way that hands out the layer's weight
        after = layer(x)
        fused_weight_cache.drop(layer)
        assert torch.equal(after, layer(x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("part", [(7, 3, 1, 2), (3,), (slice(None), 5)], ids=["value", "filter", "input channel"])
def test_a_weight_that_was_read_may_be_written_in_part(part):
    layer = LoRAEdgeConv2d(16, 64, 3, rank=4).requires_grad_(False)
    x = torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data[part] += 1
        assert not torch.equal(layer(x), before)
        layer.weight.data[part] -= 1
        torch.testing.assert_close(layer(x), before)


def fusions(monkeypatch) -> list[int]:
    made: list[int] = []
    original = reference.tt_fuse
    monkeypatch.setattr(fused_weight_cache.reference, "tt_fuse", lambda *a: made.append(1) or original(*a))
    return made


def test_made_once_while_nothing_changes(monkeypatch):
    layer, x = trained_layer(), torch.randn(2, 8, 6, 5)
    made = fusions(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.eval()(x)
        layer.requires_grad_(False)(x)
    assert len(made) == 1


def test_disabled_and_hooks():
    layer, x = trained_layer(), torch.randn(2, 8, 6, 5)
    check(layer)
    layer.enabled = False
    with torch.no_grad():
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
        layer.enabled = True
        check(layer)
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        assert torch.equal(layer(x), expected(layer, 2 * x))


def test_named_backends_run_the_op(monkeypatch):
    layer, x = trained_layer(), torch.randn(2, 8, 6, 5)
    made = fusions(monkeypatch)
    if lora_edge.backends()["cpu"] == "available":
        with torch.no_grad(), use_backend("cpu"):
            torch.testing.assert_close(layer(x), expected(layer, x))
        assert fused_weight_cache._entries.get(layer) is None
    monkeypatch.setenv(VARIABLE, "gpu")
    with torch.no_grad(), pytest.raises(ValueError, match=r"backend is 'gpu' \(from LORA_EDGE_BACKEND\)"):
        layer(x)
    monkeypatch.delenv(VARIABLE)
    made.clear()
    with torch.no_grad():
        layer(x)
        layer.backend = "torch"
        layer(x)
    assert len(made) == 1


def test_autocast_casts_the_cached_kernel_and_does_not_make_it():
    layer, x = trained_layer(), torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        fused = reference.tt_fuse(layer.weight, layer.core, layer.suffix)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert torch.equal(y, F.conv2d(x, fused, layer.bias, padding=1))
        assert y.dtype == torch.bfloat16
    check(layer)


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        layer = copy.deepcopy(trained_layer())
        assert layer.weight.is_inference()
        check(layer)
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        check(layer)


def test_other_weights_for_one_call():
    layer, x = trained_layer(), torch.randn(2, 8, 6, 5)
    check(layer)
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(layer, other, (x,))
        fused = reference.tt_fuse(other["weight"], other["core"], other["suffix"])
        assert torch.equal(y, F.conv2d(x, fused, other["bias"], padding=1))
    check(layer)


def test_nothing_is_copied_pickled_or_left_behind():
    layer = trained_layer()
    size = len(pickle.dumps(layer))
    check(layer)
    assert fused_weight_cache._entries.get(layer) is not None
    assert len(pickle.dumps(layer)) == size
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert fused_weight_cache._entries.get(twin) is None
        check(twin)
    layer.cycle = [layer]
    key = id(layer)
    del layer
    gc.collect()
    assert key not in fused_weight_cache._entries._values
    moved = trained_layer()
    check(moved)
    moved.to(torch.float64)
    assert fused_weight_cache._entries.get(moved) is None
    for _ in range(20):  # a new layer may have an old one's id
        check(trained_layer())


def test_errors_name_the_argument():
    layer = trained_layer()
    with torch.no_grad():
        layer(torch.randn(2, 8, 6, 5))
        with pytest.raises(ValueError, match=r"tt_conv: x has 3 channels"):
            layer(torch.randn(2, 3, 6, 5))
        with pytest.raises(TypeError, match=r"tt_conv: x is torch.float64, weight is torch.float32"):
            layer(torch.randn(2, 8, 6, 5).double())


def zero_mean(bn: nn.Module) -> None:
    bn.running_mean = torch.zeros(4)


def batch_statistics(bn: nn.Module) -> None:
    bn.running_mean = bn.running_var = None


NORM_CHANGES = {
    "nothing": lambda bn: None,
    "statistics in place": lambda bn: bn.running_var.mul_(2),
    "other statistics": zero_mean,
    "no statistics": batch_statistics,
    "eps": lambda bn: setattr(bn, "eps", 0.1),
    "no bias": lambda bn: setattr(bn, "bias", None),
    "training set by hand": lambda bn: setattr(bn, "training", True),
    "weight computed": lambda bn: parametrize.register_parametrization(bn, "weight", Twice()),
}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("change", list(NORM_CHANGES))
def test_frozen_bn_is_the_stock_layer_bit_by_bit(change, lean):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4).eval()
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        tensor.uniform_(0.5, 1.5)
    frozen = copy.deepcopy(bn)
    freeze_bn(frozen, lean)
    assert type(frozen) is FrozenBatchNorm2d
    x = torch.randn(3, 4, 5, 6)
    with torch.no_grad():
        assert torch.equal(frozen(x), bn(x))
        NORM_CHANGES[change](bn)
        NORM_CHANGES[change](frozen)
        assert torch.equal(frozen(x), bn(x))
        for ours, stock in zip(frozen.buffers(), bn.buffers(), strict=True):
            assert torch.equal(ours, stock)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frozen(x.bfloat16()), bn(x.bfloat16()))
        for layer in (frozen, bn):
            with pytest.raises(ValueError, match="expected 4D input"):
                layer(x[0])
