"""Calls of ``tt_block`` over the table of convolutions: epilogues, random arguments, their float64 twins."""

from __future__ import annotations

import torch

from helpers.cases import ConvCase
from lora_edge.ops.activation import Activation
from lora_edge.tt import contract_suffix, tt_svd

EPILOGUES = {
    "nothing": {},
    "affine, relu": {"affine": True, "activation": "relu"},
    "residual": {"residual": True},
    "affine, residual, relu": {"affine": True, "residual": True, "activation": "relu"},
    "affine, residual with affine, relu6": {"affine": True, "residual": True, "residual_affine": True, "activation": "relu6"},
    "leaky": {"affine": True, "activation": Activation("leaky_relu", (0.1,))},
    "hardtanh": {"residual": True, "activation": Activation("hardtanh", (-0.5, 0.8))},
    "hardsigmoid": {"activation": "hardsigmoid"},
}


def arguments(case: ConvCase, epilogue: dict, dtype=torch.float64, adapted: bool = True):
    """Positional and keyword arguments of the block; x, core, bias and residual require gradients."""
    conv = case.conv()
    suffix = contract_suffix(tt_svd(conv.weight.detach(), case.rank)[1:])
    core = torch.randn(case.outputs, suffix.shape[0], dtype=torch.float64)
    x = case.x(dtype)
    shape = conv(case.x()).shape
    options = dict(epilogue)
    for name in ("affine", "residual_affine"):
        if options.get(name):
            options[name] = (torch.rand(case.outputs).to(dtype) + 0.5, torch.randn(case.outputs).to(dtype))
    if options.get("residual"):
        options["residual"] = torch.randn(shape).to(dtype).requires_grad_()
    bias = None if conv.bias is None else conv.bias.detach().to(dtype).requires_grad_()
    factors = (core.to(dtype).requires_grad_(), suffix.to(dtype)) if adapted else (None, None)
    rest = (bias, case.stride, case.padding, case.dilation, case.groups, 0.7)
    return (x.requires_grad_(), conv.weight.detach().to(dtype), *factors, *rest), options


def leaves(positional, options):
    return [t for t in (*positional, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]


def double(value):
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return tuple(map(double, value)) if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor) else value
