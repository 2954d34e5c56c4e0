"""adapt, merge, disabled, trainable_parameters, summary, calibrate_bn: what changes, what must not, and how it comes back."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import lora_edge
from helpers.networks import BUILD, Residual, network, output, train
from helpers.snapshots import assert_same, snapshot
from helpers.tolerances import assert_near
from lora_edge.har.models import MobileNetV2, ResNet18, TResNet, pointwise
from lora_edge.memory import saved_bytes
from lora_edge.nn.bn_statistics import batch_norms
from lora_edge.nn.layers import LoRAEdgeConv, LoRAEdgeConv1d, LoRAEdgeConv2d
from lora_edge.surgery.adapted import adapted_layers

NAMES = list(BUILD)


@pytest.mark.parametrize("options", [{}, {"bn": "batch"}, {"scaling": "paper"}, {"train_head": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_life_of_an_adapted_model(name, options):
    model, x = network(name)
    base = copy.deepcopy(model)
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)  # merge must give back exactly this
    before = snapshot(model)

    assert lora_edge.adapt(model, 2, **options) is model
    assert torch.equal(output(model, x), output(base, x)), "bit-identical right after adapt"
    fused = model(x)
    assert float((fused - output(base, x)).norm() / output(base, x).norm()) <= 1e-6, "fused blocks, where gradients are needed"
    if not options:
        assert torch.equal(output(model.train(), x), output(base, x)), "frozen BN holds through train()"
    train(model, x, list(lora_edge.trainable_parameters(model)))
    model.eval()
    adapted = output(model, x)
    assert not torch.allclose(adapted, output(base, x))
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x)), "disabled gives the base model's own output"
    assert torch.equal(output(model, x), adapted)

    model.train()
    assert lora_edge.merge(model) is model
    after = snapshot(model)
    assert after[1] == [(n, t, True, i) for n, t, _, i in before[1]], "types, names, identities; train() was asked for"
    assert after[2] == before[2], "requires_grad"
    assert list(after[0]) == list(before[0]), "order of the keys"
    assert_near(output(model.eval(), x), adapted, layers=4, terms=80)
    assert not any("lora" in key or "base_stat" in key for m in model.modules() for key in m.__dict__)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bit_identical_in_other_dtypes(name, dtype):
    model, x = network(name)
    model, x = model.to(dtype), x.to(dtype)
    base = copy.deepcopy(model)
    lora_edge.adapt(model, 3)
    assert torch.equal(output(model, x), output(base, x))
    for layer in adapted_layers(model).values():  # a half-precision weight keeps a float32 core: it has to learn
        assert layer.core.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_adapt_before_and_after_a_cast(name):
    first, x = network(name)
    then = copy.deepcopy(first)
    lora_edge.adapt(first, 2).double()
    lora_edge.adapt(then.double(), 2)
    torch.testing.assert_close(first(x.double()), then(x.double()))


def test_parameter_counts():
    model = TResNet(97, 17)
    assert sum(p.numel() for p in model.parameters()) == 560_915
    for rank, trained in ((2, 2_304), (4, 4_608)):
        adapted = lora_edge.adapt(copy.deepcopy(model), rank)
        assert sum(p.numel() for p in lora_edge.trainable_parameters(adapted)) == trained
        assert lora_edge.summary(adapted).trainable == trained
        assert lora_edge.summary(adapted).parameters == 560_915
    mobile = MobileNetV2(17)
    lora_edge.adapt(mobile, 2, targets=pointwise(mobile))
    assert sum(p.numel() for p in lora_edge.trainable_parameters(mobile)) == 19_776


def test_counting_saved_bytes_keeps_nothing():
    """A sigmoid saves its own output, which refers back to the sigmoid."""
    model, outputs = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), []
    model[1].register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    assert saved_bytes(model, torch.randn(5, 3)) > 0
    assert [output() for output in outputs] == [None]


def test_saved_bytes_of_w1_with_stock_layers():
    model = lora_edge.adapt(TResNet(97, 17), 2).train()
    assert saved_bytes(model, torch.randn(64, 97, 60)) <= 34e6


@pytest.mark.timed
def test_adapting_resnet18_needs_at_most_ten_seconds():
    import time

    model = ResNet18(10)
    start = time.perf_counter()
    lora_edge.adapt(model, 2)
    assert time.perf_counter() - start <= 10


def test_balanced_rows_have_one_norm_and_span_the_papers_subspace():
    model, _ = network("1-D")
    paper = lora_edge.adapt(copy.deepcopy(model), 3, scaling="paper")
    lora_edge.adapt(model, 3)
    for ours, theirs in zip(adapted_layers(model).values(), adapted_layers(paper).values(), strict=True):
        a, b = ours.suffix.detach().flatten(1), theirs.suffix.detach().flatten(1)
        filters = ours.weight.detach().flatten(1).norm(dim=1).square().mean().sqrt()
        torch.testing.assert_close(a.norm(dim=1), (filters / (2 * len(a)) ** 0.5).expand(len(a)))
        torch.testing.assert_close(nn.functional.normalize(a), nn.functional.normalize(b))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_first_step_has_the_size_from_which_the_balanced_norm_is_derived(optimizer, rank):
    """SGD: ``dW`` seen by the unit rows times the squared norm. Adam: a filter's norm times rate / sqrt(2), at every rank."""
    conv, lr = nn.Conv2d(6, 16, 3).double(), 1e-3
    x = torch.randn(5, 6, 8, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    model = lora_edge.adapt(nn.Sequential(conv), rank)
    layer = model[0]
    step = optimizer(lora_edge.trainable_parameters(model), lr=lr)
    model(x).square().sum().backward()
    step.step()
    rows = layer.suffix.detach().flatten(1)
    update = layer.core.detach() @ rows
    a_filter = conv.weight.detach().norm() / 16**0.5
    norm = a_filter / (2 * rank) ** 0.5
    if optimizer is torch.optim.SGD:
        unit = rows / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(update, -lr * norm**2 * gradient.flatten(1) @ unit.T @ unit)
    else:
        torch.testing.assert_close(layer.core.detach().abs(), torch.full((16, rank), lr).double(), rtol=1e-4, atol=0)
        assert float(update.norm(dim=1).max().detach()) <= lr * norm * rank
        assert float(update.norm(dim=1).min().detach()) >= 0.5 * lr * norm * rank**0.5
        size = update.square().sum(dim=1).mean().sqrt() / (lr / 2**0.5 * a_filter)
        assert float(size) == pytest.approx(1.0, abs=0.1)  # the rows are orthogonal but for what the later bonds cut off


def test_targets_and_exclude_choose_the_layers():
    model, _ = network("2-D")
    assert list(adapted_layers(lora_edge.adapt(copy.deepcopy(model), 2, targets="stem"))) == ["stem"]
    assert list(adapted_layers(lora_edge.adapt(copy.deepcopy(model), 2, targets=["st*", "depthwise"]))) == ["stem", "depthwise"]
    assert list(adapted_layers(lora_edge.adapt(copy.deepcopy(model), 2, exclude="st*"))) == ["twice", "depthwise"]
    assert list(adapted_layers(lora_edge.adapt(copy.deepcopy(model), 2, targets="*", exclude=["twice"]))) == [
        "stem",
        "depthwise",
    ]


def test_shared_module_is_adapted_once_and_keeps_both_names():
    model, x = network("2-D")
    keys = set(model.state_dict())
    lora_edge.adapt(model, 2)
    assert model.twice is model.again
    assert set(model.state_dict()) - keys == {
        f"{name}.{new}" for name in ("stem", "twice", "again", "depthwise") for new in ("core", "suffix")
    }
    train(model, x, list(lora_edge.trainable_parameters(model)))
    assert set(lora_edge.merge(model).state_dict()) == keys


def test_layers_that_share_a_weight_share_it_after_merge_too():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1))
    model[2].weight = model[0].weight
    x = torch.randn(2, 4, 9)
    lora_edge.adapt(model, 2)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = output(model, x)
    torch.testing.assert_close(output(lora_edge.merge(model), x), y)
    assert model[2].weight is model[0].weight


