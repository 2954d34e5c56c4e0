"""The Triton engine: its kernels in the interpreter (in a process of their own), compiled ahead of time, and on a device; its
tuner; the reasons why it does not work.

``LORA_EDGE_TEST_ALL=1`` (``make test-all``) runs the whole case matrix in the interpreter and compiles more of the kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_edge.ops import backends, dora_fuse
from lora_edge.ops.engines.triton import available

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("LORA_EDGE_TEST_ALL") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
on_a_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def interpreted():
    """Both files of tests/engines/interpreted, running at the same time, by name."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {
        path.stem: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for path in sorted((ROOT / "tests" / "engines" / "interpreted").glob("test_*.py"))
    }  # fmt: skip
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow  # about 100 s for both
@pytest.mark.parametrize("name", ["test_interpreted_kernels", "test_interpreted_backend"])
def test_in_the_interpreter(name, interpreted):
    output, _ = interpreted[name].communicate()
    assert interpreted[name].returncode == 0, output[-6000:]
    assert " passed" in output


def test_interpreted_tests_are_not_collected_without_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/engines/interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


@pytest.fixture
def fresh(monkeypatch):
    """Forget what is known about the machine, before and after."""
    available.runtime.cache_clear()
    available._not_covered.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    available.runtime.cache_clear()
    available._not_covered.cache_clear()


