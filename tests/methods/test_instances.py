"""Methods on models that share tensors, are adapted already or refuse: nothing reaches what it should not, nothing is left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import LABELS, METHODS, NAMES, REPARAMETRISED, begun
from helpers.networks import network, output, train
from lora_edge.methods.base import NotApplicableError
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.methods.packing import load_packed, save_packed
from lora_edge.nn.frozen_bn import FrozenNorm
from lora_edge.surgery.adapted import adapt_state, find_adapted
from lora_edge.surgery.base_state import fingerprint_state
from lora_edge.tools import deltas, low_rank, sparse_deltas, switch, switch_back


class Tied(nn.Module):
    """Convolutions of which two share a weight; S²FT adapts only one of these two, One-for-All as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 4, 3, padding=1)
        self.b = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Conv1d(4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().mean(-1))


def tied():
    torch.manual_seed(0)
    return Tied().eval(), torch.randn(4, 4, 12)


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_merging_leaves_a_shared_weight_to_those_without_the_update(name):
    base, x = tied()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    want = output(model.eval(), x)
    lora_edge.merge(model)
    torch.testing.assert_close(output(model, x), want, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["lora_edge_source_bn", "memflora", "kernel_core"])
def test_a_shared_weight_is_switched_once(name):
    base, x = tied()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    update = sparse_deltas(model)
    assert {"a", "b"} <= update.keys()
    plain = copy.deepcopy(base)
    overwritten = switch(plain, update)
    lora_edge.merge(model)
    assert torch.equal(plain.a.weight, model.a.weight)
    switch_back(plain, overwritten)
    assert fingerprint_state(plain.state_dict()) == fingerprint_state(base.state_dict())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("conv_lora", "a and b share one weight but have different updates; untie them first"),
        ("one_for_all", r"b\.weight is the weight of a, but has no update; untie them first"),
    ],
)
def test_different_updates_of_a_shared_weight_are_not_switched(name, text):
    base, x = tied()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    with pytest.raises(ValueError, match=text):
        switch(plain := copy.deepcopy(base), sparse_deltas(model))
    assert fingerprint_state(plain.state_dict()) == fingerprint_state(base.state_dict())


@pytest.mark.parametrize("again", NAMES)
@pytest.mark.parametrize("first", ["conv_lora", "lora_edge_source_bn", "one_for_all"])
def test_no_method_begins_on_an_adapted_model(first, again):
    base, x = network("1-D")
    model, _ = begun(base, first, x)
    before = fingerprint_state(model.state_dict())
    trained, kinds = [p.requires_grad for p in model.parameters()], [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="the model is already adapted; merge it first"):
        METHODS[again].begin(model, 2, x, LABELS[: len(x)])
    assert fingerprint_state(model.state_dict()) == before
    assert [p.requires_grad for p in model.parameters()] == trained
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.startswith(("lora_edge", "memflora", "kernel"))))
@pytest.mark.parametrize("wrong", ["rank", "labels", "dead"])
def test_a_refusal_leaves_the_statistics(name, wrong):
    """Of BatchNorm, which most forms move to the target's windows first."""
    base, x = network("1-D")
    labels = LABELS[: len(x)] + 7 * (wrong == "labels")
    if wrong == "dead":  # no gradient
        with torch.no_grad():
            base[-1].weight.zero_()
    rank = 0 if wrong == "rank" else 2
    before, own = fingerprint_state(base.state_dict()), [sorted(vars(module)) for module in base.modules()]
    refused: ValueError | None = None
    try:
        METHODS[name].begin(base, rank, x, labels)
    except ValueError as error:
        refused = error
    assert refused or wrong != "rank"
    if refused:
        assert "\n" not in str(refused)
        assert fingerprint_state(base.state_dict()) == before
        assert [sorted(vars(module)) for module in base.modules()] == own


