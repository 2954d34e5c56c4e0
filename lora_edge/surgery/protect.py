"""While a model is adapted, a tool that would silently remove an adapted layer raises an error instead.

Tools that fuse, re-parameterize or convert layers (timm's ``reparameterize_model``, ultralytics' ``fuse``, code that writes
``parent._modules[name]``) read a layer's base weight and put another layer in its place, and its update is lost. So
:func:`protect` replaces the dictionary of submodules, which all of these write to, in every module that holds adapted layers;
:func:`unprotect` undoes it. Replacing a layer by a module that *contains* it, as a wrapper does, is allowed, and so is
replacing it by a copy.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn.frozen_bn import FrozenNorm, freeze_as
from lora_edge.nn.layers import LoRAEdgeConv


class ProtectedModules(dict[str, Any]):
    """A module's dictionary of submodules that refuses to lose adapted layers.

    Every method that would replace or remove a submodule that holds adapted layers, or add a convolution beside it, raises
    RuntimeError.
    """

    def __init__(self, modules: Any, kind: type = dict, empty: frozenset[str] = frozenset()) -> None:
        super().__init__(modules)
        self.kind = kind  # the class of the dictionary that it replaces
        self.empty = empty  # names of the module's attributes that are None

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        old = self.get(name)
        if isinstance(old, FrozenNorm) and type(module) is nn.SyncBatchNorm and module.running_mean is old.running_mean:
            freeze_as(module, old)  # convert_sync_batchnorm made it from the frozen one's own tensors
        if old is not None and old is not module:
            _check(f"replace {name}", old, module)
        if isinstance(module, _ConvNd) and not isinstance(old, _ConvNd) and any(map(_updates, self.values())):
            if name in self.empty:  # nn.Module has already removed the None
                super().__setitem__(name, None)
            raise RuntimeError(
                f"{name} is a new convolution beside adapted ones, whose weights are the base's; "
                "call lora_edge.merge(model) before fusing or adding layers"
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

    def __ior__(self, other: Any) -> ProtectedModules:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # at once, because items copied one by one would look like new layers
        return ProtectedModules, (dict(self), self.kind, self.empty)


def protect(model: nn.Module) -> None:
    """Protect every adapted convolution and frozen BatchNorm of an adapted model.

    A model's ``save_pretrained`` raises as well: it would write the base's weights with an update that nothing loads.
    """
    for module in model.modules():
        children = module._modules
        if not isinstance(children, ProtectedModules) and any(_kept(child) for child in children.values()):
            empty = frozenset(name for name, value in vars(module).items() if value is None)
            module.__dict__["_modules"] = ProtectedModules(children, type(children), empty)
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = refuse_save_pretrained


def unprotect(model: nn.Module) -> None:
    """Undo :func:`protect`."""
    for module in model.modules():
        children = module._modules
        if isinstance(children, ProtectedModules):
            module.__dict__["_modules"] = children.kind(children)
        if module.__dict__.get("save_pretrained") is refuse_save_pretrained:
            del module.__dict__["save_pretrained"]


def refuse_save_pretrained(*_: Any, **__: Any) -> NoReturn:
    """Stand in for ``save_pretrained`` while the model is adapted.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "save_pretrained would save the base's weights without the update; call lora_edge.merge(model) first, "
        "or save the update with lora_edge.save_adapter"
    )


def _kept(module: nn.Module | None) -> list[nn.Module]:
    """Return the layers in a module that must not be lost."""
    return [] if module is None else [m for m in module.modules() if isinstance(m, (LoRAEdgeConv, FrozenNorm))]


def _updates(module: nn.Module | None) -> int:
    """Return the number of adapted convolutions in a module."""
    return sum(isinstance(m, LoRAEdgeConv) for m in _kept(module))


def _check(what: str, old: nn.Module | None, new: nn.Module | None = None) -> None:
    """Refuse a change that leaves fewer protected layers; another adapted layer may replace one."""
    if _updates(new) < _updates(old):
        raise RuntimeError(
            f"cannot {what}: it holds an adapted convolution, whose update would be lost; call lora_edge.merge(model) first"
        )
    if len(_kept(new)) < len(_kept(old)):
        raise RuntimeError(
            f"cannot {what}: it holds a BatchNorm that adapt froze, which needs no synchronizing or fusing while it is "
            "frozen; do it before lora_edge.adapt, or call lora_edge.merge(model) first"
        )
