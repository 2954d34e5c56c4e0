"""How a module's own forward runs with fused blocks: the forward plan.

:func:`make_plan` evaluates a module's forward (:mod:`lora_edge.nn.fuser`), replaces each block of its graph by one call of
:func:`lora_edge.nn.fused_block.fused_block`, and compiles the graph to a Python function. A plan is valid only while its guards
hold, that is while everything that it was made from is unchanged.

Where a forward is not proven pure there is no plan; the reason is in :class:`NoPlan`. An ``nn.Sequential`` of which only some
children are proven pure gets a :class:`SequentialPlan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_edge.nn.fused_block import fused_block
from lora_edge.nn.fuser.access import base_of
from lora_edge.nn.fuser.evaluator import Evaluator
from lora_edge.nn.fuser.find_blocks import Fuser
from lora_edge.nn.fuser.guards import Guards, static
from lora_edge.nn.fuser.layout import Layout
from lora_edge.nn.fuser.pure import SCALARS
from lora_edge.nn.fuser.values import Module, Refused
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.ops.activation import Activation

Kinds = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]  # of the positional and of the keyword arguments


@dataclass
class ForwardPlan:
    """How a module's forward runs while the guards hold.

    Attributes:
        forward: called as ``forward(module, *tensors)``.
        guards: on everything that the plan was made from.
        blocks: name of each fused convolution, with what was fused, such as "conv + bn + add + relu".
        reasons: name of each convolution that was not fused, with the reason.
        activations: name of each fused convolution, with the activation at the end of its block.
        layer: one adapted layer, if there is any; it tells whether the model is inside ``lora_edge.disabled``.
    """

    forward: Callable[..., Any]
    guards: Guards
    blocks: dict[str, str]
    reasons: dict[str, str]
    activations: dict[str, Activation | None]
    layer: LoRAEdgeConv | None

    def run(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        """Run the forward of ``module`` on its tensor arguments, in order."""
        return self.forward(module, *tensors)


@dataclass
class SequentialPlan:
    """How an ``nn.Sequential`` runs if some of its children are not proven pure: each run of those that are has a plan.

    Attributes:
        pieces: for each run of children, its plan (None where they are called one by one) and their names.
        guards: on the list of children.
        layer: as in :class:`ForwardPlan`.
    """

    pieces: list[tuple[ForwardPlan | None, list[str]]]
    guards: Guards
    layer: LoRAEdgeConv | None

    def run(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        """Run the forward of ``module`` on its one input."""
        (x,) = tensors
        for plan, names in self.pieces:
            if plan is not None and type(x) is Tensor and plan.guards.hold(module):
                x = plan.run(module, [x])
            else:
                for name in names:
                    x = module._modules[name](x)  # type: ignore[misc]
        return x

    def _join(self, part: str) -> dict[str, Any]:
        return {name: value for plan, _ in self.pieces if plan is not None for name, value in getattr(plan, part).items()}

    @property
    def blocks(self) -> dict[str, str]:
        return self._join("blocks")

    @property
    def reasons(self) -> dict[str, str]:
        return self._join("reasons")

    @property
    def activations(self) -> dict[str, Activation | None]:
        return self._join("activations")


@dataclass
class NoPlan:
    """Why a module has no plan while the guards hold; its own forward runs."""

    why: str
    guards: Guards


def kinds_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kinds | None, list[Tensor]]:
    """Return what a plan is made for, and the tensors among the arguments.

    The kind of a tensor is its number of dimensions, that of a scalar its value. None where an argument is neither.
    """
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        return ((("tensor", args[0].dim()),), ()), [args[0]]
    tensors: list[Tensor] = []
    kinds = [_kind(value, tensors) for value in args]
    named = [(name, _kind(value, tensors)) for name, value in kwargs.items()]
    if not tensors or None in kinds or any(kind is None for _, kind in named):
        return None, []
    return (tuple(kinds), tuple(named)), tensors


def _kind(value: Any, tensors: list[Tensor]) -> Any:
    if type(value) in (Tensor, nn.Parameter):
        tensors.append(value)
        return "tensor", value.dim()
    if type(value) in SCALARS and type(value) is not float:
        return "known", value, type(value)
    return ("known", value, repr(value)) if type(value) is float else None


def make_plan(module: nn.Module, kinds: Kinds, training: bool | None = None) -> ForwardPlan | SequentialPlan | NoPlan:
    """Evaluate a module's forward and fuse its blocks. Reads the model and does not change it.

    Args:
        module: a module of an adapted model.
        kinds: of its arguments, from :func:`kinds_of`.
        training: the value to assume for ``self.training``; None for the current one.
    """
    with Evaluator(module, training) as evaluator:
        try:
            evaluator.run([kind[:2] for kind in kinds[0]], {name: kind[:2] for name, kind in kinds[1]})
        except (Refused, RecursionError) as refusal:
            why = NoPlan(str(refusal), evaluator.guards.fix())
        else:
            return _finish(module, evaluator)
    iterates = static(type(module), "__iter__") is nn.Sequential.__iter__
    if iterates and base_forward(module) is nn.Sequential.forward and len(kinds[0]) == 1 and not kinds[1]:
        return _make_sequential_plan(module, training) or why
    return why


def base_forward(module: nn.Module) -> Any:
    """Return the forward of a module's own class, whether :func:`lora_edge.nn.blocks.fuse` re-classed it or not."""
    return static(getattr(type(module), "base_class", type(module)), "forward")


def _finish(module: nn.Module, evaluator: Evaluator) -> ForwardPlan:
    modules = dict(module.named_modules(remove_duplicate=False))
    fuser = Fuser(evaluator.graph, modules, evaluator.guards, fused_block)
    blocks, reasons = fuser.run()
    Layout(evaluator.graph, modules, fused_block).run()
    evaluator.graph.lint()
    code = evaluator.graph.python_code("self")
    scope = {**code.globals, "__name__": __name__}
    exec(code.src, scope)
    layer = next((m for m in module.modules() if isinstance(m, LoRAEdgeConv)), None)
    return ForwardPlan(scope["forward"], evaluator.guards.fix(), blocks, reasons, fuser.activations, layer)


def _make_sequential_plan(module: nn.Module, training: bool | None) -> SequentialPlan | None:
    """Plan the runs of children that are proven pure; None if none of them has a block."""
    with Evaluator(module, training) as whole:
        children = list(whole.reader.children(Module(module, "")))
        for name in ("forward", "__iter__"):
            whole.guards.class_attribute(base_of(type(module)), name)
        guards = whole.guards.fix()
    runs: list[list[str]] = [[]]
    for name in children:
        if _run_of(module, [name], training) is None:
            runs += [[name], []]
        else:
            runs[-1].append(name)
    pieces = [(_run_of(module, names, training), names) for names in runs if names]
    if not any(plan is not None and plan.blocks for plan, _ in pieces):
        return None
    layer = next((m for m in module.modules() if isinstance(m, LoRAEdgeConv)), None)
    return SequentialPlan(pieces, guards, layer)


def _run_of(module: nn.Module, names: list[str], training: bool | None) -> ForwardPlan | None:
    with Evaluator(module, training) as evaluator:
        children = evaluator.reader.children(Module(module, ""))
        try:
            x = evaluator.argument(("tensor", None))
            for name in names:
                x = evaluator.follow(functools.partial(evaluator.calls.enter, children[name], [x], {}))
            evaluator.finish(x)
        except (Refused, RecursionError):
            return None
        return _finish(module, evaluator)
