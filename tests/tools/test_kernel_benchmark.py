"""``lora-edge bench`` on this CPU: every op of a layer has a row for each backend that works here, and it agrees."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernels
from lora_edge.cli import main
from lora_edge.ops.backends import AVAILABLE, state


@pytest.mark.parametrize("precision", ["fp32", "half"])
def test_rows_of_a_layer(precision, tmp_path):
    table = tmp_path / "rows" / "kernels.csv"
    wanted = ["--workload", "W1", "--layer", "block1.conv2", "--precision", precision, "--device", "cpu"]
    assert kernels.main([*wanted, "--rounds", "2", "--size", "128", "--out", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    has_cpu_engine = state("cpu") == AVAILABLE
    assert {row["backend"] for row in rows} == ({"torch", "cpu"} if has_cpu_engine else {"torch"})
    for backend in {row["backend"] for row in rows}:
        assert {row["op"] for row in rows if row["backend"] == backend} == set(kernels.OPS)
    for row in rows:
        if row["refused"]:  # the CPU engine leaves tt_fuse on its own and half precision to torch
            assert row["backend"] == "cpu"
            assert row["op"] == "tt_fuse_forward" or precision == "half"
            assert not row["us_p50"]
            continue
        assert row["agrees"] == "True"
        assert row["over_torch"] == "1.0" or row["backend"] == "cpu"
        assert 0 < float(row["us_p20"]) <= float(row["us_p50"]) <= float(row["us_p80"])
        assert float(row["floor_us"]) > 0
    assert has_cpu_engine == any(row["backend"] == "cpu" and row["us_p50"] for row in rows) or precision == "half"


def test_only_the_backends_asked_for(tmp_path):
    table = tmp_path / "kernels.csv"
    wanted = ["--workload", "W1", "--layer", "block1.shortcut.0", "--precision", "fp32", "--device", "cpu"]
    assert kernels.main([*wanted, "--backend", "triton", "--rounds", "2", "--size", "128", "--out", str(table)]) == 0
    assert {row["backend"] for row in csv.DictReader(table.open())} == {"torch"}


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch):
    layer = kernels.layers_of("W1")["block1.shortcut.0"]
    make = kernels.calls(layer, "fp32", "channels-last", kernels.torch.device("cpu"))["tt_fuse_forward"]
    wrong = lambda backend: make("torch") if backend == "torch" else lambda: [make("torch")()[0] * 2]  # noqa: E731
    timer = kernels.Timer(kernels.torch.device("cpu"))
    fixed = {"precision": "fp32"}
    rows = kernels.rows_of("W1", "x", layer, "tt_fuse_forward", wrong, ["torch", "cuda"], fixed, timer, 2, 1.0)
    assert [row["agrees"] for row in rows] == [True, False]
    assert "us_p50" not in rows[1]


def test_the_command_passes_its_options_on(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--rounds", "many"])
    assert caught.value.code == 2
    assert "--rounds" in capsys.readouterr().err


BLOCKED = """
import sys
for name in ("sklearn", "scipy", "pandas", "matplotlib", "rich"):
    sys.modules[name] = None  # its import raises ImportError
import benchmarks.kernels
print(*(name for name in sys.modules if name.startswith("lora_edge.har")))
"""


def test_it_needs_no_extra():
    """Of the activity part of the library only the networks are imported, which need torch alone."""
    root = Path(kernels.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lora_edge.har", "lora_edge.har.models"]
