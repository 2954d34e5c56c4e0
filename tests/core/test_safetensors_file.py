"""A state dict is written so that it loads strictly into the same architecture, or refused by name."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_edge.files.safetensors_file import read_safetensors, write_safetensors


class Aliased(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 4, 3)
        self.encoder = self.stem


class Tied(nn.Module):
    """One parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 3, 3), nn.Conv1d(3, 3, 3)
        self.b.weight = self.a.weight


class Sliced(nn.Module):
    """Buffers that are overlapping parts of one memory, and a transposed one."""

    def __init__(self):
        super().__init__()
        table = torch.randn(6, 4)
        for name, value in (("whole", table), ("part", table[1:3]), ("rows", table[::2]), ("turned", table.T)):
            self.register_buffer(name, value)
        self.register_buffer("wide", torch.randn(1, 5).expand(3, 5))


def channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)


def small_dtypes() -> nn.Module:
    model = nn.Module()
    model.register_buffer("narrow", torch.randn(3, 4).half().T)
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("flag", torch.tensor(True))
    return model


@pytest.mark.parametrize("make", [Aliased, Tied, Sliced, channels_last, small_dtypes])
def test_it_loads_strictly_into_the_same_architecture(tmp_path, make):
    model, other = make(), make()
    before = copy.deepcopy(model.state_dict())
    write_safetensors(model.state_dict(), tmp_path / "a.safetensors", {"axes": "x"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    state = load_file(tmp_path / "a.safetensors")
    if not isinstance(other, Sliced):  # torch itself refuses to write into an expanded buffer
        other.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
        assert state[name].dtype == value.dtype
        assert value.stride() == before[name].stride()
    assert read_safetensors(tmp_path / "a.safetensors")[1] == {"axes": "x"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"steps": 3}, "odd is a dict; safetensors holds tensors only"),
        (torch.eye(3).to_sparse(), "odd is a sparse_coo tensor"),
        (torch.zeros(3, device="meta"), "odd is a meta tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "odd is a quantized tensor"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, value, text):
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(ValueError, match=text) as caught:
        write_safetensors({"fine": torch.zeros(2), "odd": value}, path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_folder_at_the_path_of_the_file(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError, match="is a directory"):
        write_safetensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(OSError, match="is a directory; give the path of one that me wrote"):
        read_safetensors(tmp_path / "a.safetensors", "me")
