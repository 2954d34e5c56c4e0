"""NaN and infinities in windows, weights, rates and trained files end a job with the name of what holds them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lora_edge
from helpers.command import adapt_arguments, exit_code, folder  # noqa: F401
from helpers.windows import own
from lora_edge.files.safetensors_file import read_safetensors, write_safetensors
from lora_edge.finite import NotFiniteError
from lora_edge.har.data import load_npz, split
from lora_edge.har.training import predict, train_source, train_target
from lora_edge.methods import methods
from lora_edge.methods.files import load_trained, save_trained


@pytest.fixture
def task(tmp_path):
    return split(load_npz(own(tmp_path / "task.npz")), 1)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.nan, "window 17 holds NaN or Inf (1 do)"),
        (-np.inf, "window 17 holds NaN or Inf (1 do)"),
        (3e38, "window 17 holds 3e+38 in channel 2"),
        (-2e19, "window 17 holds 2e+19 in channel 2"),
    ],
)
def test_one_bad_window(folder, capsys, dtype, value, text):
    x = np.random.default_rng(0).normal(size=(240, 4, 30)).astype(dtype)
    x[17, 2, 3] = value
    own(folder / "own.npz", X=x)
    assert exit_code(adapt_arguments()) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_values_that_overflow_float32(tmp_path):
    x = np.ones((240, 4, 30))
    x[3, 1, 0] = 1e60
    with pytest.raises(ValueError, match=r"window 3 holds 1e\+60 in channel 1"):
        load_npz(own(tmp_path / "own.npz", X=x))


def test_a_channel_that_is_constant_in_the_source(tmp_path):
    x = np.random.default_rng(0).normal(size=(240, 4, 30))
    x[120:, 1] = 1e-30 * x[120:, 1]
    with pytest.raises(ValueError, match=r"holds .* in channel 1 after division by the source's deviation"):
        split(load_npz(own(tmp_path / "own.npz", X=x)), 1)


@pytest.mark.parametrize("rate", ["inf", "nan", "-inf", "0", "1e-400"])
def test_rates_of_the_command_line(folder, capsys, rate):
    assert exit_code(adapt_arguments(**{"--lr": rate})) == 2
    error = capsys.readouterr().err
    assert "give a number above 0" in error or "expected one argument" in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), 0.0, -1.0])
def test_rates_of_the_loops(task, rate):
    model = net()
    for train in (
        lambda: train_source(model, task.source, epochs=1, lr=rate),
        lambda: train_target(model, list(model.parameters()), task.adapt, task.test, steps=1, lr=rate),
    ):
        with pytest.raises(ValueError, match=r"the learning rate is .*; give a number above 0, at most"):
            train()


def _nan_in_the_head(state):
    state["5.weight"][1, 2] = float("nan")


def _infinite_kernel(state):
    state["0.weight"][0, 0, 0] = float("inf")


def _negative_variance(state):
    state["1.running_var"][3] = -0.25


def _nan_in_the_mean(state):
    state["1.running_mean"][0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_nan_in_the_head, r"w.pt: 5.weight holds NaN or infinity (1 of 24 values)"),
        (_infinite_kernel, r"w.pt: 0.weight holds NaN or infinity (1 of 160 values)"),
        (_negative_variance, "w.pt: 1.running_var holds a negative variance (-0.25)"),
        (_nan_in_the_mean, "w.pt: 1.running_mean holds NaN"),
    ],
)
def test_spoilt_weights(folder, capsys, spoil, text):
    state = net().state_dict()
    spoil(state)
    torch.save(state, "w.pt")
    assert exit_code(adapt_arguments(**{"--weights": "w.pt"})) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("out").exists() or os.listdir("out") == []


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_training_that_diverges_says_where(task, steps):
    """A rate at which the weights overflow: seen by the next loss, by the windows that are looked at, or at the end."""
    text = r"step \d of training: .*|the model returns NaN for \d+ of \d+ windows"
    for train in (
        lambda model: train_target(model, list(model.parameters()), task.adapt, task.test, steps=steps, lr=1e30),
        lambda model: train_source(model, task.source, epochs=steps + 1, lr=1e30),
    ):
        with pytest.raises(NotFiniteError, match=text):
            train(net())


def test_a_gradient_that_is_not_finite_is_noticed_at_the_end(task):
    """The loss of the last step is finite, but its gradient is not."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    class Net(nn.Sequential):
        def forward(self, x):
            return Spoil.apply(super().forward(x)) if self.training else super().forward(x)

    for train in (
        lambda model: train_source(model, task.source, epochs=1),
        lambda model: train_target(model, list(model.parameters()), task.adapt, task.test, steps=1, lr=1e-3, evaluate_every=9),
    ):
        with pytest.raises(NotFiniteError, match=r"after step 1 of training: 0\.weight holds NaN|the model returns NaN"):
            train(Net(*net()))


def test_a_bad_window_trains_nothing(task):
    """The loss is not finite, and the weights stay as they were."""
    task.adapt.x[2, 1, 5] = np.nan
    model = net()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(NotFiniteError, match=r"step 1 of training: the loss is nan: the batch holds NaN or infinity"):
        train_target(model.eval(), list(model.parameters()), task.adapt, task.source, steps=3, lr=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_prediction_of_nan_is_refused():
    model, x = net(), torch.randn(5, 4, 30)
    x[3] = float("nan")
    with pytest.raises(NotFiniteError, match="the model returns NaN for 1 of 5 windows, first for window 3"):
        predict(model, x)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("bn_only", "1.weight"), ("lora_edge", "0.core"), ("conv_lora", "lora_B"), ("full", "5.bias"), ("dora", "magnitude")],
)
def test_trained_files(tmp_path, name, tensor):
    x, y = torch.randn(8, 4, 30), torch.arange(8) % 3
    model, other = net(), None
    other = net()
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        torch.manual_seed(0)
        methods()[name].prepare(each, 2, x, y)
    path = tmp_path / "t.safetensors"
    save_trained(model, path)
    good, metadata = read_safetensors(path)
    key = next(k for k in good if tensor in k)
    with torch.no_grad():
        next(p for n, p in model.state_dict(keep_vars=True).items() if n == key).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=rf"t.safetensors: .*{tensor} holds NaN or infinity .*train again"):
        save_trained(model, path)
    assert read_safetensors(path)[1] == metadata
    from lora_edge.surgery.base_state import fingerprint_state

    good[key].view(-1)[0] = float("inf")
    write_safetensors(good, path, {**metadata, "checksum": fingerprint_state(good)})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{tensor} holds NaN or infinity"):
        load_trained(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_a_negative_variance_is_not_saved(tmp_path):
    model = net()
    methods()["bn_only"].prepare(model, 2, torch.randn(8, 4, 30), torch.arange(8) % 3)
    model[1].running_var[2] = -1
    with pytest.raises(ValueError, match=r"1.running_var holds a negative variance"):
        save_trained(model, tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


def test_finite_training_is_left_alone(task):
    model = lora_edge.adapt(net(), 2)
    train_target(model, list(lora_edge.trainable_parameters(model)), task.adapt, task.test, steps=3, lr=1e-2)
