"""The frozen part: buffers that change are saved and restored, others are refused by name, and disabled gives the base."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lora_edge
from helpers.networks import network, output, train
from helpers.snapshots import assert_same, snapshot
from lora_edge.adapter_format import merge_state, read_adapter

X = (6, 3, 20)


class Counts(nn.Module):
    """Counts its calls, keeps a running mean of its own, a memory bank and a buffer that is made later."""

    def __init__(self, bank: int = 4) -> None:
        super().__init__()
        self.c = nn.Conv1d(3, 4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("bank", torch.zeros(bank, 4))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.mean.lerp_(x.detach().mean((0, 2)), 0.1)
            self.late = x.detach().amax()
        y = self.c(x - self.mean[:, None])
        if self.training:
            self.bank[int(self.seen) % len(self.bank)] = y.detach().mean((0, 2))
        return y + self.bank.mean(0)[:, None]


class Observed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv1d(3, 8, 3), torch.ao.quantization.MovingAveragePerChannelMinMaxObserver(ch_axis=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.c(x))


def conv_then(*rest: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3), *rest, nn.ReLU(), nn.Conv1d(8, 8, 3))


MOVING = {
    "spectral_norm, parametrized": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 8, 3)
    ),
    "spectral_norm, old": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 8, 3)),
    "InstanceNorm with statistics": lambda: conv_then(nn.InstanceNorm1d(8, affine=True, track_running_stats=True)),
    "observer that takes its shape as it runs": Observed,
    "counter, mean, bank and a late buffer": Counts,
    "large bank": lambda: Counts(bank=20_000),
    "BatchNorm in batch mode": lambda: conv_then(nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize("name", list(MOVING))
def test_buffers_that_change_are_saved_and_restored(tmp_path, name):
    base, x = MOVING[name]().eval(), torch.randn(X) + 2
    if "old" in name:
        output(base, x)  # its weight is a plain tensor that the first forward makes
    model = lora_edge.adapt(copy.deepcopy(base), 2, bn="batch")
    train(model, x, list(lora_edge.trainable_parameters(model)))
    model.eval()
    y = output(model, x)
    lora_edge.save_adapter(model, tmp_path / "a")
    loaded = lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()
    own, theirs = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    lora_edge.save_adapter(loaded, tmp_path / "again")
    assert torch.equal(output(loaded, x), y)
    assert read_adapter(tmp_path / "again").tensors.keys() == read_adapter(tmp_path / "a").tensors.keys()
    merged = merge_state(base.state_dict(), read_adapter(tmp_path / "a"), "a")
    if name == "large bank":
        with pytest.raises(RuntimeError, match="bank moved since adapt, and its base value is too"), lora_edge.disabled(model):
            pass
    else:
        with lora_edge.disabled(model):
            assert torch.equal(output(model, x), output(base, x))
    assert torch.equal(output(model, x), y), "what moved is there again"
    lora_edge.merge(model)
    torch.testing.assert_close(output(model, x), y)
    for key, value in model.state_dict().items():
        if key.startswith("o."):
            continue  # an observer moves in evaluation too
        torch.testing.assert_close(merged[key], value, msg=key)


def test_what_runs_inside_disabled_leaves_no_trace():
    model = lora_edge.adapt(Counts(), 2, lean=False).train()
    with lora_edge.disabled(model):
        model(torch.randn(X))
    assert int(model.seen) == 0
    assert not model.mean.any()
    assert model.late is None


def test_another_adapter_replaces_what_the_first_one_changed(tmp_path):
    base, x = Counts().eval(), torch.randn(X)
    lora_edge.save_adapter(lora_edge.adapt(copy.deepcopy(base), 2), tmp_path / "fresh")
    model = lora_edge.adapt(copy.deepcopy(base), 2)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.load_adapter(model, tmp_path / "fresh")
    assert torch.equal(output(model.eval(), x), output(base, x))
    assert int(model.seen) == 0


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h1, self.h2 = nn.Conv1d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8)
        self.h2.weight = self.h1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.h2(self.h1(self.a(x).mean(-1)))


def test_a_trained_head_whose_weight_has_a_second_name(tmp_path):
    base, x = TiedHead(), torch.randn(X)
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head=True)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert torch.equal(adapter.changed()["h1.weight"], adapter.changed()["h2.weight"])
    assert torch.equal(output(lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a"), x), output(model, x))
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))


def new_head(model: nn.Module, classes: int) -> nn.Module:
    model[6] = nn.Linear(8, classes)
    return model


def test_a_fresh_head_put_in_after_adapt(tmp_path):
    base, x = network("1-D")
    model = new_head(lora_edge.adapt(copy.deepcopy(base), 2), 5)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model.eval(), tmp_path / "a")
    y = output(model, x)
    with pytest.raises(RuntimeError, match=r"6\.weight was added or trained since adapt"), lora_edge.disabled(model):
        pass
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"6\.(weight|bias) has shape \(5,.*, in this model it has shape \(3,"):
        lora_edge.load_adapter(base, tmp_path / "a")
    assert_same(before, snapshot(base))
    loaded = lora_edge.load_adapter(new_head(copy.deepcopy(base), 5), tmp_path / "a").eval()
    assert torch.equal(output(loaded, x), y)
    lora_edge.save_adapter(loaded, tmp_path / "b")
    again = lora_edge.load_adapter(new_head(copy.deepcopy(base), 5), tmp_path / "b").eval()
    assert torch.equal(output(again, x), y)
    fresh = new_head(copy.deepcopy(base), 5)
    fresh.load_state_dict(merge_state(base.state_dict(), read_adapter(tmp_path / "a"), "a"))
    torch.testing.assert_close(output(fresh.eval(), x), y)


def test_batch_norm_affine_unfrozen_by_hand(tmp_path):
    base, x = network("2-D")
    model = lora_edge.adapt(copy.deepcopy(base), 2)
    for parameter in (model.bn.weight, model.bn.bias):
        parameter.requires_grad_(True)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model.eval(), tmp_path / "a")
    assert set(read_adapter(tmp_path / "a").changed()) == {"bn.weight", "bn.bias"}
    assert torch.equal(output(lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a").eval(), x), output(model, x))
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))


class Ema(nn.Module):
    """timm's ModelEmaV2: its mean is not exact, so frozen weights change by rounding and batch counters by one."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for ema, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            ema.copy_(self.decay * ema + (1.0 - self.decay) * value)