def test_a_convolution_as_the_whole_model():
    conv = nn.Conv1d(4, 6, 3)
    x = torch.randn(2, 4, 9)
    want = conv(x).detach()
    assert torch.equal(lora_edge.adapt(conv, 2)(x), want)
    assert type(lora_edge.merge(conv)) is nn.Conv1d


def test_subclasses_and_computed_weights_are_left_alone_and_named():
    class Mine(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Mine(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    lora_edge.adapt(model, 2)
    assert list(adapted_layers(model)) == ["0"]
    assert list(lora_edge.summary(model).left_alone) == ["1", "2", "3", "4"]
    assert "1: Mine is not exactly nn.Conv1d, nn.Conv2d or nn.Conv3d, left alone" in str(lora_edge.summary(model))


def test_hooks_survive_adapt_and_merge():
    model, x = network("2-D")
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append("stem"))
    lora_edge.adapt(model, 2)(x)
    lora_edge.merge(model)(x)
    assert calls == ["stem", "stem"]


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_pickle_and_state_dict(name):
    model, x = network(name)
    base = copy.deepcopy(model)
    lora_edge.adapt(model, 2, train_head=True)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = output(model.eval(), x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x), y)
        with lora_edge.disabled(twin):
            assert torch.equal(output(twin, x), output(base, x))
        assert_near(output(lora_edge.merge(twin), x), y, layers=4, terms=80)
    fresh = lora_edge.adapt(copy.deepcopy(base), 2)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, x), y)


