"""``lora-edge bench`` on this CPU, with the torch backend alone: every op of a layer gets a row that agrees."""

from __future__ import annotations

import csv

import pytest

from benchmarks import kernels
from lora_edge.cli import main


@pytest.mark.parametrize("precision", ["fp32", "half"])
def test_rows_of_a_layer(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "backends", lambda: {"torch": "available", "cuda": "without a device"})
    table = tmp_path / "rows" / "kernels.csv"
    wanted = ["--workload", "W1", "--layer", "block1.conv2", "--precision", precision, "--device", "cpu"]
    assert kernels.main([*wanted, "--rounds", "2", "--size", "128", "--out", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert {row["op"] for row in rows} == set(kernels.OPS)
    for row in rows:
        assert (row["backend"], row["agrees"], row["over_torch"]) == ("torch", "True", "1.0")
        assert 0 < float(row["us_p20"]) <= float(row["us_p50"]) <= float(row["us_p80"])
        assert float(row["floor_us"]) > 0


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