def put_device(monkeypatch, capability=(8, 7)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Orin")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def test_calls_on_other_backends_do_not_import_triton():
    code = (
        "import sys, torch, lora_edge; from lora_edge.ops import tt_conv, use_backend\n"
        "model = lora_edge.adapt(torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3)))\n"
        "model(torch.randn(2, 3, 9)).sum().backward(); str(lora_edge.summary(model, torch.randn(2, 3, 9)))\n"
        "with use_backend('torch'): model(torch.randn(2, 3, 9))\n"
        "print('triton' in sys.modules, lora_edge.backends()['triton'], 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")
    assert done.stdout.endswith(" True\n")


def test_missing(fresh):
    fresh.setattr(available.importlib.util, "find_spec", lambda name: None)
    assert backends()["triton"] == "missing: pip install triton, or lora_edge[triton]"


def test_too_old(fresh):
    fresh.setattr(available.importlib, "import_module", lambda name: type("triton", (), {"__version__": "2.1.0"}))
    assert backends()["triton"] == "too old: 2.1.0; the kernels need 3.5 or newer"


def test_broken_wheel(fresh):
    def fail(name):
        raise ImportError("libtriton.so: wrong ELF class\nand more")

    fresh.setattr(available.importlib, "import_module", fail)
    assert backends()["triton"] == "not loadable: ImportError: libtriton.so: wrong ELF class"


def test_no_device(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert backends()["triton"] == "without an active driver: torch finds no CUDA device"


def test_old_device(fresh):
    put_device(fresh, (7, 2))
    assert backends()["triton"] == "not for this device: Orin has capability 7.2; the kernels need 8.0 or newer"


def test_a_probe_that_fails_is_asked_once(fresh):
    asked = []

    def fail(device):
        asked.append(device)
        raise RuntimeError("0 active drivers ([]). There should only be one.\nmore")

    put_device(fresh)
    fresh.setattr(available, "_probe", fail)
    for _ in range(2):
        assert backends()["triton"] == (
            "not usable: a first launch failed: RuntimeError: 0 active drivers ([]). There should only be one."
        )
    assert asked == [torch.device("cuda", 0)]


def test_available_where_the_probe_passes(fresh):
    put_device(fresh)
    fresh.setattr(available, "_probe", lambda device: None)
    assert backends()["triton"] == "available"
    assert available.reason(torch.device("cpu")) == "its tensors are on cpu; the kernels support tensors on cuda"


def test_auto_chooses_cuda_first(monkeypatch):
    from lora_edge.ops.engines import registry as engines
    from lora_edge.ops.engines.cuda import available as cuda_available

    works = {"cuda": None, "triton": None}
    monkeypatch.setattr(cuda_available, "reason", lambda device=None: works["cuda"])
    monkeypatch.setattr(available, "reason", lambda device=None: works["triton"])
    device = torch.device("cuda", 0)
    assert engines.chosen("auto", device) == "cuda"
    works["cuda"] = "not built"
    assert engines.chosen("auto", device) == "triton"
    assert engines.chosen("cuda", device) == "cuda"
    works["triton"] = "missing"
    assert engines.chosen("auto", device) == "torch"
    layer = SimpleNamespace(backend="auto", weight=SimpleNamespace(device=device))
    backend_of = importlib.import_module("lora_edge.summary")._backend
    assert backend_of(layer, None, None, None) == "torch (not built)"


class OnDevice:
    """Stands for a tensor on a device."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The tuner on a fake device: a launch lasts as many seconds as its tile has rows."""
    from lora_edge.ops.engines.triton.kernels import tuner

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuner.VARIABLE, raising=False)
    monkeypatch.setattr(tuner, "_known", None)
    monkeypatch.setattr(tuner, "_device", lambda index: "Orin triton-3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuner, "_seconds", lambda launch: launch())
    return tuner


def configurations(tuner):
    return tuple(tuner.Configuration(rows, 32, 16, 4, 3) for rows in (64, 16, 32))


def rows(configuration):
    return configuration.rows


def test_the_fastest_is_kept_on_disk(tuner, monkeypatch):
    tuned = tuner.Tuned("kernel", configurations(tuner), OnDevice())
    assert tuned.best((1, 2), rows).rows == 16
    assert json.loads(tuner.cache_file().read_text()) == {"Orin triton-3 kernel 1 2": "16x32x16w4s3"}
    monkeypatch.setattr(tuner, "_known", None)
    monkeypatch.setattr(tuner, "_seconds", None)  # a measurement would fail
    assert tuned.best((1, 2), rows).rows == 16
    monkeypatch.setattr(tuner, "_seconds", lambda launch: -launch())
    assert tuned.best((1, 3), rows).rows == 64
    assert len(json.loads(tuner.cache_file().read_text())) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"Orin triton-3 kernel": 5}', '{"Orin triton-3 kernel": "1x1x1w1s1"}', "\x00\xff"]
)
def test_a_damaged_file_is_written_anew(text, tuner):
    tuner.cache_file().parent.mkdir(parents=True)
    tuner.cache_file().write_text(text, encoding="latin-1")
    assert tuner.Tuned("kernel", configurations(tuner), OnDevice()).best((), rows).rows == 16
    assert json.loads(tuner.cache_file().read_text()) == {"Orin triton-3 kernel": "16x32x16w4s3"}
    assert [path.name for path in tuner.cache_file().parent.iterdir()] == ["triton.json"]