@pytest.mark.parametrize("first", ["head_only", "bias_only", "full_frozen_bn"])
def test_after_a_baseline_another_method_merges_to_stock_layers(first):
    base, x = network("1-D")
    model, _ = begun(base, first, x)
    METHODS["conv_lora"].begin(model, 2, x, LABELS[: len(x)])
    lora_edge.merge(model.train())
    assert not any(isinstance(module, FrozenNorm) for module in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all(module.training for module in model.modules())


def test_the_base_of_a_trained_projection_is_known():
    base, x = network("1-D")
    model, training = begun(base, "memflora_sg", x)
    train(model, x, training.parameters, steps=1)
    with torch.no_grad():
        training.parameters[0].add_(0.1)
    model.eval()
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    assert deltas(model)


class Counting(nn.Module):
    """Buffers beside BatchNorm's move in training: a counter, and the vectors of a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv1d(6, 4, 3)
        self.fc = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.forwards += 1
        return self.fc(self.conv2(self.conv(x).relu()).relu().mean(-1)) + 0.1 * self.forwards


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("bn_only", "target_only", "s2ft"))])
def test_buffers_that_move_are_saved_and_the_bases_are_known(name, tmp_path):
    torch.manual_seed(0)
    base, x = Counting().eval(), torch.randn(4, 4, 12)
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    assert model.forwards == 3
    want = output(model.eval(), x)
    save_trained(model, tmp_path / "trained")
    fresh, _ = begun(base, name, x)
    assert torch.equal(output(load_trained(fresh, tmp_path / "trained").eval(), x), want)
    if find_adapted(model):
        with lora_edge.disabled(model):
            assert torch.equal(output(model, x), output(base, x))
        assert torch.equal(output(model, x), want)
    if name.startswith("one_bit"):
        with pytest.raises(ValueError, match=r"is trained too, which a packed file does not hold; use save_trained"):
            save_packed(model, tmp_path / "packed")
        model.load_state_dict({key: value for key, value in base.state_dict().items() if "weight" not in key}, strict=False)
        model.fc.load_state_dict(base.fc.state_dict())
        save_packed(model, tmp_path / "packed")
        assert torch.equal(output(load_packed(copy.deepcopy(base), tmp_path / "packed"), x), output(model, x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_the_model_inside_a_wrapper_is_prepared_and_saved(name, wrap, tmp_path):
    base, x = network("1-D")
    model = copy.deepcopy(base)
    wrapped = wrap(model)
    METHODS[name].begin(wrapped, 2, x, LABELS[: len(x)])
    assert [one.model for one in find_adapted(wrapped)] == [model]
    save_trained(wrapped, tmp_path / "trained")
    fresh = load_trained(begun(base, name, x)[0], tmp_path / "trained")
    want = output(model.eval(), x)
    assert torch.equal(output(fresh.eval(), x), want)
    assert lora_edge.merge(wrapped) is wrapped
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert adapt_state(model) is None


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_a_part_of_a_prepared_model_is_not_merged(name):
    base, x = network("1-D")
    model, _ = begun(nn.Sequential(base[:4], base[4:]).eval(), name, x)
    before = fingerprint_state(model.state_dict())
    with pytest.raises(RuntimeError, match="belongs to a larger model that was adapted; give that model"):
        lora_edge.merge(model[0])
    with pytest.raises(RuntimeError, match="belongs to a larger model"), lora_edge.disabled(model[0]):
        pass
    assert fingerprint_state(model.state_dict()) == before
    lora_edge.merge(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_a_prepared_model_is_cast(name, dtype):
    base, x = network("1-D")
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=1)
    model.to(dtype).eval()
    want = output(model, x.to(dtype))
    training.loss(model.train(), x.to(dtype), LABELS[: len(x)]).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in training.parameters)
    lora_edge.merge(model.eval())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(output(model, x.to(dtype)), want)


READS_LABELS = ["lora_ga", "lora_sb", "shira_grad", "shira_snip", "lora_edge_gradient", "lora_edge_budget"]
READS_INPUTS = [*READS_LABELS, "qwha", "qwha_2bit", "full_frozen_bn", "lora_edge", "lora_edge_input"]


@pytest.mark.parametrize("name", READS_LABELS)
@pytest.mark.parametrize(
    "labels",
    [None, LABELS[:4] + 7, LABELS[:4] - 5, LABELS[:4].float(), LABELS[:3]],
    ids=["none", "high", "low", "float", "few"],
)
def test_wrong_labels_are_refused_in_one_line(name, labels):
    base, x = network("1-D")
    before = fingerprint_state(base.state_dict())
    with pytest.raises(ValueError, match=r"^(labels|batches): ") as caught:
        METHODS[name].begin(base, 2, x, labels)
    assert "\n" not in str(caught.value)
    assert fingerprint_state(base.state_dict()) == before


@pytest.mark.parametrize("name", READS_INPUTS)
@pytest.mark.parametrize(
    "wrong", [lambda x: x[:, :2], lambda x: x.long(), lambda x: x[:0]], ids=["channels", "integer", "none"]
)
def test_wrong_windows_are_refused_in_one_line(name, wrong):
    base, x = network("1-D")
    before = fingerprint_state(base.state_dict())
    with pytest.raises(ValueError, match=r"does not accept|no windows|is empty") as caught:
        METHODS[name].begin(base, 2, wrong(x), LABELS[: len(wrong(x))])
    assert "\n" not in str(caught.value)
    assert fingerprint_state(base.state_dict()) == before


@pytest.mark.parametrize("name", ["conv_lora", "s2ft", "lora_edge", "full"])
def test_windows_are_a_tensor_and_inference_mode_is_refused(name):
    base, x = network("1-D")
    with pytest.raises(TypeError, match="inputs is a list; give the target's windows as a tensor"):
        METHODS[name].begin(base, 2, x.tolist(), LABELS[: len(x)])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode cannot be trained; call it outside"):
        METHODS[name].begin(base, 2, x, LABELS[: len(x)])


@pytest.mark.parametrize("name", ["conv_lora", "dora", "shira", "lora_edge_source_bn"])
def test_an_update_of_nan_has_no_low_rank_form(name):
    base, x = network("1-D")
    model, training = begun(base, name, x)
    with torch.no_grad():
        training.parameters[0].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"low_rank: 0 holds NaN or infinity \(.*\); train at a lower rate"):
        low_rank(model, 2)


@pytest.mark.parametrize(
    ("normalise", "kept"),
    [
        (nn.utils.parametrizations.weight_norm, r"3\.parametrizations\.weight\.original0"),
        (nn.utils.parametrizations.spectral_norm, r"3\.parametrizations\.weight\.original"),
    ],
)
def test_target_only_refuses_what_it_would_keep_of_the_source(normalise, kept):
    base, x = network("1-D")
    normalise(base[3])
    before, trained = fingerprint_state(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(NotApplicableError, match=f"target only: nothing draws random values for {kept}; use another method"):
        METHODS["target_only"].begin(base, 2, x, LABELS[: len(x)])
    assert fingerprint_state(base.state_dict()) == before
    assert [p.requires_grad for p in base.parameters()] == trained


class Masked(nn.Module):
    """A buffer that holds an infinity, as an attention mask does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]))

    def forward(self, x):
        return self.fc(torch.where(self.mask == 0, self.conv(x).relu().mean(-1), 0))


