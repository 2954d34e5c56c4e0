"""Every test file that a tool or the Makefile lists exists."""

from __future__ import annotations

import re
import runpy

from helpers.builds import ROOT

TOOLS = ROOT / "tests" / "tools"


def test_isa_names_files_that_exist():
    assert [name for name in runpy.run_path(str(TOOLS / "isa.py"))["NUMERICS"] if not (ROOT / name).is_file()] == []


def test_compat_names_files_that_exist():
    compat = runpy.run_path(str(TOOLS / "compat" / "run.py"))
    native, emulated = compat["core"](compat["LEFT_OUT"]), compat["core"](compat["LEFT_OUT"] | compat["ONLY_NATIVE"])
    assert {path.parent.name for path in emulated} == {*compat["FOLDERS"], "tools"}
    assert len(emulated) == len(native) - len(compat["ONLY_NATIVE"])


def test_the_makefile_names_files_that_exist():
    names = re.findall(r"\btests/[\w/.]+\.py", (ROOT / "Makefile").read_text())
    assert len(names) > 4
    assert [name for name in names if not (ROOT / name).is_file()] == []
