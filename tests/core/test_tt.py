"""TT-SVD and contraction, compared with tensorly and with the error bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lora_edge import tt_contract, tt_svd
from lora_edge.tt import attainable_ranks, contract_suffix

SHAPES = [(8, 6, 5), (16, 3, 8), (4, 1, 7), (8, 6, 3, 3), (5, 12, 1, 1), (3, 4, 5, 2), (6, 5, 3, 2, 3), (4, 3, 1, 3, 2)]


def all_ranks():
    for shape in SHAPES:
        top = max(attainable_ranks(shape, 10**6))
        yield from itertools.product([shape], range(1, top + 2))


@pytest.mark.parametrize(("shape", "rank"), list(all_ranks()))
def test_agrees_with_tensorly_at_every_rank(shape, rank):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train

    w = torch.randn(shape, dtype=torch.float64)
    cores = tt_svd(w, rank)
    bonds = attainable_ranks(shape, rank)
    assert [tuple(c.shape) for c in cores] == list(zip([1, *bonds], shape, [*bonds, 1], strict=True))
    theirs = tensorly.tt_to_tensor(tensor_train(w.numpy(), rank=[1, *bonds, 1]))
    np.testing.assert_allclose(tt_contract(cores).numpy(), theirs, atol=1e-10 * np.linalg.norm(w.numpy()))


@pytest.mark.parametrize(("shape", "rank"), list(all_ranks()))
def test_error_is_within_the_tt_svd_bound(shape, rank):
    w = torch.randn(shape, dtype=torch.float64)
    discarded = 0.0
    for way, bond in enumerate(attainable_ranks(shape, rank)):
        values = torch.linalg.svdvals(w.reshape(math.prod(shape[: way + 1]), -1))
        discarded += float(values[bond:].square().sum())
    error = float((tt_contract(tt_svd(w, rank)) - w).norm())
    assert error <= math.sqrt(discarded) + 1e-12 * float(w.norm())


@pytest.mark.parametrize("last", [1.0, 0.05, 0.02, 1e-4, 1e-9, 0.0])
@pytest.mark.parametrize("rank", [1, 3, 6, 12])
def test_wide_matrices_of_every_condition(rank, last):
    """Singular values fall to ``last`` at rank 6 and are tiny from there on: with and without squaring."""
    values = torch.cat([torch.logspace(0, math.log10(max(last, 1e-12)), 6), torch.full((6,), 1e-13)]).double()
    values[5] = last
    left, right = (torch.linalg.qr(torch.randn(n, 12, dtype=torch.float64))[0] for n in (12, 60))
    matrix = left @ torch.diag(values) @ right.T
    cores = tt_svd(matrix.reshape(12, 60), rank)
    assert float((cores[0][0].T @ cores[0][0] - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-13
    discarded = float(torch.linalg.svdvals(matrix)[rank:].norm())
    assert float((tt_contract(cores) - matrix).norm()) <= discarded + 1e-12
    kept = cores[1].flatten(1).norm(dim=1)
    assert bool((kept[:-1] >= kept[1:] - 1e-13).all())  # by decreasing singular value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_full_rank_gives_the_tensor_back_in_its_dtype(dtype):
    w = torch.randn(6, 5, 3).to(dtype)
    back = tt_contract(tt_svd(w, 15))
    assert back.dtype == dtype
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)  # half cores are rounded one by one
    assert float((back - w).double().norm() / w.double().norm()) <= rounding


def test_singular_values_stay_in_the_suffix():
    w = torch.randn(8, 6, 5, dtype=torch.float64)
    cores = tt_svd(w, 3)
    suffix = contract_suffix(cores[1:]).flatten(1)
    assert torch.allclose(cores[0][0].T @ cores[0][0], torch.eye(3, dtype=torch.float64))
    # r = 3 truncates inside the suffix as well, so its rows are at most the singular values
    assert bool((suffix.norm(dim=1) <= torch.linalg.svdvals(w.flatten(1))[:3] + 1e-12).all())


def test_signs_are_fixed():
    w = torch.randn(8, 6, 5, dtype=torch.float64)
    first, again = tt_svd(w, 2), tt_svd(w.clone(), 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert bool((first[0][0].gather(0, first[0][0].abs().argmax(0, keepdim=True)) > 0).all())


def test_attainable_ranks():
    assert attainable_ranks((64, 97, 8), 2) == [2, 2]
    assert attainable_ranks((64, 97, 8), 100) == [64, 8]
    assert attainable_ranks((4, 1, 3, 3), 16) == [4, 4, 3]
    assert attainable_ranks((64, 1, 1), 8) == [1, 1]


@pytest.mark.parametrize(
    ("rank", "error"),
    [(0, ValueError), (-2, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError), (None, TypeError)],
)
def test_bad_rank(rank, error):
    with pytest.raises(error, match=r"^rank is .*; give an integer of at least 1$"):
        tt_svd(torch.randn(3, 3, 3), rank)


def test_a_numpy_integer_is_a_valid_rank():
    assert len(tt_svd(torch.randn(3, 3, 3), np.int64(2))) == 3


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.full((3, 3), math.nan), ValueError),
        (torch.full((3, 3), math.inf), ValueError),
        (torch.zeros(3, 0), ValueError),
        (torch.zeros(3, 3, dtype=torch.int64), TypeError),
        (torch.zeros(3, 3, dtype=torch.complex64), TypeError),
        ([[1.0]], TypeError),
    ],
)
def test_bad_tensor(tensor, error):
    with pytest.raises(error, match=r"^tt_svd: tensor .*; give "):
        tt_svd(tensor, 2)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_values_whose_squares_are_out_of_range(size):
    w = torch.randn(4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(tt_contract(tt_svd(size * w, 2)) / size, tt_contract(tt_svd(w, 2)), rtol=1e-10, atol=1e-10)


def test_zero_tensor():
    assert float(tt_contract(tt_svd(torch.zeros(4, 3, 2), 2)).abs().max()) == 0.0


def test_bad_cores():
    a, b = torch.randn(1, 4, 2), torch.randn(3, 5, 1)
    with pytest.raises(ValueError, match="core 0 ends in bond 2 but core 1 starts with 3"):
        tt_contract([a, b])
    with pytest.raises(ValueError, match="no cores"):
        tt_contract([])
    with pytest.raises(ValueError, match="its last bond must be 1"):
        tt_contract([a])
    with pytest.raises(ValueError, match="its first bond must be 1"):
        tt_contract([b])
    with pytest.raises(ValueError, match="a TT core is"):
        tt_contract([torch.randn(2, 2)])
