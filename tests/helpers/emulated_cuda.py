"""The fixture ``kernels``: the CUDA engine on CPU tensors, its kernels run by the emulator."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from helpers import emulator
from lora_edge.ops.engines.cuda import available


class Launches:
    """Counts launches: each asks for its stream once."""

    name = "cuda"
    count = 0

    def stream(self, index: int) -> int:
        self.count += 1
        return 0


@pytest.fixture
def kernels(monkeypatch):
    """The CUDA engine on CPU tensors, in full float32; counts its launches."""
    if importlib.util.find_spec("pybind11") is None or shutil.which(emulator.CXX) is None:
        pytest.skip("pybind11 or a C++ compiler is missing: the emulator is not built")
    launches = Launches()
    runtime = available.Runtime(emulator.extension(), "cpu", launches.stream)
    monkeypatch.setattr(available, "runtime", lambda: runtime)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return launches
