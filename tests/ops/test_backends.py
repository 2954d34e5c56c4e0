"""The choice of the backend: argument over context over environment; unknown names, and names that do not work here."""

from __future__ import annotations

import copy
import pickle
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lora_edge
from lora_edge.ops import backends, tt_conv, tt_fuse, use_backend
from lora_edge.ops.backends import VARIABLE, choose_backend
from lora_edge.ops.engines.cuda import available

ORIN = {"name": "Orin", "capability": "8.7", "multiprocessors": 8, "memory": 8 << 30, "l2": 2 << 20}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def build(monkeypatch):
    """Pretend that this build of the extension is on a machine with these devices and a torch with CUDA."""

    def put(cuda="12.6", architectures="8.7+PTX", devices=(ORIN,), error=None, torch_has_cuda=True):
        module: Any = ModuleType("_C")
        about = {"cuda": cuda, "architectures": architectures, "compiler": "gcc", "emulator": False}
        found = {"driver": "12.6", "runtime": "12.6", "count": len(devices), "devices": list(devices), "error": error}
        module.build_info, module.device_info = lambda: about, lambda: found
        monkeypatch.setattr(available, "_extension_reason", lambda: None)
        monkeypatch.setattr(available, "load", lambda: module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_cuda)
        available.runtime.cache_clear()

    yield put
    monkeypatch.undo()
    available.runtime.cache_clear()


def arguments():
    return torch.randn(2, 6, 8, 8), torch.randn(8, 6, 3, 3), torch.randn(8, 2), torch.randn(2, 6, 3, 3)


def test_argument_over_context_over_environment(monkeypatch, build):
    build()
    assert choose_backend("auto", "op") == "auto"
    monkeypatch.setenv(VARIABLE, "torch")
    assert choose_backend("auto", "op") == "torch"
    with use_backend("cuda"):
        assert choose_backend("auto", "op") == "cuda"
        assert choose_backend("torch", "op") == "torch"
        with use_backend("auto"):  # names nothing, so the environment decides
            assert choose_backend("auto", "op") == "torch"
    assert choose_backend("auto", "op") == "torch"


def test_context_is_left_after_an_error_and_does_not_reach_other_threads(build):
    build()
    with pytest.raises(KeyError), use_backend("cuda"):
        raise KeyError
    assert choose_backend("auto", "op") == "auto"
    seen: list[str] = []
    with use_backend("cuda"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend("auto", "op")))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"tt_conv: backend is 'tpu'; give one of 'auto', 'cuda', 'triton', 'cpu', 'torch'"):
        tt_conv(*arguments(), backend="tpu")
    with pytest.raises(ValueError, match="use_backend: backend is 'tpu'"), use_backend("tpu"):
        pass
    with pytest.raises(ValueError, match="adapt: backend is 'tpu'"):
        lora_edge.adapt(nn.Sequential(nn.Conv1d(3, 4, 3)), backend="tpu")
    monkeypatch.setenv(VARIABLE, "gpu")
    with pytest.raises(ValueError, match=r"tt_fuse: backend is 'gpu' \(from LORA_EDGE_BACKEND\)"):
        tt_fuse(*arguments()[1:])


def test_named_backends_that_do_not_work_here(monkeypatch, build):
    build(cuda=None)
    for backend in ("cuda", "triton"):
        with pytest.raises(
            RuntimeError, match=f"tt_conv: backend '{backend}' is (built without CUDA|missing|too old|without an active driver)"
        ) as caught:
            tt_conv(*arguments(), backend=backend)
        assert "\n" not in str(caught.value)
        model = nn.Sequential(nn.Conv1d(3, 4, 3))
        with pytest.raises(RuntimeError, match=f"adapt: backend '{backend}' is"):
            lora_edge.adapt(model, backend=backend)
        assert type(model[0]) is nn.Conv1d
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' \(from LORA_EDGE_BACKEND\) is built without CUDA"):
        tt_conv(*arguments())
    assert tt_conv(*arguments(), backend="torch").shape == (2, 8, 6, 6)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({}, "available"),
        ({"cuda": None}, "built without CUDA: put nvcc on PATH and install lora_edge again with LORA_EDGE_CUDA=1"),
        ({"devices": [], "error": "no NVIDIA driver is loaded"}, "without a device: no NVIDIA driver is loaded"),
        ({"devices": []}, "without a device: the driver finds none"),
        ({"torch_has_cuda": False}, f"without a torch that has CUDA: this one is {torch.__version__}"),
        (
            {"architectures": "9.0"},
            "not built for this device: Orin has capability 8.7, the build 9.0; "
            "install lora_edge again with TORCH_CUDA_ARCH_LIST=8.7",
        ),
        ({"architectures": "9.0", "devices": [ORIN, {**ORIN, "capability": "9.0"}]}, "available"),
    ],
)
def test_reasons(build, how, reason):
    build(**how)
    found = backends()
    assert list(found) == ["torch", "cuda", "triton", "cpu"]
    assert (found["torch"], found["cuda"]) == ("available", reason)
    assert found["triton"] != "available"


def test_not_built(monkeypatch):
    monkeypatch.setattr(available, "_extension_reason", lambda: "not built; do this")
    available.runtime.cache_clear()
    try:
        assert backends()["cuda"] == "not built; do this"
    finally:
        available.runtime.cache_clear()


def test_a_second_device_that_the_build_does_not_cover(build):
    build(architectures="9.0", devices=[ORIN, {**ORIN, "capability": "9.0"}])
    assert "Orin has capability 8.7" in available.reason(torch.device("cuda", 0))
    assert available.reason(torch.device("cuda", 1)) is None


def test_tensors_elsewhere(build):
    build()
    with pytest.raises(RuntimeError, match="backend 'cuda' does not support this call: its tensors are on cpu"):
        tt_conv(*arguments(), backend="cuda")
    assert tt_conv(*arguments()).shape == (2, 8, 6, 6)  # under "auto" it runs on torch, by the same rule


@pytest.mark.parametrize(
    ("capability", "architectures", "covered"),
    [
        ("8.7", "8.7", True),
        ("8.7", "8.0", True),  # machine code runs on later devices of its generation
        ("8.9", "8.7+PTX", True),
        ("9.0", "8.7+PTX", True),
        ("9.0", "8.7", False),
        ("8.6", "8.7+PTX", False),
        ("8.0", "8.6;8.7+PTX", False),
        ("8.6", "8.0;8.7+PTX", True),
        ("10.0", "9.0+PTX", True),
        ("9.0", "9.0a", True),
        ("10.0", "9.0a+PTX", False),
        ("8.7", "", False),
    ],
)
def test_covers(capability, architectures, covered):
    assert available.covers(capability, architectures) is covered


def test_layers_keep_their_backend():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    lora_edge.adapt(model, targets="0", backend="torch")
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [other[0].backend, other[3].backend] == ["torch", "torch"]
        assert [row.backend for row in lora_edge.summary(other).layers] == ["torch"]
    lora_edge.merge(model)
    assert "backend" not in model[0].__dict__ | model[3].__dict__


def test_a_layer_from_elsewhere_says_why_it_does_not_run(build):
    """A layer that was adapted with backend="cuda" and pickled, on a machine without CUDA."""
    build(cuda=None)
    layer = lora_edge.LoRAEdgeConv1d(3, 4, 3)
    layer.backend = "cuda"
    with pytest.raises(RuntimeError, match="backend 'cuda' is built without CUDA"):
        layer(torch.randn(2, 3, 9))
    assert lora_edge.summary(layer).layers[0].backend.startswith("none (cuda is built without CUDA")
