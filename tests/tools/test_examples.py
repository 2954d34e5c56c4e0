"""Every program in examples/ runs to its end, in an empty folder, and writes what it says. About 30 s."""

from __future__ import annotations

import importlib.util
import runpy
import sys

import pytest

from helpers.builds import ROOT

EXAMPLES = ROOT / "examples"
WRITES = {
    "drop_in_training": ["darker.safetensors"],
    "own_model_and_data": ["adapted/adapter.safetensors", "adapted/merged.safetensors", "adapted/results.json"],
    "many_people": ["ada.safetensors", "ben.safetensors", "eve.safetensors"],
    "jetson": [],
    "merge_and_export": ["merged.pt2"],
}
SAYS = {
    "drop_in_training": "adapted and merged",
    "own_model_and_data": "LoRA-Edge",
    "many_people": "another base: ",
    "jetson": "lora_edge, torch: ",
    "merge_and_export": "merged.pt2 written",
}


def test_every_example_is_here_and_in_the_readme():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(WRITES)
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in page for name in names)


@pytest.mark.parametrize("name", list(WRITES))
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    if name == "own_model_and_data" and importlib.util.find_spec("sklearn") is None:
        pytest.skip('scikit-learn is not installed: pip install "lora_edge[har]"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a program that it starts
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    codes: list[int | str] = [0]
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        codes.append(stop.code or 0)
    finally:
        sys.modules.pop(name, None)
    assert codes[-1] == 0
    assert SAYS[name] in capsys.readouterr().out
    for path in WRITES[name]:
        assert (tmp_path / path).stat().st_size > 0
