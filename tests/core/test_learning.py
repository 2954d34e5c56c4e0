"""Every core can learn: zero and rank-deficient weights get directions, and a core without a gradient is named once."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_edge
from helpers.networks import network, train
from lora_edge.subspaces.weight import common_norm, weight_suffix
from lora_edge.surgery.adapted import adapted_layers
from lora_edge.tt import attainable_ranks, contract_suffix

SHAPES = [(4, 8, 1), (8, 3, 3, 3), (6, 1, 3, 3), (5, 2, 3, 3, 3), (16, 6, 8)]


def kernel(shape: tuple[int, ...], kind: str) -> Tensor:
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "rank 1":
        return torch.outer(torch.randn(shape[0]), torch.randn(torch.Size(shape[1:]).numel())).reshape(shape)
    if kind == "one filter":
        weight = torch.zeros(shape)
        weight[1].normal_()
        return weight
    return 1e-30 * torch.randn(shape)


@pytest.mark.parametrize("scaling", ["balanced", "paper"])
@pytest.mark.parametrize("kind", ["zero", "rank 1", "one filter", "tiny"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_row_of_a_suffix_is_zero_and_the_rows_of_the_weight_stay(shape, kind, scaling):
    weight = kernel(shape, kind)
    for rank in (1, 2, 5):
        cores = weight_suffix(weight, rank, scaling)
        assert [core.shape[0] for core in cores] == attainable_ranks(shape, rank)
        rows = contract_suffix(cores).flatten(1)
        norms = rows.norm(dim=1)
        assert torch.linalg.matrix_rank(rows / norms[:, None]) == len(rows)
        fresh = slice(0 if kind == "zero" else 1, None)
        if kind != "tiny" or scaling == "balanced":
            torch.testing.assert_close(norms[fresh], torch.full_like(norms[fresh], common_norm(weight, len(rows))))
        if kind in ("rank 1", "one filter") and min(shape[2:]) > 1:
            own, row = weight.flatten(1).norm(dim=1).argmax(), rows[0] / norms[0]
            lost = weight.flatten(1)[own] - (weight.flatten(1)[own] @ row) * row
            first = contract_suffix(weight_suffix(weight, rank, "paper")).flatten(1)[0]
            torch.testing.assert_close(F.normalize(first, dim=0), row)
            assert float(lost.norm()) < float(weight.flatten(1)[own].norm())
        again = weight_suffix(weight, rank, scaling)
        assert all(torch.equal(a, b) for a, b in zip(cores, again, strict=True)), "deterministic"


class Branch(nn.Module):
    """A residual branch that ends in a convolution of zeros, as a ControlNet's does."""

    def __init__(self, dims: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a, self.z = conv(4, 8, 3, padding=1), conv(8, 4, 1, groups=groups)
        nn.init.zeros_(self.z.weight)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.z(torch.relu(self.a(x)))


@pytest.mark.parametrize("options", [{}, {"scaling": "paper"}, {"params": 60}, {"subspace": "input"}, {"lean": False}], ids=str)
@pytest.mark.parametrize(("dims", "groups", "dtype"), [(1, 1, torch.float32), (2, 2, torch.float64), (3, 4, torch.float32)])
def test_a_convolution_of_zeros_learns(dims, groups, dtype, options):
    model, x = Branch(dims, groups, dtype), torch.randn(6, 4, *[5] * dims, dtype=dtype)
    lora_edge.adapt(model, 2, batches=[x] if options.get("subspace") else None, **options)
    optimizer = torch.optim.Adam(lora_edge.trainable_parameters(model), lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model.train()(x) - 2 * x.relu()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(bool(layer.core.detach().count_nonzero()) for layer in adapted_layers(model).values())


class Mamba(nn.Module):
    """Reads its depthwise weight and never calls the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d, self.out = nn.Conv1d(3, 3, 4, groups=3, padding=3), nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(F.conv1d(x, self.conv1d.weight, self.conv1d.bias, padding=3, groups=3)[..., :-3]))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.auxiliary, self.head = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).mean(-1))


class Detached(Unused):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.auxiliary(torch.relu(self.a(x)))
        return self.head(self.a(x).mean(-1) + y.detach().mean(-1))


IDLE = {"weight read directly": (Mamba, "conv1d"), "not called": (Unused, "auxiliary"), "detached": (Detached, "auxiliary")}


def steps(model: nn.Module, count: int) -> list[str]:
    """Train so many steps and return the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, torch.randn(6, 3, 20), [p for p in model.parameters() if p.requires_grad], steps=count)
    return [str(w.message) for w in said if issubclass(w.category, UserWarning) and "gradient" in str(w.message)]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", list(IDLE))
def test_a_core_without_a_gradient_is_named_once(tmp_path, name, head):
    make, idle = IDLE[name]
    if head and make is Mamba:
        pytest.skip("it has no head")
    model = lora_edge.adapt(make(), 2, train_head=head, lean=name != "detached")
    said = steps(model, 5)
    assert len(said) == 1
    assert said[0].startswith(f"the core of {idle} got no gradient in training and does not learn")
    assert steps(model, 5) == []
    assert lora_edge.summary(model).notes == {idle: "its core got no gradient in training and did not learn; exclude it"}
    assert f"{idle}: its core got no gradient" in str(lora_edge.summary(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_edge.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("call", ["save", "merge"])
def test_after_a_single_step_saving_and_merging_warn(tmp_path, call):
    model = lora_edge.adapt(Mamba(), 2)
    assert steps(model, 1) == []
    twin = copy.deepcopy(model)
    for one in (model, pickle.loads(pickle.dumps(twin))):
        with pytest.warns(UserWarning, match="the core of conv1d got no gradient"):
            lora_edge.save_adapter(one, tmp_path / "a") if call == "save" else lora_edge.merge(one)


def test_no_warning_for_a_model_that_learns_or_was_not_trained(tmp_path):
    model, x = network("2-D")
    lora_edge.adapt(model, 2, train_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lora_edge.save_adapter(model, tmp_path / "a")
        train(model, x, list(lora_edge.trainable_parameters(model)), steps=5)
        assert lora_edge.summary(model).notes == {}
        lora_edge.save_adapter(model, tmp_path / "a")
        lora_edge.merge(model)


def test_the_watch_keeps_nothing_alive_and_ends_by_itself():
    model = lora_edge.adapt(Unused(), 2, train_head=True)
    cores = [layer.core for layer in adapted_layers(model).values()]
    steps(model, 4)
    assert not any(core._post_accumulate_grad_hooks for core in cores)
    gone = weakref.ref(model)
    del model, cores
    gc.collect()
    assert gone() is None
    model = lora_edge.adapt(Unused(), 2, train_head=True)
    head = model.head.weight
    lora_edge.merge(model)
    assert not head._post_accumulate_grad_hooks
