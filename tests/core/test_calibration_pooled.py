"""calibrate_bn pools the sums of all samples, so that the size of the batches does not matter; the forms of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lora_edge
from helpers.networks import BUILD, INPUTS, network, output
from helpers.snapshots import assert_same, snapshot

CUTS = [[64, 1], [1] * 65, [13, 52], [7, 0, 58], [33, 32]]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "1" if len(cut) > 9 else str(cut))
@pytest.mark.parametrize("name", list(BUILD))
def test_statistics_do_not_depend_on_the_size_of_the_batches(name, cut, adapted):
    base, _ = network(name)
    scale = torch.linspace(0.5, 4, 65).reshape(-1, *[1] * len(INPUTS[name]))  # the batches differ among each other
    x = (torch.randn(65, *INPUTS[name]) + scale) * scale
    model, whole = copy.deepcopy(base), copy.deepcopy(base)
    if adapted:
        lora_edge.adapt(model, 2)
    lora_edge.calibrate_bn(whole, [x])
    lora_edge.calibrate_bn(model, iter(x.split(cut)))
    for key, want in statistics(whole).items():
        torch.testing.assert_close(model.get_buffer(key), want, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", list(BUILD))
def test_one_batch_gives_what_torch_itself_does(name):
    base, _ = network(name)
    x = 3 * torch.randn(20, *INPUTS[name]) + 1
    model = lora_edge.calibrate_bn(copy.deepcopy(base), [x])
    for module in base.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    output(base.train(), x)
    for key, want in statistics(base).items():
        torch.testing.assert_close(model.get_buffer(key), want, rtol=1e-4, atol=1e-5, msg=key)


def test_a_shared_batch_norm_and_one_that_is_not_reached():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.unused, self.c = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.c(self.shared(input=x)))

    torch.manual_seed(0)
    base, x = Net().eval(), torch.randn(30, 4, 12) * 3
    base.unused.running_mean.fill_(7.0)
    whole = lora_edge.calibrate_bn(copy.deepcopy(base), [x])
    parts = lora_edge.calibrate_bn(copy.deepcopy(base), x.split(7))
    torch.testing.assert_close(whole.shared.running_var, parts.shared.running_var, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole.unused.running_mean, base.unused.running_mean)
    assert not hasattr(whole.unused, "_base_statistics")


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, signal: Tensor, scale: float = 1.0) -> Tensor:
        return self.n(self.c(signal * scale))


class Anything(Named):
    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(inputs["signal"])


X = torch.randn(12, 3, 9)
Y = torch.arange(12)


@pytest.mark.parametrize(
    "batch",
    [
        X, (X,), (X, Y), [X, Y, "meta"], {"signal": X}, {"signal": X, "labels": Y},
        {"labels": Y, "signal": X, "scale": 1.0}, ({"signal": X}, Y),
    ],
    ids=["x", "(x,)", "(x, y)", "[x, y, meta]", "dict", "dict with labels", "dict with a number", "(dict, y)"],
)  # fmt: skip
def test_batches_in_every_usual_form(batch):
    torch.manual_seed(0)
    want, got = Named(), Named()
    got.load_state_dict(want.state_dict())
    lora_edge.calibrate_bn(want, [X])
    lora_edge.calibrate_bn(got, [batch])
    assert torch.equal(want.n.running_mean, got.n.running_mean)
    if isinstance(batch, dict):
        lora_edge.calibrate_bn(Anything(), [batch])


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([{"x": X}], ValueError, "batch 0 is a dict of 'x', of which model.forward accepts no tensor; give x or"),
        ([X, {}], ValueError, "batch 1 is a dict of"),
        ([()], ValueError, "batch 0 is a tuple"),
        ([X, "text"], ValueError, "batch 1 is a str; give x"),
        ([(None, X)], ValueError, "batch 0 is a tuple that starts with a NoneType"),
        ([torch.tensor(1.0)], ValueError, "batch 0 is a Tensor"),
        (3, TypeError, "batches is a int"),
        (iter(()), ValueError, "batches is empty, or its iterator was already used up"),
        ([X[:0]], ValueError, "batches is empty"),
        ([X[:1, :, :3]], ValueError, "n saw one value per channel"),
        ([X[:, :2]], ValueError, "the model does not accept batch 0: .*channels"),
        ([X, X * float("inf")], ValueError, "the statistics of n came out as NaN or Inf"),
    ],
)
def test_odd_batches_are_refused_in_one_line_and_leave_the_model_as_it_was(batches, error, text):
    model = Named().train()
    before = snapshot(model)
    with pytest.raises(error, match=text) as caught:
        lora_edge.calibrate_bn(model, batches)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))
    assert not model.n._forward_pre_hooks
