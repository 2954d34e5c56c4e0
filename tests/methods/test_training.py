"""Training: the training step, what a method may do after it, and parameters that take another's place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.windows import own
from lora_edge.finite import NotFiniteError
from lora_edge.har.data import load_npz, split
from lora_edge.har.models import TResNet
from lora_edge.har.training import train_target
from lora_edge.methods.training import Training, cross_entropy, replace_parameter, training_step

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Recorder(torch.optim.SGD):
    """An optimizer that notes its steps."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, calls: list) -> None:
        super().__init__(parameters, lr)
        self.calls = calls

    def step(self, closure=None):
        self.calls.append("optimizer")
        return super().step(closure)


def linear() -> tuple[nn.Linear, list[nn.Parameter]]:
    model = nn.Linear(4, 3)
    return model, list(model.parameters())


def test_after_step_follows_the_optimizer_while_the_gradients_are_there():
    """The loss, the optimizer, ``after_step``; it sees the new values, the step's gradients, and the step's number."""
    model, parameters = linear()
    calls, start = [], model.weight.detach().clone()

    def loss(model, x, y):
        calls.append("loss")
        return cross_entropy(model, x, y)

    def after_step(step, steps):
        torch.testing.assert_close(model.weight, start - 0.5 * model.weight.grad)
        start.copy_(model.weight.detach())
        calls.append((step, steps))

    training = Training(parameters, loss, lambda p, lr: Recorder(p, lr, calls), after_step)
    optimizer = training.optimizer(training.parameters, 0.5)
    for step in (1, 2, 3):
        before = None if model.weight.grad is None else model.weight.grad.clone()
        training_step(model, training, optimizer, X, Y, step, 3)
        assert before is None or not torch.equal(model.weight.grad, before)  # no sum with the gradient of the last step
    assert calls == ["loss", "optimizer", (1, 3), "loss", "optimizer", (2, 3), "loss", "optimizer", (3, 3)]


def test_without_any_option_it_is_adam_on_the_cross_entropy():
    model, parameters = linear()
    twin, theirs = linear()
    twin.load_state_dict(model.state_dict())
    training = Training(parameters)
    optimizer, adam = training.optimizer(training.parameters, 1e-2), torch.optim.Adam(theirs, 1e-2)
    for _ in range(3):
        training_step(model, training, optimizer, X, Y)
        adam.zero_grad()
        F.cross_entropy(twin(X), Y).backward()
        adam.step()
    assert torch.equal(model.weight, twin.weight)
    assert training.count == 15


def test_soft_labels_are_labels():
    model, _ = linear()
    torch.testing.assert_close(cross_entropy(model, X, F.one_hot(Y, 3).float()), cross_entropy(model, X, Y))


def test_a_loss_that_is_not_finite_reaches_neither_the_optimizer_nor_after_step():
    model, parameters = linear()
    calls, before = [], model.weight.detach().clone()
    training = Training(
        parameters,
        lambda model, x, y: math.nan * cross_entropy(model, x, y),
        lambda p, lr: Recorder(p, lr, calls),
        lambda step, steps: calls.append(step),
    )
    with pytest.raises(NotFiniteError, match="step 4 of training: the loss is nan") as caught:
        training_step(model, training, training.optimizer(parameters, 0.1), X, Y, 4, 9)
    assert "\n" not in str(caught.value)
    assert calls == []
    assert torch.equal(model.weight, before)


def test_training_on_the_target_counts_the_steps_for_after_step(tmp_path):
    task = split(load_npz(own(tmp_path / "own.npz")), 1)
    model = TResNet(4, 3)
    seen = []
    training = Training(list(model.parameters()), after_step=lambda step, steps: seen.append((step, steps)))
    train_target(model, training, task.adapt, task.test, steps=3, lr=1e-3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_replaced_parameter_trains_from_fresh_state_and_the_others_keep_theirs():
    """As a swap in ``after_step`` does it: the group and its rate stay, Adam's moments of the old one go."""
    model, (weight, bias) = linear()
    optimizer = torch.optim.Adam([{"params": [bias], "lr": 0.1}, {"params": [weight], "lr": 0.01}])
    new = nn.Parameter(torch.zeros(3, 4))

    def swap(step, steps):
        if step == 2:
            model.weight = new
            replace_parameter(optimizer, weight, new)

    training = Training([weight, bias], after_step=swap)
    for step in (1, 2):
        training_step(model, training, optimizer, X, Y, step, 3)
    old = weight.detach().clone()
    assert [group["params"] for group in optimizer.param_groups] == [[bias], [new]]
    assert weight not in optimizer.state
    assert new not in optimizer.state
    assert optimizer.state[bias]["step"] == 2
    training_step(model, training, optimizer, X, Y, 3, 3)
    assert torch.equal(weight, old)
    assert optimizer.state[new]["step"] == 1
    assert optimizer.state[bias]["step"] == 3
    torch.testing.assert_close(new.abs(), torch.full((3, 4), 0.01), rtol=1e-4, atol=0)  # Adam's first step, at the group's rate


def test_kept_moments_would_be_those_of_another_parameter():
    """The mutant: with the old state, the first step is not the new parameter's own."""
    steps = []
    for keeps in (False, True):
        old, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.Adam([old], lr=0.1)
        old.grad = torch.tensor([5.0, -5.0])
        optimizer.step()
        state = optimizer.state[old]
        replace_parameter(optimizer, old, new)
        if keeps:
            optimizer.state[new] = state
        new.grad = torch.tensor([-1.0, 1.0])
        optimizer.step()
        steps.append(new.detach())
    torch.testing.assert_close(steps[0], torch.tensor([0.1, -0.1]))
    assert not torch.allclose(steps[1], steps[0], atol=0.05)


def test_before_the_first_step_there_is_no_state_to_drop():
    _, (weight, bias) = linear()
    optimizer = torch.optim.Adam([weight, bias])
    new = nn.Parameter(torch.ones(5))
    replace_parameter(optimizer, weight, new)
    assert optimizer.param_groups[0]["params"][0] is new
    assert optimizer.param_groups[0]["params"][1] is bias


def test_replacing_a_parameter_that_is_not_trained_is_refused():
    _, (weight, bias) = linear()
    optimizer = torch.optim.Adam([bias])
    equal = nn.Parameter(bias.detach().clone())  # of the same values, but another
    for stranger, shape in ((weight, r"\(3, 4\)"), (equal, r"\(3,\)")):
        with pytest.raises(ValueError, match=f"does not train this parameter {shape}; give one of its own") as caught:
            replace_parameter(optimizer, stranger, nn.Parameter(torch.ones(1)))
        assert "\n" not in str(caught.value)
    assert optimizer.param_groups[0]["params"] == [bias]
