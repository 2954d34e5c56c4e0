"""The checks that weights are finite and variances not negative."""

import pytest
import torch
from torch import nn

from lora_edge.finite import check_finite, check_variances

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_message_names_the_tensor_and_counts_its_values(dtype, value):
    bad = torch.ones(3, 4)
    bad[1, 2] = bad[2, 0] = value
    tensors = {"first": torch.ones(5), "count": torch.tensor(3), "head.weight": bad.to(dtype)}
    with pytest.raises(ValueError, match=r"^a\.st: head\.weight holds NaN or infinity \(2 of 12 values\); train again$"):
        check_finite(tensors, "a.st", "train again")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64], ids=str)
def test_finite_tensors_of_every_dtype_pass(dtype):
    check_finite(
        {"a": torch.ones(3, 4).to(dtype), "empty": torch.ones(0, 4).to(dtype), "scalar": torch.ones(()).to(dtype)}, "it"
    )


def test_large_values_are_finite_although_their_sum_is_not():
    check_finite({"a": torch.full((100,), 3e38), "b": torch.full((100,), 65504.0, dtype=torch.float16)}, "it")


def test_other_layouts_and_gradients():
    odd = torch.eye(3)
    odd[2, 2] = float("nan")
    views = {
        "strided": odd[1:, 1:].T,
        "parameter": nn.Parameter(odd.clone()),
        "sparse": odd.to_sparse(),
        "csr": odd.to_sparse_csr(),
        "complex": torch.complex(torch.zeros(3, 3), odd),
    }
    for name, tensor in views.items():
        with pytest.raises(ValueError, match=f"it: {name} holds NaN"):
            check_finite({name: tensor}, "it")
    check_finite({"meta": torch.empty(3, device="meta")}, "it")
    check_finite({}, "it")


def test_negative_variances_of_a_module_and_of_a_state_dict():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Sequential(nn.BatchNorm1d(3)), nn.InstanceNorm1d(3, track_running_stats=True))
    check_variances(model, "the model")
    check_variances(model.state_dict(), "the model")
    model[2].running_var[1] = -0.5
    for source in (model, model.state_dict()):
        with pytest.raises(ValueError, match=r"^the model: 2\.running_var holds a negative variance \(-0\.5\); "):
            check_variances(source, "the model")
    model[2].running_var.zero_()  # of a channel that is always the same
    check_variances(model, "the model")
    check_variances(nn.BatchNorm1d(3, track_running_stats=False), "the model")
