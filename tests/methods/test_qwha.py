"""QWHA against the algorithm of its paper, written out, and its transform against scipy's matrices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import LABELS, METHODS, RANK, WEIGHTS, perturbed, prepared, small_base
from helpers.networks import output
from lora_edge.methods.parts.facts import second_moments
from lora_edge.methods.parts.hadamard import hadamard_order, transform
from lora_edge.methods.parts.quantisation import dequantise, quantise
from lora_edge.methods.qwha import GROUP, QWHA, repair, shares
from lora_edge.nn.reparametrised import added_tensors, reparametrised_layers
from lora_edge.tools import deltas

ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 40, 44, 48, 64, 192, 224, 320)


def matrix(order):
    return transform(torch.eye(order, dtype=torch.float64)).T


def moments_of(conv):
    """``XᵀX (g, n, n)`` of correlated inputs, as the patches of a signal are."""
    terms = conv.weight[0].numel()
    x = torch.randn(conv.groups, 3 * terms + 5, terms, dtype=torch.float64)
    x = x @ torch.randn(terms, terms, dtype=torch.float64) / terms**0.5 + torch.randn(terms, dtype=torch.float64)
    return x.transpose(1, 2) @ x


def written_out(error, moments, budget):
    """The authors' initialisation with ``R`` itself, one channel at a time, by least squares; ``F (O, N)``, and unrefined."""
    out, terms = error.shape
    order = hadamard_order(terms)
    basis = matrix(order)[:terms] / math.sqrt(order)
    roots = []
    for moment in moments:
        damped = moment + 1e-4 * moment.diagonal().mean() * torch.eye(terms, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(damped)
        roots.append(values.sqrt()[:, None] * vectors.T)
    per_group = out // len(moments)
    columns = [root @ basis for root in roots]  # N
    spectrum = torch.stack([torch.linalg.pinv(columns[o // per_group]) @ roots[o // per_group] @ error[o] for o in range(out)])
    counts = shares(spectrum.norm(dim=1), budget, terms).tolist()
    refined, unrefined = torch.zeros(2, out, order, dtype=torch.float64)
    for o in range(out):
        n, target = columns[o // per_group], roots[o // per_group] @ error[o]
        chosen = (n.norm(dim=0) * spectrum[o].abs()).topk(counts[o]).indices
        unrefined[o, chosen] = spectrum[o, chosen]
        refined[o, chosen] = torch.linalg.lstsq(n[:, chosen], target[:, None], driver="gelsd").solution[:, 0]
    return refined, unrefined


def damage(error, update, moments):
    """``‖X(error - update)ᵀ‖ / ‖X errorᵀ‖``."""
    rest, per_group = error - update, len(error) // len(moments)
    ends = [
        math.sqrt(sum(float((r @ m * r).sum()) for r, m in zip(rows.split(per_group), moments, strict=True)))
        for rows in (rest, error)
    ]
    return ends[0] / ends[1]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order):
    assert hadamard_order(order) == order
    h = matrix(order)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    rows = torch.randn(3, order, dtype=torch.float64)
    torch.testing.assert_close(transform(rows), rows @ h.T)
    if order & (order - 1):  # a factor of Paley's, which a careless transform would apply from the wrong side
        assert not torch.allclose(transform(rows), rows @ h, atol=0.1)


def test_powers_of_two_are_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    for order in (1, 2, 4, 8, 16, 64, 256):
        assert torch.equal(matrix(order), torch.from_numpy(linalg.hadamard(order)).double())


@pytest.mark.parametrize(("terms", "order"), [(3, 4), (5, 8), (6, 8), (28, 32), (45, 64), (97, 128), (776, 1024)])
def test_other_orders_are_cropped_from_the_next_power_of_two(terms, order):
    assert hadamard_order(terms) == order
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {terms} here; use hadamard_order"):
        transform(torch.zeros(1, terms))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_start_is_the_algorithm_written_out(name, bits):
    conv = WEIGHTS[name]().double()
    moments = moments_of(conv)
    made = QWHA(conv, RANK, moments, bits)
    weight = conv.weight.detach().flatten(1)
    rounded = dequantise(*quantise(weight, bits, GROUP), GROUP)
    torch.testing.assert_close(made.base(conv.weight).flatten(1), rounded)
    out, terms = weight.shape
    budget = min(RANK * (out + terms), weight.numel())
    refined, unrefined = written_out(weight - rounded, moments, budget)
    order = refined.shape[1]
    h = matrix(order)[:terms] / math.sqrt(order)
    assert made.values.numel() == budget == len(made.places.unique())
    torch.testing.assert_close(made.delta().detach(), refined @ h.T, rtol=1e-6, atol=1e-9)
    if budget < weight.numel():
        assert not torch.allclose(made.delta().detach(), unrefined @ h.T, rtol=1e-2)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weight_and_gradients_by_the_formula(name):
    conv = WEIGHTS[name]().double()
    made = QWHA(conv, RANK, moments_of(conv), 3)
    layer = perturbed(conv, made)
    out, terms = made.codes.shape
    f = torch.zeros(out, made.order, dtype=torch.float64)
    f.view(-1)[made.places] = made.values.detach()
    f.requires_grad_()
    h = matrix(made.order)[:terms]
    rounded = dequantise(*quantise(conv.weight.detach().flatten(1), 3, GROUP), GROUP)
    s = math.sqrt(out * made.order)  # of the authors' formula
    want = (rounded + s / math.sqrt(out) * f @ h.T / made.order).view(conv.weight.shape)
    torch.testing.assert_close(layer.weight, want)
    assert not torch.allclose(layer.weight, conv.weight + (want - rounded.view_as(want)), rtol=1e-3)  # on the float base
    gradient = torch.randn_like(want)
    layer.weight.backward(gradient)
    want.backward(gradient)
    torch.testing.assert_close(made.values.grad, f.grad.view(-1)[made.places])


@pytest.mark.parametrize("terms", [64, 48, 45])
def test_refined_is_better_than_unrefined_and_both_than_low_rank(terms):
    """At 2 bits and rank 4, with as many trained elements."""
    torch.manual_seed(0)
    conv = nn.Conv1d(terms, 32, 1).double()
    moments = moments_of(conv)
    weight = conv.weight.detach().flatten(1)
    error = weight - dequantise(*quantise(weight, 2, GROUP), GROUP)
    budget = 4 * sum(weight.shape)
    order = hadamard_order(terms)
    h = matrix(order)[:terms] / math.sqrt(order)

    def repaired(given):
        values, places = repair(error, given, budget)
        return torch.zeros(32 * order, dtype=torch.float64).scatter(0, places, values).view(32, order) @ h.T

    root = torch.linalg.cholesky(moments[0])
    u, s, vt = torch.linalg.svd(error @ root, full_matrices=False)
    low_rank = torch.linalg.solve(root.T, ((u[:, :4] * s[:4]) @ vt[:4]).T).T  # the best of rank 4 for these inputs
    mine = repaired(moments)
    refined = damage(error, mine, moments)
    assert refined < 0.45
    assert refined < damage(error, written_out(error, moments, budget)[1] @ h.T, moments) < 1
    assert refined < damage(error, low_rank, moments)
    assert refined < damage(error, repaired(torch.eye(terms, dtype=torch.float64)[None]), moments)  # blind to the inputs
    assert int(torch.linalg.matrix_rank(mine)) > 4


def test_every_channel_gets_its_share():
    assert shares(torch.tensor([1.0, 2.0, 5.0]), 16, 100).tolist() == [2, 4, 10]
    assert shares(torch.tensor([1.0, 2.0, 5.0]), 18, 100).tolist() == [3, 4, 11]  # floors 2, 4, 11; 1 left, to the fewest
    assert shares(torch.tensor([1.0, 1.0, 8.0]), 20, 10).tolist() == [5, 5, 10]  # 6 over the most are spread
    assert shares(torch.tensor([0.0, 1.0, 8.0]), 28, 10).tolist() == [8, 10, 10]  # the error-free gets the rest
    assert shares(torch.tensor([0.0, 9.0, 8.0]), 30, 10).tolist() == [10, 10, 10]
    assert shares(torch.zeros(4), 6, 10).tolist() == [2, 2, 1, 1]


def test_at_more_bits_the_start_is_nearer_to_the_base():
    base, x = small_base()
    want = output(base, x)
    names = [name for name, m in base.named_modules() if isinstance(m, nn.Conv1d)]
    moments = second_moments(base, names, x)
    off, by_layer = [], []
    for name in ("qwha_2bit", "qwha_3bit", "qwha", "qwha_8bit"):
        model, _ = prepared(base, name, x)
        off.append(float((output(model.eval(), x) - want).norm()))
        updates = deltas(model)
        by_layer.append(sum(float((u.flatten(1).double() @ moments[n][0] * u.flatten(1)).sum()) for n, u in updates.items()))
    assert off == sorted(off, reverse=True)
    assert by_layer == sorted(by_layer, reverse=True)
    assert off[-1] > 0


def test_codes_are_kept_and_not_the_weight():
    conv = nn.Conv2d(6, 8, 3)
    made = QWHA(conv, RANK, moments_of(conv))
    kept = {name: value.dtype for name, value in made.state_dict().items()}
    assert kept == {
        "values": torch.float32, "places": torch.int64, "codes": torch.uint8, "scale": torch.float32, "zero": torch.uint8
    }  # fmt: skip
    assert int(made.codes.max()) <= 15


def test_a_file_of_other_bits_brings_its_own_codes():
    base, x = small_base()
    model, _ = prepared(base, "qwha_2bit", x)
    other, _ = prepared(base, "qwha_8bit", x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other.eval(), x), output(model.eval(), x))


def test_inputs_without_energy_and_layers_that_are_not_reached():
    """Their error is repaired by itself, as by white inputs."""
    conv = nn.Conv1d(6, 5, 7).double()
    white = QWHA(conv, RANK, torch.eye(42, dtype=torch.float64)[None])
    torch.testing.assert_close(QWHA(conv, RANK, torch.zeros(1, 42, 42, dtype=torch.float64)).delta(), white.delta())
    model = nn.Sequential(nn.Conv1d(6, 5, 7))
    model.aside = nn.Module()
    model.aside.conv = nn.Conv1d(6, 5, 7)
    model.forward = lambda x: model[0](x)
    METHODS["qwha"].prepare(model, RANK, torch.randn(2, 6, 20), LABELS)
    assert len(reparametrised_layers(model)) == 2


def test_windows_that_are_not_finite_are_refused():
    base, x = small_base()
    x = x.clone()
    x[0, 0, 0] = math.nan
    before = [name for name, _ in base.named_parameters()]
    with pytest.raises(ValueError, match=r"block1\.conv1: its inputs hold NaN or Inf; give finite windows"):
        METHODS["qwha"].prepare(base, RANK, x, LABELS)
    assert [name for name, _ in base.named_parameters()] == before


def test_disabled_is_the_float_base_and_merge_a_float_weight():
    base, x = small_base()
    model, parameters = prepared(base, "qwha_2bit", x)
    assert sum(p.numel() for p in parameters) < sum(t.numel() for _, t in added_tensors(model))
    want = output(model.eval(), x)
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    merged = lora_edge.merge(copy.deepcopy(model))
    assert merged.block1.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(output(merged, x), want, rtol=1e-4, atol=1e-5)
