"""``lora-edge check``: what it prints, and that a wrong op or a failing launch gives exit code 1. About 40 s."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers.emulated_cuda import kernels  # noqa: F401  (a fixture)
from lora_edge import check
from lora_edge.cli import main
from lora_edge.environment import extension as _extension
from lora_edge.ops import reference


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(check, "CASES", check.CASES[:1])


def test_all_checks_pass_on_torch(capsys):
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lora_edge ")
    assert torch.__version__ in lines[1]
    assert "backend torch: available" in lines
    assert sum(line.startswith(("  pass  tt_", "  pass  dora_")) for line in lines) >= 12 * len(check.CASES)
    assert not [line for line in lines if "FAIL" in line]
    assert lines[-1].endswith("checks passed")


@pytest.mark.slow  # builds the emulator
def test_all_checks_pass_on_the_kernels(kernels):
    outcomes = list(check.check_backend("cuda"))
    assert len(outcomes) == 4 * 4 * len(check.CASES)
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_a_wrong_op_fails(short, monkeypatch, capsys):
    monkeypatch.setattr(check.ops, "tt_fuse", lambda *args, backend: 1.001 * reference.tt_fuse(*args))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  tt_fuse 1-D, float32: error 1.0e-03, at most 1e-05" in out
    passed, of = map(int, re.fullmatch(r"(\d+) of (\d+) checks passed", out.splitlines()[-1]).groups())
    assert passed == of - 1


def test_a_failing_launch_is_named(short, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("tt_conv: no kernel image\nat launch")

    monkeypatch.setattr(check.ops, "tt_conv", fail)
    assert main(["check"]) == 1
    assert "FAIL  tt_conv 1-D, float32: tt_conv: no kernel image\n" in capsys.readouterr().out


def test_a_driver_older_than_the_build_gives_a_hint(monkeypatch):
    module = SimpleNamespace(
        build_info=lambda: {
            "cuda": "13.0",
            "architectures": "8.7+PTX",
            "compiler": "gcc 12",
            "emulator": False,
            "cpu": "baseline",
        },
        device_info=lambda: {"driver": "12.6", "runtime": "13.0", "count": 0, "devices": [], "error": "the driver is old"},
    )
    monkeypatch.setattr(_extension, "reason", lambda: None)
    monkeypatch.setattr(_extension, "load", lambda: module)
    lines = list(check.about())
    assert "extension: built with CUDA 13.0 for 8.7+PTX, gcc 12; on the CPU by baseline" in lines
    assert "driver: supports CUDA up to 12.6" in lines
    assert lines[-1].startswith("hint: the driver supports CUDA 12.6, the extension was built with 13.0; reinstall")


def test_check_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lora_edge", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend cuda: " in done.stdout