@pytest.mark.parametrize("name", ["conv_lora", "lora_edge_source_bn", "hydra", "memflora", "head_only"])
def test_a_mask_of_infinities_is_no_divergence(name, tmp_path):
    base, x = Masked(), torch.randn(4, 4, 9)
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=1)
    want = output(model.eval(), x)
    save_trained(model, tmp_path / "trained")
    fresh = load_trained(begun(base, name, x)[0], tmp_path / "trained")
    assert torch.equal(output(fresh.eval(), x), want)
    torch.testing.assert_close(output(METHODS[name].finish(model), x), want)
    model, _ = begun(base, name, x)
    model.mask[0] = float("nan")
    with pytest.raises(ValueError, match="mask holds NaN"):
        save_trained(model, tmp_path / "trained")


class Restless(nn.BatchNorm1d):
    """A BatchNorm that moves its statistics in evaluation mode too."""

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum)


@pytest.mark.parametrize("name", [*REPARAMETRISED, "bias_only", "head_only", "full_frozen_bn", "lora_edge"])
def test_a_norm_that_cannot_be_frozen_is_refused(name):
    base, x = network("1-D")
    norm = Restless(16)
    norm.load_state_dict(base[1].state_dict())
    base[1] = norm.eval()
    before, kinds = fingerprint_state(base.state_dict()), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"1: the forward of Restless changes .* in evaluation mode too; .*") as caught:
        METHODS[name].begin(base, 2, x, LABELS[: len(x)])
    assert "\n" not in str(caught.value)
    assert fingerprint_state(base.state_dict()) == before
    assert [type(m) for m in base.modules()] == kinds