def test_summary_shows_route_and_bytes_as_measured():
    model, x = network("1-D")
    lora_edge.adapt(model, 2)
    rows = lora_edge.summary(model, x).layers
    assert [(r.name, r.route, r.saved_bytes) for r in rows] == [
        ("0", "factor", 4 * 2 * 50 * 4),
        ("3", "factor", 4 * 2 * 25 * 4),
    ]
    assert [r.route for r in lora_edge.summary(model).layers] == [None, None]
    for layer, row in zip(adapted_layers(model).values(), rows, strict=True):
        shape = {"0": (4, 6, 50), "3": (4, 16, 50)}[row.name]
        assert saved_bytes(layer, torch.randn(shape)) == row.saved_bytes


def test_the_dense_route_is_chosen_where_it_saves_fewer_bytes():
    model = nn.Sequential(nn.Conv2d(2, 32, 3, padding=1))
    x = torch.randn(2, 2, 8, 8)
    lora_edge.adapt(model, 8)
    (row,) = lora_edge.summary(model, x).layers
    assert row.route == "dense"
    assert saved_bytes(model, x) == row.saved_bytes == x.numel() * 4


def test_calibrate_bn():
    model, x = network("1-D")
    base = copy.deepcopy(model)
    shifted = [3 * torch.randn(32, 6, 50) + 1 for _ in range(3)]
    lora_edge.calibrate_bn(model, shifted)
    inputs = torch.cat([base[0](batch) for batch in shifted]).detach()
    torch.testing.assert_close(model[1].running_mean, inputs.mean(dim=(0, 2)), rtol=1e-4, atol=1e-4)
    assert model[1].momentum == 0.1
    assert not model.training
    calibrated = output(model, x)
    lora_edge.adapt(model, 2)
    assert torch.equal(output(model, x), calibrated)
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x)), "the base model's own statistics"
    lora_edge.calibrate_bn(model, [(batch, None) for batch in shifted])  # on an adapted model, batches with labels
    assert torch.equal(output(model, x), calibrated)
    torch.testing.assert_close(output(lora_edge.merge(model), x), calibrated)


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "batches is empty"),
        ([torch.full((4, 6, 50), float("nan"))], "NaN or Inf"),
        ([torch.randn(4, 5, 50)], "channels"),
    ],
)
def test_calibrate_bn_on_bad_batches(batches, text):
    model, _ = network("1-D")
    model.train()
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=text):
        lora_edge.calibrate_bn(model, batches)
    assert_same(before, snapshot(model))


def test_calibrate_bn_between_source_and_target():
    """The base model's statistics are weighed against the samples of all batches: repeatedly, and after adapt."""
    model, _ = network("1-D")
    base, x = copy.deepcopy(model), 3 * torch.randn(32, 6, 50) + 1
    target = lora_edge.calibrate_bn(copy.deepcopy(model), [x])
    for samples, share in ((96, 0.75), (32, 0.5), (0, 0.0)):
        lora_edge.calibrate_bn(model, [(x, None)], source_samples=samples)
        if samples == 32:
            lora_edge.adapt(model, 2)
        for name, norm in batch_norms(model):
            for statistic in ("running_mean", "running_var"):
                source, new = (getattr(other.get_submodule(name), statistic) for other in (base, target))
                torch.testing.assert_close(getattr(norm, statistic), share * source + (1 - share) * new, msg=f"{name} {share}")
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))


@pytest.mark.parametrize(
    ("samples", "error"),
    [(-1, ValueError), (float("inf"), ValueError), (float("nan"), ValueError), (True, TypeError), ("some", TypeError)],
)
def test_calibrate_bn_on_bad_source_samples(samples, error):
    model, x = network("1-D")
    before = snapshot(model)
    with pytest.raises(error, match=r"source_samples is .*; give a finite number of 0 or more") as caught:
        lora_edge.calibrate_bn(model, [x], source_samples=samples)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


