"""How many bytes a forward keeps for backward: every distinct storage that autograd saved, parameters and buffers left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SavedBytes:
    """Context manager that counts the distinct storages saved for backward while it is open.

    Args:
        model: its parameters and buffers do not count.

    Attributes:
        total: bytes saved so far.
        storages: address and bytes of each storage counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._kept: list[Tensor] = []  # keeps addresses from being used twice while counting
        self.storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.nbytes():
            self.storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor.detach())
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)  # type: ignore[no-untyped-call]


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that one forward of ``model`` on ``x`` saves for backward; the input counts where it is saved."""
    with torch.enable_grad(), SavedBytes(model) as saved:
        model(x)
    return saved.total
