"""Measure how many bytes training keeps and needs, in two ways that check each other.

:class:`SavedBytes` counts every distinct storage that autograd's saved-tensor hooks see. :class:`StorageTracker` watches every
operation and each storage that it creates, by weak reference, so that tensors hidden on a function's context count too. Both
leave out the model's parameters and buffers. Neither sees storages inside a single torch operation (oneDNN's reordered copies).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes:
    """Context manager that counts the distinct storages that are saved for backward inside.

    Args:
        model: its parameters and buffers do not count.

    Attributes:
        storages: bytes of each counted storage, by address.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._kept: list[Tensor] = []  # so that no address is reused while counting
        self.storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(self.storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.nbytes():
            self.storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor.detach())
        return tensor.detach()  # a function that saves its own output would otherwise keep itself alive in a cycle

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)  # type: ignore[no-untyped-call]
        self._kept.clear()  # the hooks refer to self, so these would live until the next garbage collection


class StorageTracker(TorchDispatchMode):
    """Context manager that counts the bytes of storages created inside: alive now, and at the peak.

    Args:
        known: tensors whose storages do not count, such as the model's parameters and the input.

    Attributes:
        peak: the most bytes that were alive at once, measured after each operation.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def alive(self) -> int:
        """Bytes alive now."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                entry = self._alive.get(key)
                if key not in self._known and (entry is None or entry[0].expired()):
                    self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that one forward of ``model`` on ``x`` saves for backward; the input counts if it is saved."""
    with torch.enable_grad(), SavedBytes(model) as saved:
        model(x)
    return saved.total


def training_step_bytes(model: nn.Module, x: Tensor, loss: Any) -> dict[str, int]:
    """Return the bytes of one training step, forward and backward.

    Args:
        model: in the mode and state to measure; gradients are cleared before and after.
        x: input.
        loss: ``loss(output)`` returns the scalar to differentiate.

    Returns:
        ``saved_hooks`` and ``saved_alive``, two measures of what is kept between forward and backward (the second one without
        the loss and the output); ``forward_peak`` and ``backward_peak``, the most bytes of new storages alive at once.
    """
    own = [*model.parameters(), *model.buffers(), x]
    for parameter in model.parameters():
        parameter.grad = None
    with SavedBytes(model) as saved:
        loss(model(x))
    forward = StorageTracker(own)
    with forward:
        output = model(x)
    born = forward.alive - _bytes_of(output)
    value = loss(output)
    del output
    backward = StorageTracker([*own, value])
    with backward:
        value.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return {
        "saved_hooks": saved.total,
        "saved_alive": born,
        "forward_peak": forward.peak,
        "backward_peak": backward.peak,
    }


def _bytes_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