def test_calibrate_bn_without_bn():
    with pytest.raises(ValueError, match="no BatchNorm with running statistics"):
        lora_edge.calibrate_bn(nn.Conv1d(2, 2, 1), [torch.randn(1, 2, 3)])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rank": 0}, ValueError, "rank is 0; give an integer of at least 1"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"rank": 2.0}, TypeError, "rank is 2.0, a float"),
        ({"rank": True}, TypeError, "rank is True, a bool"),
        ({"targets": ["stam"]}, ValueError, "targets: 'stam' matches no convolution; the closest are 'stem'"),
        ({"targets": ["stem", "bn*"]}, ValueError, r"'bn\*' matches no convolution"),
        ({"targets": []}, ValueError, "targets is empty"),
        ({"exclude": ["nope"]}, ValueError, "exclude: 'nope' matches no convolution"),
        ({"exclude": "*"}, ValueError, "leaves no convolution"),
        ({"scaling": "none"}, ValueError, "scaling is 'none'; give one of 'balanced', 'paper'"),
        ({"bn": "eval"}, ValueError, "bn is 'eval'; give one of 'frozen', 'batch'"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, error, text):
    model, _ = network("2-D")
    before = snapshot(model)
    with pytest.raises(error, match=text) as caught:
        lora_edge.adapt(model, **arguments)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


def test_nan_weight_is_named_and_nothing_changes():
    model, _ = network("1-D")
    with torch.no_grad():
        model[3].weight[0, 0, 0] = float("nan")
    types = [type(m) for m in model.children()]
    with pytest.raises(ValueError, match=r"^3: the weight holds NaN or Inf"):
        lora_edge.adapt(model, 2)
    assert [type(m) for m in model.children()] == types


def test_models_that_cannot_be_adapted():
    with pytest.raises(ValueError, match=r"no nn.Conv1d, nn.Conv2d or nn.Conv3d"):
        lora_edge.adapt(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="model is a dict"):
        lora_edge.adapt({})
    with pytest.raises(ValueError, match=r"no nn.Linear"):
        lora_edge.adapt(nn.Sequential(nn.Conv1d(3, 3, 3)), train_head=True)
    with pytest.raises(ValueError, match="complex64 is not supported"):
        lora_edge.adapt(nn.Conv1d(3, 3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="meta device"):
        lora_edge.adapt(nn.Conv1d(3, 3, 3, device="meta"))


def test_adapting_twice_and_merging_without_adapting_are_refused():
    model, _ = network("1-D")
    for function in (lora_edge.merge, lora_edge.trainable_parameters, lora_edge.summary):
        with pytest.raises(RuntimeError, match="the model is not adapted"):
            function(model)
    with pytest.raises(RuntimeError, match="the model is not adapted"), lora_edge.disabled(model):
        pass
    lora_edge.adapt(model, 2)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the model is already adapted; merge it first"):
        lora_edge.adapt(model, 2)
    assert_same(before, snapshot(model))
    lora_edge.merge(model)
    with pytest.raises(RuntimeError, match="the model is not adapted"):
        lora_edge.merge(model)
    lora_edge.adapt(model, 2)  # and again from the start


def test_disabled_ends_after_an_error():
    model, x = network("1-D")
    lora_edge.adapt(model, 2, train_head=True)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = output(model.eval(), x)
    with pytest.raises(KeyError), lora_edge.disabled(model), lora_edge.disabled(model):
        raise KeyError
    assert torch.equal(output(model, x), y)


class TestBaseCheckpoint:
    """Load a base checkpoint into an adapted model."""

    def test_same_base_keeps_everything(self):
        model, x = network("2-D")
        base = copy.deepcopy(model.state_dict())
        lora_edge.adapt(model, 2)
        train(model, x, list(lora_edge.trainable_parameters(model)))
        y = output(model.eval(), x)
        model.load_state_dict(base)
        assert torch.equal(output(model, x), y)

    def test_another_base_renews_the_suffix_while_the_core_is_zero(self):
        model, x = network("2-D")
        other, _ = network("2-D", seed=1)
        lora_edge.adapt(model, 2)
        model.load_state_dict(other.state_dict())
        assert torch.equal(output(model, x), output(other, x))
        want = lora_edge.adapt(copy.deepcopy(other), 2)
        for mine, theirs in zip(model.parameters(), want.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    def test_another_base_is_an_error_once_the_core_is_trained(self):
        model, x = network("2-D")
        other, _ = network("2-D", seed=1)
        lora_edge.adapt(model, 2)
        train(model, x, list(lora_edge.trainable_parameters(model)))
        weight = model.stem.weight.clone()
        with pytest.raises(RuntimeError, match=r"stem\.weight is another base weight, but stem\.core is already trained"):
            model.load_state_dict(other.state_dict())
        assert torch.equal(model.stem.weight, weight)

    def test_half_an_adapter_is_a_missing_key(self):
        model, _ = network("1-D")
        lora_edge.adapt(model, 2)
        state = model.state_dict()
        del state["0.core"]
        with pytest.raises(RuntimeError, match=r"Missing key.*0\.core"):
            model.load_state_dict(state)


def test_drop_in_layers_from_scratch():
    model = nn.Sequential(LoRAEdgeConv1d(4, 8, 3, padding=1, rank=2), nn.ReLU(), LoRAEdgeConv1d(8, 2, 1, rank=1))
    stock = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 1))
    x = torch.randn(2, 4, 9)
    model.load_state_dict(stock.state_dict())  # a base checkpoint
    assert torch.equal(model(x), stock(x))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.core", "2.core"]
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = model(x)
    lora_edge.merge(model)
    torch.testing.assert_close(model(x), y)
    assert type(model[0]) is nn.Conv1d
    assert all(p.requires_grad for p in model.parameters())


