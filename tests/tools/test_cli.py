"""The command line: the whole job on small data of the user's own; every bad input gives one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lora_edge
from helpers.command import adapt_arguments, exit_code, folder  # noqa: F401
from helpers.windows import own
from lora_edge.adapter_format import read_adapter
from lora_edge.cli import main
from lora_edge.har import main_job
from lora_edge.har.data import load_npz, split
from lora_edge.har.training import macro_f1


def test_adapt_merge_info(folder, capsys):
    assert main(adapt_arguments()) == 0
    printed = capsys.readouterr().out
    for title in ("zero-shot", "head only", "BN only", "full fine-tuning", "LoRA-Edge"):
        assert title in printed
    files = sorted(os.listdir("out"))
    source = next(name for name in files if name.startswith("source-"))
    assert files == ["adapter.safetensors", "f1_over_time.png", "merged.safetensors", "results.json", source]
    results = json.loads(Path("out/results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["lora_edge"]["trainable"] == 16
    assert rows["lora_edge"]["saved_bytes"] > 0
    assert len(rows["full"]["curve"]["f1"]) == 3
    assert Path("out/f1_over_time.png").read_bytes()[:4] == b"\x89PNG"

    stamp = Path("out", source).stat().st_mtime_ns
    assert main(adapt_arguments()) == 0  # a second run reuses the source model and gives the same F1
    assert Path("out", source).stat().st_mtime_ns == stamp
    again = {row["name"]: row["f1"] for row in json.loads(Path("out/results.json").read_text())["rows"]}
    assert again == {name: row["f1"] for name, row in rows.items()}

    capsys.readouterr()
    assert main(["merge", f"out/{source}", "out/adapter.safetensors", "--out", "again.safetensors"]) == 0
    merged, theirs = load_file("again.safetensors"), load_file("out/merged.safetensors")
    assert merged.keys() == theirs.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, theirs[name])

    capsys.readouterr()
    assert main(["info", "out/adapter.safetensors"]) == 0
    assert "0: core 8x2, rank 2, scale 1" in capsys.readouterr().out


def test_turned_axes_are_in_the_results(folder, capsys, monkeypatch):
    """With the axes named in results.json, the merged model reaches the F1 of its row on raw windows."""
    own("own.npz", channels=np.array(["ax", "ay", "az", "pulse"]))
    turn = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    monkeypatch.setattr(main_job, "find_turn", lambda model, task: turn)
    assert main(adapt_arguments()) == 0
    assert "Axes turned: LoRA-Edge found that -ay ax az pulse minimises" in capsys.readouterr().out
    results = json.loads(Path("out/results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["lora_edge"]["axes"] == rows["full_turned"]["axes"] == ["-ay", "ax", "az", "pulse"]
    assert rows["full"]["axes"] == ["ax", "ay", "az", "pulse"]
    with safe_open("out/merged.safetensors", "pt") as merged:
        assert merged.metadata() == {"axes": "-ay ax az pulse"}

    raw = load_npz("own.npz")
    test = split(raw, 1, "B", "watch").test
    mean, std = (np.array(results["normalisation"][key])[:, None] for key in ("mean", "std"))
    window = test.x * std + mean
    signed = {name: window[:, k] for k, name in enumerate(raw.channels)} | {"-ay": -window[:, 1]}
    x = (np.stack([signed[name] for name in rows["lora_edge"]["axes"]], axis=1) - mean) / std
    sys.path.insert(0, str(folder))
    import mymodels

    sys.path.pop(0)
    model = mymodels.build(4, 3)
    model.load_state_dict(load_file("out/merged.safetensors"))
    assert macro_f1(model, replace(test, x=x.astype(np.float32))) == pytest.approx(rows["lora_edge"]["f1"])


@pytest.mark.parametrize("method", ["lora_edge_budget", "lora_edge_target_bn"])
def test_another_form_of_lora_edge(folder, method):
    """Its adapter holds calibrated statistics, so the base and the adapter give the merged model."""
    assert main(adapt_arguments(**{"--method": method})) == 0
    rows = {row["name"]: row for row in json.loads(Path("out/results.json").read_text())["rows"]}
    assert rows[method]["trainable"] == rows["lora_edge"]["trainable"]
    source = next(name for name in os.listdir("out") if name.startswith("source-"))
    assert main(["merge", f"out/{source}", "out/adapter.safetensors", "--out", "again.safetensors"]) == 0
    merged, theirs = load_file("again.safetensors"), load_file("out/merged.safetensors")
    for name, value in merged.items():
        torch.testing.assert_close(value, theirs[name])
    base = load_file(f"out/{source}")
    assert not torch.equal(base["1.running_mean"], merged["1.running_mean"])


def test_users_own_weights_are_used(folder):
    sys.path.insert(0, str(folder))
    import mymodels

    sys.path.pop(0)
    model = mymodels.build(4, 3)
    torch.save(model.state_dict(), "w.pt")
    assert main(adapt_arguments(**{"--weights": "w.pt", "--protocol": "A", "--target-domain": None})) == 0
    assert not [name for name in os.listdir("out") if name.startswith("source-")]
    lora_edge.load_adapter(model, "out/adapter.safetensors")


BAD_ADAPT = [
    ({"--rank": "0"}, "rank is 0; give an integer of at least 1"),
    ({"--rank": "-3"}, "rank is -3"),
    ({"--method": "full"}, "method is 'full'; give a form of LoRA-Edge: lora_edge, lora_edge_as_worn"),
    ({"--rank": "2.5"}, "argument --rank: invalid int value: '2.5'"),
    ({"--rank": "True"}, "argument --rank: invalid int value: 'True'"),
    ({"--target-subject": "9"}, "subject 9 is not in the data; it has 1, 2"),
    ({"--target-domain": "ring"}, "domain 'ring' is not in the data; it has phone, watch"),
    ({"--target-domain": None}, "protocol B needs the target's domain; give one of phone, watch"),
    ({"--protocol": "C"}, "argument --protocol: invalid choice"),
    ({"--data": "none.npz"}, "none.npz: no such file"),
    ({"--data": "mymodels.py"}, "mymodels.py: not a readable .npz"),
    ({"--model": "mymodels"}, "--model is 'mymodels'; give package.module:factory"),
    ({"--model": "nomodule:build"}, "--model nomodule:build: No module named 'nomodule'"),
    ({"--model": "mymodels:none"}, "has no attribute 'none'"),
    ({"--model": "mymodels:nothing"}, "returned a int; it must return a torch.nn.Module"),
    ({"--model": "mymodels:fixed"}, "the model does not accept windows of (4, 30) (channels, time)"),
    ({"--model": "mymodels:odd"}, "the model returns (2, 4) for 2 windows; it must return logits of shape (2, 3)"),
    ({"--weights": "none.pt"}, "none.pt: no such file"),
    ({"--weights": "mymodels.py"}, "mymodels.py: not a state dict saved by torch.save"),
    ({"--weights": "other.pt"}, "other.pt: does not fit the model: Missing key(s)"),
    ({"--steps": "0"}, "--steps is 0; give an integer of at least 1"),
    ({"--lr": "-1"}, "--lr is -1.0; give a number above 0"),
    ({"--lr": "nan"}, "--lr is nan; give a number above 0"),
    ({"--out": "own.npz"}, "own.npz: cannot be created"),
    ({"--out": "own.npz/deeper"}, "cannot be created"),
    ({"--out": "/proc"}, "/proc: cannot be written"),  # no file can be created there, not even by root
]


@pytest.mark.parametrize(("change", "text"), BAD_ADAPT, ids=lambda v: str(v)[:50])
def test_bad_adapt(folder, capsys, change, text):
    torch.save({"w": torch.zeros(2)}, "other.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert exit_code(adapt_arguments(**change)) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1, error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not Path("out").exists() or os.listdir("out") == []


def test_nan_windows_and_bad_labels(folder, capsys):
    own(folder / "nan.npz", X=np.full((240, 4, 30), np.nan))
    own(folder / "labels.npz", y=np.full(240, 3))
    for name, text in (("nan.npz", "window 0 holds NaN or Inf"), ("labels.npz", "labels run from 0 to 2")):
        assert exit_code(adapt_arguments(**{"--data": name})) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


def test_bad_merge_and_info(folder, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3))
    torch.save(model.state_dict(), "base.pt")
    torch.save(nn.Sequential(nn.Conv1d(4, 8, 3)).state_dict(), "other.pt")
    lora_edge.save_adapter(lora_edge.adapt(model, 2), "a.safetensors")
    assert read_adapter("a.safetensors").layers.keys() == {"0"}
    raw = bytearray(Path("a.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("flipped.safetensors").write_bytes(raw)
    Path("out.safetensors").write_text("precious")
    for arguments, text in (
        (
            ["merge", "other.pt", "a.safetensors", "--out", "out.safetensors"],
            "a.safetensors: the adapter belongs to another base",
        ),
        (["merge", "base.pt", "flipped.safetensors", "--out", "out.safetensors"], "flipped.safetensors: damaged"),
        (["merge", "none.pt", "a.safetensors", "--out", "out.safetensors"], "none.pt: no such file"),
        (["merge", "own.npz", "a.safetensors", "--out", "out.safetensors"], "own.npz: not a state dict"),
        (["merge", "base.pt", "a.safetensors", "--out", "no/such/out.safetensors"], "cannot write there"),
        (["merge", "base.pt"], "the following arguments are required"),
        (["info", "base.pt"], "base.pt: not a safetensors file"),
        (["info", "none"], "none: no such file"),
        (["info", "flipped.safetensors"], "damaged"),
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
    ):
        assert exit_code(arguments) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert Path("out.safetensors").read_text() == "precious"
    assert main(["merge", "base.pt", "a.safetensors", "--out", "out.safetensors"]) == 0


def test_python_dash_m_gives_the_exit_code(folder):
    done = subprocess.run([sys.executable, "-m", "lora_edge", "info", "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "lora-edge: error: none: no such file; give the path of one that save_adapter wrote\n"
