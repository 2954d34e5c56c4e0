"""A low-rank branch beside a convolution, for updates that depend on the input and so are no weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn.fused_block import layer_args
from lora_edge.nn.inputs_shown import inputs_shown
from lora_edge.nn.reparametrised import Added, Reparametrisation, random, reparametrise, zeros
from lora_edge.ops.conv_args import conv as convolve
from lora_edge.ops.padding import pad_by_mode

NAME = "branch"  # of the submodule that a convolution gets


class Branch(Added):
    """``y = conv(x) + scaling · B gate(h, x)``; ``h = A * x`` by the convolution's own stride, padding, dilation and groups.

    ``A (r, I/g, *K)`` is random and ``B (O, r)`` zero, as in conv LoRA; the groups share ``A``, and a row of ``B`` reads the
    ``h`` of its own group. A subclass defines ``gate``, and ``static`` if there is a weight that comes near it.
    """

    def __init__(self, conv: _ConvNd, rank: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.lora_A = random(conv, rank, *conv.weight.shape[1:])
        self.lora_B = zeros(conv, conv.out_channels, rank)
        self.scaling = scaling

    def gate(self, h: Tensor, x: Tensor) -> Tensor:
        """Return what ``B`` reads, ``(N, g, r, *L')``, of ``h`` of that shape and the layer's input ``x (N, I, *L)``.

        A factor per sample and component makes a mixture of the components, a matrix per sample mixes them.
        """
        return h

    def static(self, inputs: Tensor) -> Reparametrisation | None:
        """Return the update that comes nearest on these inputs ``(N, I, *L)`` of the layer; None where there is none."""
        return None

    def added(self, conv: _ConvNd, x: Tensor) -> Tensor:
        """Return what is added to the convolution's output ``(N, O, *L')``, in its dtype."""
        x = pad_by_mode(conv, x)
        groups, single = conv.groups, x.dim() == conv.weight.dim() - 1
        x = x[None] if single else x
        a = self.lora_A.to(conv.weight.dtype).repeat(groups, *[1] * (conv.weight.dim() - 1))
        h = convolve(x, a, None, layer_args(conv)).unflatten(1, (groups, -1))
        mixed = self.gate(h, x)
        b = (self.scaling * self.lora_B).to(mixed.dtype).unflatten(0, (groups, -1))  # (g, O/g, r)
        y = torch.einsum("gor,ngrl->ngol", b, mixed.flatten(3)).unflatten(3, h.shape[3:]).flatten(1, 2)
        return y[0] if single else y


class Product(Reparametrisation):
    """The fixed update ``B A``: what a branch becomes where it is folded into the weight."""

    b: Tensor
    a: Tensor

    def __init__(self, b: Tensor, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("b", b.detach().clone())
        self.register_buffer("a", a.detach().clone())

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.b, self.a, 1.0


def add_branch(conv: _ConvNd, branch: Branch) -> None:
    """Let the convolution's output include the branch's from now on, in place; its class and its other hooks stay."""
    conv.add_module(NAME, branch)
    conv.register_forward_hook(_add)


def branches(model: nn.Module) -> dict[str, tuple[_ConvNd, Branch]]:
    """Every convolution that has a branch, once, with its branch, by dotted name."""
    found = {}
    for name, module in model.named_modules():
        branch = module._modules.get(NAME)
        if isinstance(module, _ConvNd) and isinstance(branch, Branch):
            found[name] = module, branch
    return found


def remove_branch(conv: _ConvNd) -> None:
    """Undo :func:`add_branch`."""
    del conv._modules[NAME]
    for key in [key for key, hook in conv._forward_hooks.items() if hook is _add]:
        del conv._forward_hooks[key]


def fold_branches(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Put each branch's static update in its place, in place, so that the model can be merged; return the model.

    Args:
        model: prepared by a method of branches.
        inputs: windows ``(N, ...)`` of the model, which show each layer its own inputs.

    Raises:
        ValueError: a branch has no static update, or the windows do not reach its layer; the message names it, and nothing is
            changed.
    """
    layers = branches(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    with inputs_shown(model, {conv: seen[name].append for name, (conv, _) in layers.items()}):
        model(inputs)
    folded: dict[str, Reparametrisation] = {}
    for name, (_, branch) in layers.items():
        static = branch.static(torch.cat(seen[name])) if seen[name] else None
        if static is None:
            kind = type(branch).__name__
            raise ValueError(f"fold_branches: {name or 'the layer'} has a {kind} that no weight comes near; keep the branch")
        folded[name] = static
    for name, (conv, branch) in layers.items():
        folded[name].belongs_to_adapted = branch.belongs_to_adapted
        remove_branch(conv)
        reparametrise(conv, folded[name])
    return model


def _add(conv: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
    branch: Branch = conv._modules[NAME]  # type: ignore[assignment]
    return y + branch.added(conv, given[0]).to(y.dtype) if branch.enabled else y  # type: ignore[arg-type]
