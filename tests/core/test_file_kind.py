"""A file's kind is told by its bytes, and a state dict is read whatever the file is called."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import lora_edge
from lora_edge.adapter_format import read_adapter
from lora_edge.files import file_kind
from lora_edge.files.file_kind import kind_of
from lora_edge.files.state_file import load_state
from lora_edge.har.data import load_npz
from lora_edge.methods.files import save_trained


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 2, 1))


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def _cut(path: Path, write, share: float = 0.5) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, X=np.zeros(3))


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


WRITE = {
    "an empty file": lambda path: path.touch(),
    file_kind.NPZ: _npz,
    file_kind.NPY: _npy,
    file_kind.SAFETENSORS: lambda path: save_file(_model().state_dict(), path),
    file_kind.ADAPTER: lambda path: lora_edge.save_adapter(lora_edge.adapt(_model(), 1), path),
    file_kind.TRAINED: lambda path: save_trained(_model(), path),
    f"{file_kind.SAFETENSORS} that is cut off": lambda p: _cut(p, lambda q: save_file(_model().state_dict(), q), 0.1),
    file_kind.TORCH: lambda path: torch.save(_model().state_dict(), path),
    file_kind.OLD_TORCH: lambda path: torch.save(_model().state_dict(), path, _use_new_zipfile_serialization=False),
    file_kind.DAMAGED_ZIP: lambda path: _cut(path, lambda q: torch.save(_model().state_dict(), q)),
    file_kind.PICKLE: lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a TorchScript archive (torch.jit.save)": lambda path: torch.jit.script(_model()).save(str(path)),
    "a tar archive": _tar,
    "a zip archive of other files": _zip,
    "a CSV table": lambda path: path.write_text("ax,ay\n1,2\n"),
    "a text file": lambda path: path.write_text("Grüße\n" * 2000),
    "a JSON file": lambda path: path.write_text('{"a": 1}'),
    "an HTML page": lambda path: path.write_text("\n<!DOCTYPE html><html>"),
    "a Git LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a PNG picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20),
    "a directory": lambda path: path.mkdir(),
    "a binary file of an unknown kind": lambda path: path.write_bytes(bytes(range(7)) * 9),
}


@pytest.mark.parametrize("kind", WRITE)
def test_the_name_does_not_matter(tmp_path, kind):
    for name in ("data.npz", "weights.safetensors", "model.pt"):
        WRITE[kind](tmp_path / name)
        assert kind_of(tmp_path / name).startswith(kind)


@pytest.mark.parametrize("kind", [kind for kind in WRITE if kind != file_kind.NPZ])
def test_data_files_of_another_kind_are_refused(tmp_path, kind):
    WRITE[kind](tmp_path / "data.npz")
    with pytest.raises((ValueError, OSError)) as caught:
        load_npz(tmp_path / "data.npz")
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in WRITE if kind != file_kind.ADAPTER])
def test_adapter_files_of_another_kind_are_refused(tmp_path, kind):
    WRITE[kind](tmp_path / "a.safetensors")
    with pytest.raises((ValueError, OSError)) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert kind.startswith(file_kind.SAFETENSORS) or kind in str(caught.value)
    assert "\n" not in str(caught.value)


READABLE = (file_kind.SAFETENSORS, file_kind.TORCH, file_kind.OLD_TORCH)


@pytest.mark.parametrize("kind", WRITE)
def test_state_files(tmp_path, kind):
    path = tmp_path / "file"
    WRITE[kind](path)
    if kind in READABLE:
        assert load_state(path).keys() == _model().state_dict().keys()
        return
    with pytest.raises((ValueError, OSError)) as caught:
        load_state(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert any(kind.startswith(known) for known in (*READABLE, "a directory")) or kind in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (lambda: {"epoch": 3, "state_dict": _model().state_dict()}, "holds a checkpoint whose 'state_dict' is a state dict"),
        (lambda: {"weight": torch.zeros(2), "epoch": 3}, "holds a dict whose 'epoch' is a int"),
        (lambda: [torch.zeros(2)], "holds a list"),
        (lambda: {}, "holds an empty dict"),
        (_model, "with objects other than tensors"),
    ],
)
def test_other_content_of_torch_save(tmp_path, content, text):
    torch.save(content(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=text) as caught:
        load_state(tmp_path / "a.pt")
    assert str(caught.value).endswith("save model.state_dict() and give that")
    assert "\n" not in str(caught.value)


def test_a_tensor_that_save_model_wrote_once_is_read_under_each_name(tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "a.safetensors"))
    state = load_state(tmp_path / "a.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(state["1.weight"], model[0].weight)