def test_a_cache_that_cannot_be_written(tuner, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuner.Tuned("kernel", configurations(tuner), OnDevice()).best((), rows).rows == 16


def test_nothing_is_measured_where_it_may_not_be(tuner, monkeypatch):
    monkeypatch.setattr(tuner, "_seconds", None)
    tuned = tuner.Tuned("kernel", configurations(tuner), OnDevice())
    with monkeypatch.context() as change:
        change.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuned.best((), rows).rows == 64
        change.setattr(tuner, "_known", {"Orin triton-3 kernel": "32x32x16w4s3"})
        assert tuned.best((), rows).rows == 32
    with tuner.without_measuring():
        assert tuned.best((), rows).rows == 64
    monkeypatch.setenv(tuner.VARIABLE, "0")
    assert tuned.best((), rows).rows == 64
    assert tuner.Tuned("kernel", configurations(tuner), torch.empty(0)).best((), rows).rows == 64


@pytest.fixture(scope="module")
def variants():
    """What a training step of W3's first blocks and of a depthwise layer would launch, in every configuration."""
    from benchmarks.orin import triton as table

    named = {"W2": ("features.2.conv.1.0",), "W3": ("conv1", "layer2.0.conv1")}
    found = {}
    for workload, names in named.items():
        with pytest.MonkeyPatch.context() as change:
            layers = {name: layer for name, layer in table.layers_of(workload).items() if name in names}
            change.setattr(table, "layers_of", lambda _, layers=layers: layers)
            for use, several in table.uses([workload]):
                found.update(dict.fromkeys(several, use))
    return list(found)


@pytest.mark.parametrize("capability", [87, 80, 90])
def test_ahead_of_time(capability, variants):
    """No spilled register and no more shared memory than a block may have; for a few here, for all in the table."""
    from benchmarks.orin import triton as table

    every = table.one_of_each(variants)
    assert {v.name for v in every} >= {"compose", "core_gradient", "sum_tiles", "depthwise_forward", "depthwise_backward"}
    wanted = every if ALL else every[capability % 6 :: 6]
    made = [(v, capability, table.resources(table.compile_variant(v, capability))) for v in wanted]
    assert table.failures(made) == []


@pytest.mark.parametrize("capability", [87, 80, 90])
def test_dora_ahead_of_time(capability):
    """Each kernel of dora_fuse in float32 and bfloat16: no spilled register, shared memory that a block may have."""
    from benchmarks.orin import triton as table
    from benchmarks.orin.triton_aot import recorded

    here = mock.patch.multiple(available, DEVICE_TYPE="cpu", runtime=lambda: available.Runtime("cpu"))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with here, FakeTensorMode(), recorded() as variants:
            weight, core, suffix = torch.empty(64, 32, 3, dtype=dtype), torch.empty(64, 4), torch.empty(4, 32, 3)
            trained = [t.requires_grad_() for t in (core, suffix, torch.empty(64))]
            y = dora_fuse(weight, *trained, backend="triton")
            torch.autograd.grad(y, trained, torch.empty_like(y))
        found |= dict.fromkeys(variants)
    assert {v.name for v in found} == {"dora_rows", "dora_row_sums", "dora_finish", "dora_suffix_grad"}
    made = [(v, capability, table.resources(table.compile_variant(v, capability))) for v in found]
    assert table.failures(made) == []


def test_a_spill_is_a_failure(variants):
    from benchmarks.orin import triton as table
    from benchmarks.orin.triton_aot import Compiled

    made = [Compiled(255, 16, 0, 0, None), Compiled(255, 0, 0, 164 * 1024, None), Compiled(255, 0, 0, 163 * 1024, None)]
    found = table.failures([(variants[0], 87, one) for one in made])
    assert len(found) == 2
    assert "16 bytes spilled" in found[0]
    assert "167936 bytes of shared memory, a block may have 166912" in found[1]


def test_tf32_operands_are_rounded(variants):
    """Triton's own product would truncate them, without a conversion in its code."""
    from benchmarks.orin import triton as table

    variant = next(v for v in variants if v.name == "tt_block_forward" and v.constant("UNIT") == "tf32")
    text = table.compile_variant(variant, 87).asm["ptx"]
    assert "cvt.rna.tf32.f32" in text
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32" in text


def test_the_committed_table_has_every_kernel_and_no_spill():
    from benchmarks.orin import triton as table

    rows = table._rows("triton.csv")
    assert {row["arch"] for row in rows} == {"sm_87", "sm_80", "sm_90"}
    assert not [row for row in rows if row["spill_bytes"] != "0"]
    assert {row["kernel"] for row in rows} >= {"tt_block_forward", "tt_block_backward", "compose", "depthwise_forward"}


@on_a_device
def test_on_the_device():
    """The whole case matrix."""
    from helpers.kernel_cases import launches
    from helpers.triton_launches import run

    assert backends()["triton"] == "available"
    wrong = {}
    for launch in launches():
        errors = launch.errors(run(launch, "cuda"))
        if any(not error <= launch.tolerance[name] for name, error in errors.items()):
            wrong[launch.name] = errors
    assert wrong == {}
