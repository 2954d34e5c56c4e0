"""Whole-block fusing: re-class a model's modules so that their forwards run with fused blocks.

:func:`fuse` re-classes each module whose forward is proven pure to a subclass of its own class. Where gradients are needed,
the subclass's forward runs a forward plan (:mod:`lora_edge.nn.forward_plan`); when the plan's guards no longer hold, another
plan is made or the module's own forward runs. Where a forward is not proven pure, its children are fused individually, and in
an ``nn.Sequential`` each run of children that are.

Without gradients, under ``torch.compile`` and inside ``lora_edge.disabled`` the module's own forward runs, bit-identical to the
base model's. Plans are not part of a module's state: pickle, deepcopy and state dict ignore them.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_edge.environment.torch_private import has_any_global_hook
from lora_edge.nn.forward_plan import ForwardPlan, Kinds, NoPlan, SequentialPlan, base_forward, kinds_of, make_plan
from lora_edge.nn.fuser.find_blocks import is_conv
from lora_edge.nn.fuser.guards import Guards
from lora_edge.nn.fuser.source import asks_for_its_class
from lora_edge.ops.activation import Activation
from lora_edge.ops.transforms import plain_ops_only

MOST_PLANS = 8  # kept per module: for its modes, kinds of arguments and flags
MOST_MADE = 64  # ever made for a module: making one takes as long as several training steps
_CALL = nn.Module.__call__  # while it is patched, as torch.fx does when tracing, no plan runs
_PLANS, _PLANS_MADE = "_lean_plans", "_lean_plans_made"
_lock = threading.RLock()


@dataclass
class FuseReport:
    """What :func:`fuse` did to a model, by the dotted names of convolutions.

    ``blocks`` says what was fused with each, ``reasons`` why one was not fused, ``activations`` which one ends its block.
    """

    blocks: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    activations: dict[str, Activation | None] = field(default_factory=dict)


class LeanModule(nn.Module):
    """Mixin of the re-classed modules: their forward runs a plan if gradients are needed."""

    base_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the user's own ``__init_subclass__``, which might register each subclass."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        getstate = getattr(self.base_class, "__getstate__", None)
        state = dict(self.__dict__) if getstate is None else getstate(self)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key not in (_PLANS, _PLANS_MADE)}
        return _rebuild, (self.base_class,), state


def _forward_of(base_class: type[nn.Module]) -> Callable[..., Any]:
    own_forward = base_class.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _plan_is_wanted():
            kinds, tensors = kinds_of(args, kwargs)
            if kinds is not None:
                plan = current_plan(self, kinds)
                if not isinstance(plan, NoPlan) and (plan.layer is None or plan.layer.enabled):
                    return plan.run(self, tensors)
        return base_class.forward(self, *args, **kwargs)

    return forward


def fuse(model: nn.Module) -> FuseReport:
    """Re-class every module of an adapted model that can run a plan; return what was fused and why the rest was not."""
    found = FuseReport()
    _fuse(model, "", found, False)
    return found


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for module in model.modules():
        if isinstance(module, LeanModule):
            for name in (_PLANS, _PLANS_MADE):
                module.__dict__.pop(name, None)
            module.__class__ = module.base_class  # type: ignore[assignment]


def describe(model: nn.Module) -> FuseReport:
    """Report the blocks as they would run now: hooks or layers may have changed since :func:`fuse`."""
    found = FuseReport()
    _describe(model, "", found)
    return found


def current_plan(module: nn.Module, kinds: Kinds) -> ForwardPlan | SequentialPlan | NoPlan:
    """Return the plan for arguments of these kinds whose guards hold; make one if there is none."""
    entries = module.__dict__.get(_PLANS, ())
    for made_for, plan in entries:
        if made_for == kinds and plan.guards.hold(module):
            return plan
    made = module.__dict__.get(_PLANS_MADE, 0)
    if made >= MOST_MADE:
        return NoPlan("the values that its forward depends on change too often", Guards(module).fix())
    plan = make_plan(module, kinds)
    with _lock:
        entries = module.__dict__.get(_PLANS, ())
        module.__dict__[_PLANS] = ((kinds, plan), *entries)[:MOST_PLANS]
        module.__dict__[_PLANS_MADE] = made + 1
    return plan


def _plan_is_wanted() -> bool:
    if not torch.is_grad_enabled():
        return False
    traced = torch.compiler.is_compiling() or plain_ops_only()
    return not traced and nn.Module.__call__ is _CALL and not has_any_global_hook()


def _rebuild(base_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_lean_class(base_class))


def _lean_class(base_class: type[nn.Module]) -> type[LeanModule]:
    """Return the one subclass of a class whose forward runs plans.

    Only the base class refers to it, so the two are collected together.
    """
    with _lock:
        for cls in type.__subclasses__(base_class):
            if cls.__dict__.get("base_class") is base_class and issubclass(cls, LeanModule):
                return cls
        names = {
            "__module__": base_class.__module__,
            "__qualname__": base_class.__qualname__,
            "base_class": base_class,
            "forward": _forward_of(base_class),
        }
        return type(base_class.__name__, (LeanModule, base_class), names)


def _fuse(module: nn.Module, name: str, found: FuseReport, covered: bool) -> None:
    """Re-class a module and its children.

    ``covered``: a module above has a plan, so this one needs a plan of its own only when that one does not hold.
    """
    has_convs = any(is_conv(m) for m in module.modules())
    if not has_convs or is_conv(module) or isinstance(module, LeanModule):
        return
    if asks_for_its_class(type(module)):
        reason = f"{type(module).__name__} reads its own class, so it is not re-classed"
        if not covered:
            found.reasons.update({_join(name, n): reason for n, child in module.named_children() if is_conv(child)})
    elif covered:
        module.__class__ = _lean_class(type(module))  # type: ignore[assignment]
    else:
        plan = _likely_plan(module)
        if not isinstance(plan, NoPlan):
            module.__class__ = _lean_class(type(module))  # type: ignore[assignment]
        covered = _report(plan, module, name, found)
    for child_name, child in module.named_children():
        _fuse(child, _join(name, child_name), found, covered)


def _describe(module: nn.Module, name: str, found: FuseReport) -> None:
    if is_conv(module):
        return
    plan = _likely_plan(module) if isinstance(module, LeanModule) else None
    if plan is None or not _report(plan, module, name, found):
        for child_name, child in module.named_children():
            _describe(child, _join(name, child_name), found)


def _report(plan: ForwardPlan | SequentialPlan | NoPlan, module: nn.Module, name: str, found: FuseReport) -> bool:
    """Record what a plan fuses; return whether it covers the whole module."""
    if isinstance(plan, NoPlan):
        found.reasons.update({_join(name, n): plan.why for n, child in module.named_children() if is_conv(child)})
        return False
    found.blocks.update({_join(name, conv): what for conv, what in plan.blocks.items()})
    found.reasons.update({_join(name, conv): reason for conv, reason in plan.reasons.items()})
    found.activations.update({_join(name, conv): last for conv, last in plan.activations.items()})
    return isinstance(plan, ForwardPlan)


def _likely_plan(module: nn.Module) -> ForwardPlan | SequentialPlan | NoPlan:
    """Return the plan of the last run, or else one for as many tensors as the forward needs, preferably for training mode."""
    for kinds, _ in module.__dict__.get(_PLANS, ())[:1]:
        return current_plan(module, kinds)
    kinds = _likely_kinds(module)
    if kinds is None:
        return NoPlan("its forward has no readable signature", Guards(module).fix())
    plan = make_plan(module, kinds, True)
    if isinstance(plan, NoPlan):
        other = make_plan(module, kinds, False)
        return plan if isinstance(other, NoPlan) else other
    return plan


def _likely_kinds(module: nn.Module) -> Kinds | None:
    try:
        parameters = list(inspect.signature(base_forward(module)).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    dims = next(m.weight.dim() for m in module.modules() if is_conv(m))  # type: ignore[operator, union-attr]
    needed = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    positional = [("tensor", dims) for p in needed if p.kind is not p.KEYWORD_ONLY] or [("tensor", dims)] * takes_any
    named = [(p.name, ("tensor", dims)) for p in needed if p.kind is p.KEYWORD_ONLY]
    return (tuple(positional), tuple(named)) if positional or named else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
