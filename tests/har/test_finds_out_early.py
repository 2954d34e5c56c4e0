"""``lora-edge adapt`` on unexpected models and data: it works, gives a row with a reason, or refuses before any training."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

from helpers.command import exit_code
from helpers.windows import own
from lora_edge.cli import main
from lora_edge.har import main_job, source

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, i, c):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv1d(i, 8, 5, padding=2), nn.BatchNorm1d(8), nn.Linear(8, c)
        self.change()

    def change(self):
        pass

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).mean(-1))


class Aliased(Net):
    def change(self):
        self.encoder = self.stem


class SharedHead(Net):
    def change(self):
        self.register_buffer("copy_of_mean", self.norm.running_mean)
        self.other = nn.Linear(8, self.head.out_features)
        self.other.weight = self.head.weight


class Images(nn.Module):
    def __init__(self, i, c):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(i, 8, (1, 5)), nn.BatchNorm2d(8), nn.Conv2d(8, 8, (1, 3))
        self.head = nn.Linear(8, c)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x[:, :, None]))))).mean((2, 3)))


class Sparse(Net):
    def change(self):
        self.register_buffer("graph", torch.eye(3).to_sparse())


class Extra(Net):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


class OnlyInTraining(Net):
    def forward(self, x):
        if self.training:
            raise IndexError("no such label\\nin this mode")
        return super().forward(x)


def aliased(in_channels, num_classes): return Aliased(in_channels, num_classes)
def shared_head(in_channels, num_classes): return SharedHead(in_channels, num_classes)
def images(in_channels, num_classes): return Images(in_channels, num_classes)
def sparse(in_channels, num_classes): return Sparse(in_channels, num_classes)
def extra(in_channels, num_classes): return Extra(in_channels, num_classes)
def only_in_training(in_channels, num_classes): return OnlyInTraining(in_channels, num_classes)
def fails(in_channels): return 1 / 0


def layers(i, c, norm, *head):
    head = head or (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, c))
    return nn.Sequential(nn.Conv1d(i, 8, 5, bias=False), norm, nn.ReLU(), *head)


def group_norm(in_channels, num_classes): return layers(in_channels, num_classes, nn.GroupNorm(2, 8))
def no_affine(in_channels, num_classes): return layers(in_channels, num_classes, nn.BatchNorm1d(8, affine=False))
def conv_head(in_channels, num_classes):
    head = nn.Conv1d(8, num_classes, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    return layers(in_channels, num_classes, nn.BatchNorm1d(8), *head)
def bare(in_channels, num_classes):
    return nn.Sequential(nn.Conv1d(in_channels, num_classes, 3), nn.AdaptiveMaxPool1d(1), nn.Flatten())
def late_norm(in_channels, num_classes):
    late = nn.BatchNorm1d(8), nn.Linear(8, num_classes)
    return nn.Sequential(nn.Conv1d(in_channels, 8, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), *late)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    own(tmp_path / "own.npz")
    (tmp_path / "odd_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    """Make any training on the windows fail the test."""
    for module in (source, main_job):
        monkeypatch.setattr(module, "pretrain", lambda *_: pytest.fail("trained before the check"), raising=True)


def arguments(factory: str | None = None, **change: str) -> list[str]:
    options = {"--data": "own.npz", "--target-subject": "1", "--steps": "2", "--epochs": "1", "--out": "out", **change}
    if factory is not None:
        options["--model"] = f"odd_models:{factory}"
    return ["adapt", *[part for pair in options.items() for part in pair]]


def rows() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(Path("out/results.json").read_text())["rows"]}


def build(name: str) -> nn.Module:
    import odd_models

    return getattr(odd_models, name)(4, 3)


@pytest.mark.parametrize("factory", ["aliased", "shared_head", "images"])
def test_what_safetensors_refuses_is_saved_and_loads_strictly(folder, factory):
    assert main(arguments(factory)) == 0
    assert len(os.listdir("out")) == 5
    for name in ("merged.safetensors", next(n for n in os.listdir("out") if n.startswith("source-"))):
        state, model = load_file(f"out/{name}"), build(factory)
        model.load_state_dict(state)
        assert model.state_dict().keys() == state.keys()
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), key  # all names of a shared tensor have the same value
    assert main(arguments(factory)) == 0  # the source file is read again


def test_weights_that_hold_a_shared_tensor_once(folder):
    model = build("aliased")
    save_model(model, "w.safetensors")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder")}
    torch.save(state, "w.pt")
    for name in ("w.safetensors", "w.pt"):
        other = build("aliased")
        source.load_weights(other, Path(name))
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("factory", "refused"),
    [
        ("group_norm", {"bn_only": "the model has no BatchNorm with scale and shift"}),
        ("no_affine", {"bn_only": "the model has no BatchNorm with scale and shift"}),
        ("conv_head", {"head_only": "the model has no nn.Linear"}),
        ("bare", {"head_only": "the model has no nn.Linear", "bn_only": "no BatchNorm"}),
    ],
)
def test_a_comparison_that_does_not_apply_gives_a_row_with_a_reason(folder, capsys, factory, refused):
    assert main(arguments(factory, **{"--method": "lora_edge_source_bn"})) == 0
    found = rows()
    assert list(found)[-5:] == ["head_only", "bn_only", "full", "lora_edge", "lora_edge_source_bn"]
    for name, row in found.items():
        assert (row["f1"] is None) == (name in refused)
        assert refused.get(name, "") in (row["remark"] or "")
    printed = capsys.readouterr().out
    for name in refused:
        assert f"{found[name]['title']} does not apply: the model has no" in printed


def _one_window(folder: Path) -> None:
    """A recording with one window to adapt on."""
    n = 240
    own(
        folder / "own.npz",
        subject=np.where(np.arange(n) < 4, 1, 2),
        domain=None,
        y=np.arange(n) % 3,
        recording=np.zeros(n, int),
    )


@pytest.mark.parametrize("factory", [None, "late_norm", "conv_head"])
def test_one_window_to_adapt_on(folder, factory):
    """BatchNorm after the pooling then has no batch statistics: methods that need them are left out, LoRA-Edge is trained."""
    _one_window(folder)
    assert main(arguments(factory)) == 0
    assert json.loads(Path("out/results.json").read_text())["windows"]["adapt"] == 1
    found = rows()
    late = factory == "late_norm"
    assert (found["full"]["f1"] is None) == (found["bn_only"]["f1"] is None) == late
    assert found["lora_edge"]["f1"] is not None
    if late:
        assert "more than 1 value per channel" in found["full"]["remark"]
        assert "BatchNorm keeps the source's statistics" in found["lora_edge"]["remark"]
        assert json.loads(Path("out/results.json").read_text())["target_f1"] is None


def test_a_comparison_that_fails_later_also_gives_a_row(folder, monkeypatch):
    train = main_job.train_target

    def out_of_memory(model, *rest, steps, **options):
        if steps > 1 and all(p.requires_grad for p in model.parameters()):
            raise MemoryError("no more of it")
        return train(model, *rest, steps=steps, **options)

    monkeypatch.setattr(main_job, "train_target", out_of_memory)
    assert main(arguments("aliased")) == 0
    assert rows()["full"]["remark"] == "MemoryError: no more of it"
    assert Path("out/f1_over_time.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("sparse", "graph is a sparse_coo tensor, which safetensors cannot hold"),
        ("extra", "_extra_state is a dict; safetensors holds tensors only"),
        ("only_in_training", "the source model cannot be trained: IndexError: no such label"),
        ("fails", "--model odd_models:fails: the factory failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_model_that_cannot_be_trained_or_saved(folder, capsys, no_training, factory, text):
    assert exit_code(arguments(factory)) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("out").exists() or os.listdir("out") == []


@pytest.mark.parametrize("name", main_job.FILES)
def test_a_folder_at_the_path_of_a_file(folder, capsys, no_training, name):
    Path("out", name).mkdir(parents=True)
    assert exit_code(arguments("aliased")) == 2
    error = capsys.readouterr().err
    assert f"out/{name}: is a directory" in error
    assert error.count("\n") == 1
    assert os.listdir("out") == [name]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"channels": np.array(["ax", "ay", "az"])}, "channels has 3 names, but X of shape (240, 4, 30) has 4 channels"),
        (
            {"channels": np.array([str(k) for k in range(30)])},
            "(240, 4, 30) has 4 channels (its second axis); swap its axes by X.transp",
        ),
        ({"channels": np.array(["ax", "ay", "az", "ax"])}, "channels names 'ax' twice"),
        ({"channels": np.array("ax ay az wx")}, "channels is <U11 (); give an array (names,) of str, one name for each"),
        ({"channels": np.zeros(4)}, "channels is float64 (4,)"),
        ({"classes": np.array([["walk"], ["sit"], ["run"]])}, "classes is <U4 (3, 1)"),
        ({"X": np.zeros((240, 4, 0))}, "give at least one channel and one sample of time"),
        ({"X": np.zeros((240, 0, 4))}, "give at least one channel and one sample of time"),
    ],
)
def test_channels_that_do_not_fit(folder, capsys, no_training, change, text):
    own(folder / "own.npz", **change)
    assert exit_code(arguments()) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_names_may_be_bytes(folder):
    from lora_edge.har.data import load_npz

    own(folder / "own.npz", channels=np.array([b"ax", b"ay", b"az", b"p"]))
    assert load_npz("own.npz").channels == ["ax", "ay", "az", "p"]


def test_files_of_one_kind_given_as_another(folder, capsys):
    import lora_edge

    model = nn.Sequential(nn.Conv1d(4, 8, 3))
    torch.save(model.state_dict(), "base.pt")
    lora_edge.save_adapter(lora_edge.adapt(model, 2), "a.st")
    np.save("x.npy", np.zeros((240, 4, 30)))
    for given, text in (
        (
            ["merge", "a.st", "base.pt", "--out", "m.st"],
            "a.st: not a state dict, but a safetensors file that holds a LoRA-Edge",
        ),
        (["merge", "base.pt", "base.pt", "--out", "m.st"], "base.pt: not a safetensors file, but a torch.save file"),
        (["merge", "own.npz", "a.st", "--out", "m.st"], "own.npz: not a state dict saved by torch.save, but an .npz"),
        (["info", "own.npz"], "own.npz: not a safetensors file, but an .npz of numpy arrays; give one that save_adapter wrote"),
        (["info", "."], ".: is a directory"),
        (arguments(**{"--data": "x.npy"}), "x.npy: not a readable .npz, but a single numpy array (.npy)"),
        (arguments(**{"--data": "base.pt"}), "base.pt: not a readable .npz, but a torch.save file"),
        (arguments(**{"--weights": "a.st"}), "a.st: not a state dict, but a safetensors file that holds a LoRA-Edge adapter"),
        (arguments(**{"--weights": "own.npz"}), "own.npz: not a state dict saved by torch.save, but an .npz"),
    ):
        assert exit_code(given) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
