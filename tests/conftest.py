"""Shared fixtures and the options of the test run. Skipped tests are named with their reason at the end of the run (-rs)."""

from __future__ import annotations

import importlib.util
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # before helpers are imported, so that failing asserts in them show their values
from helpers.builds import ROOT, python  # noqa: E402

SLOW_FIXTURES = {"unpacked", "wheel"}  # they build the package
SPSW = Path(__file__).resolve().parents[2] / "shared" / "data" / "har_spsw_1s.npz"


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th case of each test (emulated machines)")


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    every, cases = config.getoption("--every"), Counter()
    if every == 1:
        return
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left if cases[test] % every else kept).append(item)
        cases[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def watch():
    if importlib.util.find_spec("seglearn") is None:
        pytest.skip('seglearn is not installed: pip install "lora_edge[har]"')
    from lora_edge.har.data import load_watch

    return load_watch()


@pytest.fixture
def spsw_path():
    if not SPSW.is_file():
        pytest.skip(f"{SPSW} is not there")
    return SPSW


# A build of the package, once for all tests that need one


@pytest.fixture(scope="session")
def poison(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with a fake torch that raises when a build imports it."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch.py").write_text("raise RuntimeError('the build has imported torch')\n")
    return folder


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """The sources as a fresh clone has them."""
    made = ("build", "dist", "demo", "*.egg-info", "*.so", "__pycache__", ".*")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "lora edge", ignore=shutil.ignore_patterns(*made))


@pytest.fixture(scope="session")
def unpacked(copy, poison, tmp_path_factory) -> Path:
    """The sdist of the copy, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    done = python("-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=copy, PYTHONPATH=str(poison))
    assert done.returncode == 0, done.stdout
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def wheel(unpacked, poison, tmp_path_factory) -> Path:
    """The wheel without CUDA of the unpacked sdist, itself unpacked; torch cannot be imported while it is built."""
    out = tmp_path_factory.mktemp("wheel")
    done = python(
        *("-m", "build", "--wheel", "--no-isolation", "--outdir", out), cwd=unpacked, PYTHONPATH=str(poison), LORA_EDGE_CUDA="0"
    )
    assert done.returncode == 0, done.stdout
    assert "warning: " not in done.stdout.split("building 'lora_edge._C' extension")[1].split("creating build/bdist")[0]
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(out)
    return out
