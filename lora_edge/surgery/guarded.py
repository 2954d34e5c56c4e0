"""While a model is adapted, no tool can take an adapted layer out of it without a word.

Tools that fuse, re-parameterize or convert layers (timm's ``reparameterize_model``, ultralytics' ``fuse``,
code that writes ``parent._modules[name]``) read a layer's base weight, put another layer in its
place, and its update is lost. So :func:`guard` watches the submodules of every module that holds adapted layers, at the one
dictionary that all of these write to; :func:`unguard` ends it. A module that *contains* the layer it replaces, as a wrapper
does, is allowed, and so is a copy of an adapted layer in its place.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn.frozen_bn import FrozenNorm, freeze_as
from lora_edge.nn.layers import LoRAEdgeConv


class GuardedModules(dict[str, Any]):
    """The submodules of one module, of which none that holds adapted layers can be lost.

    Raises:
        RuntimeError: at a call that would replace or remove such a submodule, or put a new convolution beside it.
    """

    def __init__(self, modules: Any, kind: type = dict, empty: frozenset[str] = frozenset()) -> None:
        super().__init__(modules)
        self.kind = kind  # the dictionary's class outside
        self.empty = empty  # names of the module's attributes that are None

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        old = self.get(name)
        if isinstance(old, FrozenNorm) and type(module) is nn.SyncBatchNorm and module.running_mean is old.running_mean:
            freeze_as(module, old)  # convert_sync_batchnorm made it of the frozen one's own tensors
        if old is not None and old is not module:
            _check(f"replace {name}", old, module)
        if isinstance(module, _ConvNd) and not isinstance(old, _ConvNd) and any(map(_updates, self.values())):
            if name in self.empty:  # nn.Module has taken the None away already
                super().__setitem__(name, None)
            raise RuntimeError(
                f"{name} is a new convolution beside adapted ones, which read as the base's; "
                "call lora_edge.merge(model) before layers are fused or added"
            )
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        if name in self:
            _check(f"remove {name}", self[name])
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        if name in self:
            _check(f"remove {name}", self[name])
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        for name in reversed(self):
            return name, self.pop(name)
        return super().popitem()

    def clear(self) -> None:
        for name, module in self.items():
            _check(f"remove {name}", module)
        super().clear()

    def update(self, *others: Any, **more: Any) -> None:
        for name, module in dict(*others, **more).items():
            self[name] = module

    def __ior__(self, other: Any) -> GuardedModules:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # whole, where a copy item by item would be taken for new layers
        return GuardedModules, (dict(self), self.kind, self.empty)


def guard(model: nn.Module) -> None:
    """Watch every module of an adapted model that has a submodule with an adapted convolution or a frozen BatchNorm.

    A model with ``save_pretrained``, which would write the base's weights and an update that nobody loads, raises there.
    """
    for module in model.modules():
        children = module._modules
        if not isinstance(children, GuardedModules) and any(_kept(child) for child in children.values()):
            empty = frozenset(name for name, value in vars(module).items() if value is None)
            module.__dict__["_modules"] = GuardedModules(children, type(children), empty)
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = refuse_save_pretrained


def unguard(model: nn.Module) -> None:
    """Undo :func:`guard`."""
    for module in model.modules():
        children = module._modules
        if isinstance(children, GuardedModules):
            module.__dict__["_modules"] = children.kind(children)
        if module.__dict__.get("save_pretrained") is refuse_save_pretrained:
            del module.__dict__["save_pretrained"]


def refuse_save_pretrained(*_: Any, **__: Any) -> NoReturn:
    """What ``save_pretrained`` is while the model is adapted.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "save_pretrained would save the base's weights without the update; call lora_edge.merge(model) first, "
        "or save the update with lora_edge.save_adapter"
    )


def _kept(module: nn.Module | None) -> list[nn.Module]:
    """The layers in a module that must not be lost."""
    return [] if module is None else [m for m in module.modules() if isinstance(m, (LoRAEdgeConv, FrozenNorm))]


def _updates(module: nn.Module | None) -> int:
    """How many adapted convolutions a module holds."""
    return sum(isinstance(m, LoRAEdgeConv) for m in _kept(module))


def _check(what: str, old: nn.Module | None, new: nn.Module | None = None) -> None:
    """Refuse what leaves fewer layers than there were; another adapted layer may take the place of one."""
    if _updates(new) < _updates(old):
        raise RuntimeError(
            f"cannot {what}: it holds an adapted convolution, whose update would be lost; call lora_edge.merge(model) first"
        )
    if len(_kept(new)) < len(_kept(old)):
        raise RuntimeError(
            f"cannot {what}: it holds a BatchNorm that adapt froze, which needs no synchronizing or fusing while it is "
            "frozen; do it before lora_edge.adapt, or call lora_edge.merge(model) first"
        )
