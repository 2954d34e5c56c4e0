"""The wheel with only torch, numpy and safetensors: every command runs or names the extra it needs. About 45 s."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lora_edge
from helpers.builds import ROOT, python

# not by find_spec: when asked for pip, the finder of setuptools disables its own distutils for the rest of the process
INSTALLED = {distribution.name for distribution in importlib.metadata.distributions()}
MISSING = sorted({"setuptools", "pybind11", "build", "pip"} - INSTALLED)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'{MISSING} not installed: pip install "lora_edge[test]"')
NEEDED = ("torch", "numpy", "safetensors")
EXTRAS = ("sklearn", "scipy", "seglearn", "rich", "matplotlib", "peft", "triton", "pybind11")
HAR = 'needs scikit-learn, matplotlib, rich; run pip install "lora_edge[har]"'


def _with_requirements(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """These installed distributions and their requirements, without extras and triton, which a Jetson lacks."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found or name == "triton":
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        requires = [line for line in found[name].requires or [] if "extra ==" not in line]
        wanted += [re.match(r"[\w.-]+", line)[0] for line in requires]
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with links to torch, numpy, safetensors and their requirements; pip installs the wheel."""
    venv = tmp_path_factory.mktemp("plain") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib*/python*/site-packages"))
    for distribution in _with_requirements(NEEDED).values():
        for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            there = Path(distribution.locate_file(top))
            if there.exists() and not (site / top).exists():
                (site / top).symlink_to(there)
    done = python(
        *("-m", "pip", "--python", venv, "install", "--no-index", "--no-cache-dir", next(wheel.glob("*.whl"))), cwd=venv
    )
    assert done.returncode == 0, done.stdout
    return venv


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, its adapter and data of the user's own."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    torch.save(model.state_dict(), folder / "base.pt")
    lora_edge.save_adapter(lora_edge.adapt(model, 2), folder / "a.safetensors")
    n = 60
    np.savez(folder / "own.npz", X=np.random.randn(n, 4, 20).astype("f4"), y=np.arange(n) % 3, subject=np.arange(n) // 30)
    return folder


def run(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed package."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(environment / "bin" / "lora-edge"), *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )


def test_the_extras_are_not_installed(environment, folder):
    code = f"import importlib.util as u, lora_edge; print([n for n in {EXTRAS} if u.find_spec(n)], lora_edge.__file__)"
    done = subprocess.run([environment / "bin" / "python", "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout.startswith(f"[] {environment}"), done


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--version"], "lora_edge "),
        (["--help"], "adapt"),
        (["check"], "checks passed"),
        (["info", "a.safetensors"], "1 layers, 16 trained parameters"),
        (["merge", "base.pt", "a.safetensors", "--out", "m.safetensors"], "m.safetensors"),
        (
            ["bench", "--workload", "W1", "--layer", "block1.conv1", "--precision", "fp32", "--rounds", "1", "--size", "64"],
            "rows in",
        ),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_commands_that_need_no_extra_run(environment, folder, arguments, text):
    done = run(environment, folder, *arguments)
    assert done.returncode == 0, done
    assert text in done.stdout
    assert "Traceback" not in done.stderr


def test_adapt_names_its_extra_before_it_does_anything(environment, folder):
    before = sorted(os.listdir(folder))
    for data in ("own.npz", "watch"):
        done = run(environment, folder, "adapt", "--data", data, "--target-subject", "0", "--out", "out")
        assert done.returncode == 2
        assert done.stderr == f"lora-edge: error: lora-edge adapt {HAR}\n"
    assert sorted(os.listdir(folder)) == before


def test_triton_says_why_it_is_off(environment, folder):
    done = run(environment, folder, "check")
    assert "triton missing" in done.stdout


def test_modules_run_as_scripts_name_their_extra(environment, folder):
    done = subprocess.run(
        [environment / "bin" / "python", "-m", "benchmarks.study", "--data", folder / "own.npz"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"study: error: the study {HAR}\n"
