"""Round-to-nearest quantisation against loops over groups, its error bound, its exact cases and its refusals."""

from __future__ import annotations

import pytest
import torch

from lora_edge.methods.parts.quantisation import dequantise, quantise


def rounded_by_loops(weight, bits, group):
    """Each group's nearest of its levels ``low + k·step``, where ``low`` is moved so that 0 is a level."""
    found = torch.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            terms = weight[row, start : start + group]
            low, high = min(float(terms.min()), 0.0), max(float(terms.max()), 0.0)
            step = (high - low) / (2**bits - 1) or 1.0
            below = round(-low / step)
            levels = step * torch.arange(-below, 2**bits - below, dtype=weight.dtype)
            found[row, start : start + group] = levels[(terms[:, None] - levels).abs().argmin(dim=1)]
    return found


@pytest.mark.parametrize(("bits", "group"), [(1, 4), (2, 16), (4, 5), (8, 7), (3, 100)])
def test_quantise_rounds_to_the_nearest_level_of_its_group(bits, group):
    torch.manual_seed(0)
    weight = torch.randn(6, 37, dtype=torch.float64) + torch.linspace(-3, 3, 6, dtype=torch.float64)[:, None]
    codes, scale, zero = quantise(weight, bits, group)
    groups = -(-37 // group)
    assert (codes.shape, scale.shape, zero.shape) == ((6, 37), (6, groups), (6, groups))
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float64, torch.uint8)
    assert int(codes.max()) <= 2**bits - 1
    back = dequantise(codes, scale, zero, group)
    torch.testing.assert_close(back, rounded_by_loops(weight, bits, group), rtol=0, atol=1e-12)
    per_term = scale.repeat_interleave(group, dim=1)[:, :37]
    assert bool(((back - weight).abs() <= per_term / 2 * (1 + 1e-12)).all())
    one_scale_per_row = dequantise(*quantise(weight, bits, 37), 37)  # the careless form
    if group < 37:
        assert (back - weight).norm() < 0.95 * (one_scale_per_row - weight).norm()


def test_zeros_and_levels_are_exact():
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0], [-2.0, -1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    assert torch.equal(dequantise(*quantise(weight, 2, 4), 4), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_float32(dtype):
    weight = torch.randn(4, 10, dtype=dtype)
    codes, scale, zero = quantise(weight, 8, 5)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(dequantise(codes, scale, zero, 5), weight.float(), rtol=0, atol=float(scale.max()))


@pytest.mark.parametrize(
    ("bits", "group", "text"), [(0, 4, "bits is 0; give 1 to 8"), (9, 4, "bits is 9"), (4, 0, "group is 0; give at least 1")]
)
def test_refuses_what_is_out_of_range(bits, group, text):
    with pytest.raises(ValueError, match=text):
        quantise(torch.ones(2, 4), bits, group)