def test_from_conv_leaves_the_convolution_alone():
    conv = nn.Conv2d(3, 8, 3)
    layer = LoRAEdgeConv2d.from_conv(conv, rank=2)
    assert type(conv) is nn.Conv2d
    assert conv.weight.requires_grad
    assert layer.rank == 2
    assert "rank=2" in repr(layer)
    suffix = torch.randn(3, 3, 3, 3)
    assert torch.equal(LoRAEdgeConv2d.from_conv(conv, suffix=suffix).suffix, suffix)
    with pytest.raises(ValueError, match=r"suffix has shape \(3, 3, 3, 2\); for a weight \(8, 3, 3, 3\) give \(r1, 3, 3, 3\)"):
        LoRAEdgeConv2d.from_conv(conv, suffix=suffix[..., :2])
    with pytest.raises(ValueError, match=r"suffix has 9 rows; for a weight .* give 1 to 8"):
        LoRAEdgeConv2d.from_conv(conv, suffix=torch.randn(9, 3, 3, 3))
    with pytest.raises(TypeError, match=r"got a Conv1d; give an nn.Conv2d"):
        LoRAEdgeConv2d.from_conv(nn.Conv1d(3, 3, 3))
    with pytest.raises(TypeError, match="rank is True"):
        LoRAEdgeConv2d(3, 8, 3, rank=True)


def test_every_drop_in_layer_is_a_stock_convolution_to_isinstance():
    assert issubclass(LoRAEdgeConv1d, nn.Conv1d)
    assert issubclass(LoRAEdgeConv2d, LoRAEdgeConv)
    assert isinstance(lora_edge.adapt(Residual(), 2).stem, nn.Conv2d)


def test_inference_follows_every_change_of_the_layer():
    """The fused kernel is cached between forwards without gradients, and is never stale, pickled or copied."""
    layer = lora_edge.LoRAEdgeConv2d(3, 8, 3, rank=2, padding=1)
    x = torch.randn(2, 3, 6, 5)

    def check(layer):
        with torch.no_grad():
            y, fused = layer(x), layer.weight + layer.scale * (layer.core @ layer.suffix.flatten(1)).view_as(layer.weight)
            want = nn.functional.conv2d(x, fused, layer.bias, padding=1)
            update = (layer.core.abs() @ layer.suffix.abs().flatten(1)).view_as(layer.weight)
            size = nn.functional.conv2d(x.abs(), layer.weight.abs() + layer.scale * update, layer.bias.abs(), padding=1)
            assert bool(((y - want).abs() <= 31 * torch.finfo(y.dtype).eps * size).all())  # 27 terms, a bias, 3 of fusing

    check(layer)
    layer.core.data.normal_()
    check(layer)
    check(layer)
    for tensor in (layer.core, layer.weight, layer.suffix):
        with torch.no_grad():
            tensor.mul_(1.5)
        check(layer)
    layer.scale = 0.5
    check(layer)
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    check(layer)
    layer._parameters["weight"] = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    check(layer)
    assert len(pickle.dumps(layer)) < 1.2 * len(pickle.dumps(copy.deepcopy(layer).train()))
    check(copy.deepcopy(layer))
    with torch.inference_mode():
        inferred = layer(x)
    check(layer)
    assert torch.equal(layer(x).detach(), inferred.clone())
