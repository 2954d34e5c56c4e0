"""Importing the package is light, and an old torch is refused in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_edge.environment.torch_version import check_torch_version


@pytest.mark.other_python
def test_import_is_light():
    heavy = ["triton", "lora_edge._C", "matplotlib", "sklearn", "rich", "seglearn", "scipy", "safetensors.numpy"]
    code = (
        "import sys, torch; before = set(sys.modules); import lora_edge; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("version", ["2.4.0", "2.5.0a0+872d972e41.nv24.08", "2.13.0+cpu", "3.0"])
def test_torch_that_is_new_enough(version):
    check_torch_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.3.1+cu121", "unknown"])
def test_torch_that_is_too_old(version):
    with pytest.raises(ImportError, match=f"needs torch 2.4 or newer, found {version.split('+')[0]}"):
        check_torch_version(version)


def test_backends_say_why_they_are_not_available():
    import lora_edge

    assert lora_edge.backends()["torch"] == "available"
    assert all(reason for reason in lora_edge.backends().values())