@pytest.mark.parametrize("kind", ["averaged", "ema_multi_avg", "timm"])
def test_an_average_of_the_weights_is_saved(tmp_path, kind):
    from torch.optim import swa_utils

    base, x = network("2-D")
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head=True)
    if kind == "timm":
        averaged = Ema(model, 0.9)
        update = averaged.update
    else:
        how = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)} if kind == "ema_multi_avg" else {}
        averaged = swa_utils.AveragedModel(model, use_buffers=True, **how)
        update = averaged.update_parameters
    parameters = list(lora_edge.trainable_parameters(model))
    for _ in range(30):
        train(model, x, parameters, steps=1)
        update(model)
    if kind == "timm":
        with pytest.warns(UserWarning, match=r"frozen tensors, such as .*, moved by rounding"):
            lora_edge.save_adapter(averaged, tmp_path / "a")
    else:
        lora_edge.save_adapter(averaged, tmp_path / "a")
    loaded = lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(output(loaded.eval(), x), output(averaged.module.eval(), x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m[6].weight.data.add_(1e-3), r"6\.weight has other values"),
        (lambda m: m[6].weight.data[0].copy_(m[6].weight.data[1].clone()), r"6\.weight has other values"),
        (lambda m: m[0].weight.data.flatten()[:2].copy_(m[0].weight.data.flatten()[:2].flip(0)), r"0\.weight has other values"),
        (lambda m: m.half(), r"0\.weight was torch\.float32 \(16, 6, 8\) and is torch\.float16 \(16, 6, 8\)"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[6]), r"6\.parametrizations\.weight\.original0"),
        (lambda m: m.__setitem__(6, nn.Identity()), r"6\.weight is missing"),
    ],
)
def test_a_frozen_tensor_that_changed_is_named_and_nothing_is_written(tmp_path, change, text):
    model, _ = network("1-D")
    lora_edge.adapt(model, 2)
    change(model)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=text) as caught:
        lora_edge.save_adapter(model, tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_base_with_a_head_and_statistics_in_batch_mode(tmp_path):
    model, x = network("1-D")
    other, _ = network("1-D", seed=1)
    lora_edge.adapt(model, 2, train_head=True, bn="batch").load_state_dict(other.state_dict())
    with lora_edge.disabled(model):
        assert torch.equal(output(model.eval(), x), output(other, x))
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model, tmp_path / "a")
    assert torch.equal(output(lora_edge.load_adapter(other, tmp_path / "a").eval(), x), output(model.eval(), x))


def test_the_state_survives_copies_and_merge_leaves_nothing():
    base, x = Counts().eval(), torch.randn(X)
    model = lora_edge.adapt(copy.deepcopy(base), 2)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with lora_edge.disabled(twin):
            assert torch.equal(output(twin.eval(), x), output(base, x))
        lora_edge.merge(twin)
        twin.load_state_dict(base.state_dict(), strict=False)
        assert not twin._load_state_dict_post_hooks
