"""A branch beside a convolution: as a weight where it is one, as kernels per sample where it is not, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import CONVS, LABELS, WEIGHTS, assert_same
from helpers.networks import network, output, train
from lora_edge.methods.base import jointly
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.nn.branch import Branch, Product, add_branch, branches, fold_branches
from lora_edge.nn.reparametrised import reparametrise
from lora_edge.tools import deltas, low_rank


class Loudness(Branch):
    """Each component counts by how loud the sample is in it."""

    def gate(self, h, x):
        return h * self.weights(h)

    def weights(self, h):
        return h.flatten(3).abs().mean(dim=3).softmax(dim=2).view(*h.shape[:3], *[1] * (h.dim() - 3))

    def static(self, inputs):
        return Product(self.scaling * self.lora_B, self.lora_A / len(self.lora_A))


def of(kind):
    return jointly(lambda model, convs, rank, inputs, labels: {name: kind(conv, rank) for name, conv in convs.items()})


CASES = {
    **{name: make for name, (make, _) in CONVS.items()},
    **WEIGHTS,
    "same": lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", groups=2),
}


def pair(make, kind=Branch):
    """A frozen convolution with a branch, one reparametrised by conv LoRA of the same factors, and an input."""
    torch.manual_seed(0)
    conv = make().requires_grad_(False)
    other, branch = copy.deepcopy(conv), kind(conv, 2, scaling=0.7)
    with torch.no_grad():
        branch.lora_B.normal_()
    lora = ConvLoRA(other, 2, alpha=1.4)
    lora.load_state_dict(branch.state_dict())
    add_branch(conv, branch)
    reparametrise(other, lora)
    return conv, branch, other, lora, torch.randn(3, conv.in_channels, *(9,) * (conv.weight.dim() - 2))


@pytest.mark.parametrize("name", list(CASES))
def test_without_a_gate_it_is_conv_lora(name):
    conv, branch, other, lora, x = pair(CASES[name])
    assert_same(conv, other, x, [(branch.lora_A, lora.lora_A), (branch.lora_B, lora.lora_B)])
    torch.testing.assert_close(conv(x[0]), other(x[0]), rtol=1e-4, atol=1e-5)
    assert conv(x[:0]).shape == other(x[:0]).shape


@pytest.mark.parametrize("name", ["1-D", "2-D", "groups", "depthwise"])
def test_a_gate_is_a_kernel_per_sample(name):
    conv, branch, _, _, x = pair(CASES[name], Loudness)
    conv, x = conv.double(), x.double()
    got, seen = conv(x), []
    branch.gate = lambda h, x: seen.append(branch.weights(h)) or h
    conv(x)
    plain = copy.deepcopy(conv)
    del plain._modules["branch"]
    plain._forward_hooks.clear()
    for sample in range(len(x)):
        with torch.no_grad():
            plain.weight.copy_(conv.weight)
            grouped = plain.weight.unflatten(0, (conv.groups, -1))
            for group, b in enumerate(branch.lora_B.unflatten(0, (conv.groups, -1))):
                update = (b * seen[0][sample, group].flatten()) @ branch.lora_A.flatten(1)
                grouped[group] += 0.7 * update.view(grouped[group].shape)
        torch.testing.assert_close(got[sample : sample + 1], plain(x[sample : sample + 1]))


def test_a_model_of_branches_is_disabled_copied_saved_and_folded(tmp_path):
    base, x = network("2-D")
    model = copy.deepcopy(base)
    parameters = of(Loudness)(model, 2, x, LABELS[:4])
    assert torch.equal(output(model.eval(), x), output(base, x))
    train(model, x, parameters)
    want = output(model.eval(), x)
    assert not torch.allclose(want, output(base, x))
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    assert lora_edge.summary(model).trainable == sum(p.numel() for p in parameters)
    assert lora_edge.summary(model).parameters == sum(p.numel() for p in base.parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, x), want)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    save_trained(model, tmp_path / "branches")
    fresh = copy.deepcopy(base)
    of(Loudness)(fresh, 2, x, LABELS[:4])
    assert torch.equal(output(load_trained(fresh, tmp_path / "branches").eval(), x), want)
    with pytest.raises(RuntimeError, match="merge: stem has a branch that depends on the input"):
        lora_edge.merge(model)
    for tool in (deltas, low_rank):
        with pytest.raises(ValueError, match="stem has a branch"):
            tool(model)
    assert torch.equal(output(model, x), want)
    assert fold_branches(model, x) is model
    assert branches(model) == {}
    folded = output(model, x)
    assert len(low_rank(model)) == len(deltas(model)) == 3
    torch.testing.assert_close(output(lora_edge.merge(model), x), folded, rtol=1e-4, atol=1e-4)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())


def test_a_branch_without_a_static_form_is_not_folded():
    base, x = network("1-D")
    of(Branch)(base, 2, x, LABELS[:4])
    with pytest.raises(ValueError, match="fold_branches: 0 has a Branch that no weight comes near"):
        fold_branches(base.eval(), x)
    assert len(branches(base)) == 2
