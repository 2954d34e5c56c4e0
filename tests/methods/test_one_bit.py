"""The one-bit adapters against their formula, and their packed files."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lora_edge
from helpers.methods import LABELS, METHODS, RANK, WEIGHTS, ours, prepared
from helpers.networks import BUILD, network, output, train
from lora_edge.files.safetensors_file import read_safetensors
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.methods.one_bit import CodedLoRA, QuantisedLoRA, codebook
from lora_edge.methods.packing import load_packed, pack, save_packed, unpack
from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.surgery.base_state import fingerprint_state
from lora_edge.tools import deltas, low_rank

BITS = (1, 2, 4, 8)
NORMAL = NormalDist()


def by_formula(factor, levels):
    """``Q(w)`` in plain operations of autograd: the level's difference from ``ŵ`` is a constant."""
    mean, std = factor.mean(), factor.std()
    normalised = (factor - mean) / (std + 1e-5)
    nearest = levels[(normalised.detach()[..., None] - levels).abs().argmin(-1)]
    return (normalised + (nearest - normalised).detach()) * std + mean


def medians(levels):
    """The median of each level's bin."""
    edges = [0.0, *(NORMAL.cdf((low + high) / 2) for low, high in pairwise(levels)), 1.0]
    return [NORMAL.inv_cdf((low + high) / 2) for low, high in pairwise(edges)]


