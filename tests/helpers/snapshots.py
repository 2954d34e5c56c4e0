"""The state of a model that a failing call must leave as it was."""

from __future__ import annotations

import torch
from torch import nn

from lora_edge.surgery.adapted import adapt_state


def snapshot(model: nn.Module):
    """Copy the values, classes, flags and identities of a model's tensors and modules, and its adapt state."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m), m.training, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()],
        adapt_state(model),
    )


def assert_same(before, after):
    assert list(before[0]) == list(after[0])
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert before[1:] == after[1:]