def test_codebooks_are_the_papers():
    torch.testing.assert_close(codebook(1), torch.tensor([-0.67449, 0.67449], dtype=torch.float64), rtol=0, atol=5e-6)
    want = torch.tensor([-1.26572, -0.37775, 0.37775, 1.26572], dtype=torch.float64)
    torch.testing.assert_close(codebook(2), want, rtol=0, atol=1e-5)
    assert float((want[2] + want[3]) / 2) == pytest.approx(0.82174, abs=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_medians_of_their_bins(bits):
    """The authors' start from zeros reaches that fixed point at up to 4 bits; at 8 it leaves most levels at 0."""
    levels = codebook(bits).tolist()
    assert len(levels) == 2**bits
    assert all(low < high for low, high in pairwise(levels))
    gaps = [high - low for low, high in pairwise(levels)]
    assert max(abs(a - b) for a, b in zip(levels, medians(levels), strict=True)) <= 1e-3 * min(gaps)
    from_zeros = [0.0] * 2**bits
    for _ in range(500):
        from_zeros = medians(from_zeros)
    if bits < 8:
        assert from_zeros == pytest.approx(levels, abs=1e-6)
    else:
        assert sum(abs(level) < 1e-3 for level in from_zeros) > 2**bits // 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weight_and_gradients_by_the_formula(name, bits):
    conv = WEIGHTS[name]().double()
    layer, mine = ours(conv, QuantisedLoRA, alpha=3.0, bits=bits)
    a, b = (p.detach().clone().requires_grad_() for p in (mine.lora_A, mine.lora_B))
    want = conv.weight.detach() + 3 / RANK * (by_formula(b, codebook(bits)) @ by_formula(a, codebook(bits)).flatten(1)).view(
        conv.weight.shape
    )
    torch.testing.assert_close(layer.weight, want, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(want)
    layer.weight.backward(gradient)
    want.backward(gradient)
    torch.testing.assert_close((mine.lora_A.grad, mine.lora_B.grad), (a.grad, b.grad), rtol=1e-10, atol=1e-12)


def test_gradient_in_closed_form():
    """``σ/(σ+ε)·(g - ḡ) + ḡ``, and what comes through the deviation, which a constant one would leave out."""
    conv = nn.Conv1d(6, 5, 7).double()
    _, mine = ours(conv, QuantisedLoRA)
    w = mine.lora_A
    q = by_formula(w, mine.levels).detach()
    g = torch.randn_like(w)
    mine._quantised(w).backward(g)
    mean, std, n = w.detach().mean(), w.detach().std(), w.numel()
    centred = w.detach() - mean
    level, share = (q - mean) / std, std / (std + 1e-5)
    constant = share * (g - g.mean()) + g.mean()
    through_std = (g * (level - centred * std / (std + 1e-5) ** 2)).sum() * centred / ((n - 1) * std)
    torch.testing.assert_close(w.grad, constant + through_std, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(w.grad, constant, rtol=1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_factors_have_as_many_values_as_the_bits_say(bits):
    _, mine = ours(nn.Conv1d(40, 50, 3), QuantisedLoRA, bits=bits)
    b, a, _ = mine.low_rank()
    for factor in (a, b):
        assert 2 <= len(factor.unique()) <= 2**bits


def test_the_usual_straight_through_sum_is_not_exact():
    """``level(ŵ) + ŵ - ŵ`` has more values than the code, so it would not be what is merged from a file."""
    _, mine = ours(nn.Conv1d(40, 50, 3), QuantisedLoRA)
    normalised, codes, mean, std = (value.detach() for value in mine._codes(mine.lora_A))
    usual = (mine.levels[codes.long()] + normalised - normalised) * std + mean
    assert len(usual.unique()) > 2
    exact = mine.low_rank()[1]
    assert len(exact.unique()) == 2
    torch.testing.assert_close(usual, exact)


def test_starts_near_the_base_and_a_zero_factor_would_stay_constant():
    conv = nn.Conv2d(6, 8, 3)
    start = QuantisedLoRA(conv, RANK)
    assert float(start.lora_B.detach().abs().max()) <= 2e-3
    b, a, scaling = (value.detach() if isinstance(value, torch.Tensor) else value for value in start.low_rank())
    assert 0 < float(start.delta().detach().abs().max()) <= scaling * RANK * float(b.abs().max() * a.abs().max()) < 2e-3
    with torch.no_grad():
        start.lora_B.zero_()
    start.delta().square().sum().backward()
    start.delta().sum().backward()
    assert len(start.lora_B.grad.unique()) == 1
    assert len(start._quantised(start.lora_B).unique()) == 1


def test_a_factor_of_one_element_is_its_mean():
    conv = nn.Conv2d(3, 1, 3)
    mine = QuantisedLoRA(conv, 1)
    with torch.no_grad():
        mine.lora_B.fill_(0.25)
    assert mine.low_rank()[0].tolist() == [[0.25]]
    mine.delta().sum().backward()
    torch.testing.assert_close(mine.lora_B.grad, mine.low_rank()[1].detach().sum().view(1, 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 33])
def test_pack_keeps_every_code(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    number = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(len(packed), "little")
    assert torch.equal(unpack(packed, bits, codes.shape), codes)
    whole = codes[: count // (8 // bits) * (8 // bits)]  # what remains if a partial byte is dropped
    assert (len(pack(whole, bits)) < len(packed)) == (count * bits % 8 != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["one_bit", "one_bit_2", "one_bit_4", "one_bit_8"])
@pytest.mark.parametrize("kind", list(BUILD))
def test_a_packed_file_gives_the_same_weights_bit_by_bit(kind, name, dtype, tmp_path):
    base, x = network(kind)
    base, x = base.to(dtype), x.to(dtype)
    rank = 3
    model, parameters = prepared(base, name, x, rank)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    want = output(model.eval(), x)
    path, again = tmp_path / "packed.safetensors", tmp_path / "again.safetensors"
    save_packed(model, path)
    loaded = load_packed(copy.deepcopy(base), path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(output(loaded.eval(), x), want)
    updates = deltas(model)
    assert all(torch.equal(update, updates[layer]) for layer, update in deltas(loaded).items())
    assert low_rank(loaded).keys() == updates.keys()
    with lora_edge.disabled(loaded):
        assert torch.equal(output(loaded, x), output(base, x))
    save_packed(loaded, again)
    (tensors, metadata), (same, same_metadata) = read_safetensors(path), read_safetensors(again)
    assert metadata == same_metadata
    assert all(torch.equal(value, same[key]) for key, value in tensors.items())
    merged = lora_edge.merge(model).state_dict()
    assert list(lora_edge.merge(loaded).state_dict()) == list(merged)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, merged[key]), key


@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_a_packed_file(bits, tmp_path):
    base = nn.Sequential(nn.Conv1d(6, 13, 5), nn.Conv1d(13, 7, 3))
    x, rank, path = torch.randn(2, 6, 30), 3, tmp_path / "packed"
    model, _ = prepared(base, "one_bit" if bits == 1 else f"one_bit_{bits}", x, rank)
    save_packed(model, path)
    with safe_open(path, "pt") as file:
        stored = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    sizes = [rank * 30, rank * 13, rank * 39, rank * 7]
    assert stored == {"codes": sum(math.ceil(size * bits / 8) for size in sizes), "statistics": 2 * 16}
    save_trained(model, tmp_path / "trained")
    assert path.stat().st_size < (tmp_path / "trained").stat().st_size


def test_a_loaded_model_can_be_copied_and_saved_as_any_other(tmp_path):
    base, x = network("2-D")
    model, parameters = prepared(base, "one_bit", x)
    train(model, x, parameters)
    save_packed(model, tmp_path / "packed")
    loaded = load_packed(copy.deepcopy(base), tmp_path / "packed")
    assert torch.equal(output(copy.deepcopy(loaded), x), output(model.eval(), x))
    save_trained(loaded, tmp_path / "trained")
    fresh = load_packed(copy.deepcopy(base), tmp_path / "packed")
    assert load_trained(fresh, tmp_path / "trained") is fresh
    assert all(type(kind) is CodedLoRA for kind in reparametrised_layers(fresh).values())


def test_a_wrong_file_is_refused_and_changes_nothing(tmp_path):
    base, x = network("1-D")
    path = tmp_path / "packed"
    model, _ = prepared(base, "one_bit", x)
    save_packed(model, path)
    save_trained(model, tmp_path / "trained")
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    (tmp_path / "rank").write_bytes(path.read_bytes().replace(b"[1,2,1.0]", b"[1,2,3.0]"))
    (tmp_path / "half").write_bytes(path.read_bytes()[:100])
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[0].weight[0, 0, 0] += 1
    for start, file, error, text in (
        (base, "damaged", ValueError, "damaged, or not written by save_packed"),
        (base, "rank", ValueError, "damaged, or not written by save_packed"),
        (base, "half", ValueError, "not a safetensors file, or damaged"),
        (base, "trained", ValueError, "not written by save_packed"),
        (base, "none", FileNotFoundError, "no such file"),
        (other, "packed", ValueError, "belongs to another base model; give the one it was trained from"),
        (model, "packed", RuntimeError, "the model is already adapted"),
    ):
        fresh = copy.deepcopy(start)
        before = fingerprint_state(fresh.state_dict())
        with pytest.raises(error, match=text) as caught:
            load_packed(fresh, tmp_path / file)
        assert "\n" not in str(caught.value)
        assert fingerprint_state(fresh.state_dict()) == before
    with pytest.raises(ValueError, match="not written by save_trained"):
        load_trained(model, path)


def test_another_method_is_refused_by_name_and_nothing_is_written(tmp_path):
    base, x = network("2-D")
    path = tmp_path / "packed"
    with pytest.raises(RuntimeError, match="no method computes the model's weights"):
        save_packed(base, path)
    with pytest.raises(ValueError, match="stem is adapted by DoRA, which has no codes; use save_trained"):
        save_packed(prepared(base, "dora", x)[0], path)
    model, parameters = prepared(base, "one_bit", x)
    model.fc.requires_grad_(True)
    with pytest.raises(ValueError, match=r"fc\.(weight|bias) is trained too, which a packed file does not hold"):
        save_packed(model, path)
    model.fc.requires_grad_(False)
    with torch.no_grad():
        parameters[0][0] = math.nan
    with pytest.raises(ValueError, match="the statistics of stem hold"):
        save_packed(model, path)
    assert not path.exists()


def test_training_changes_codes():
    conv = nn.Conv1d(6, 12, 5)
    x = torch.randn(4, 6, 21)
    parameters = METHODS["one_bit"].prepare(conv, RANK, x, LABELS)
    (kind,) = reparametrised_layers(conv).values()
    before = kind.coded()
    train(conv, x, parameters, steps=20)
    after = kind.coded()
    assert not torch.equal(before.codes_b, after.codes_b)
