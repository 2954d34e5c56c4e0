"""The package builds wherever it should, and says why where it cannot. About 40 s; with nvcc, minutes at first.

What users of compiled extensions complain about, and what prevents it here:

    undefined symbols after a torch upgrade  no symbol of torch in the module        test_links_nothing_of_torch_or_cuda
    "No module named torch" in a build       neither setup.py nor its needs have it  test_wheel_without_cuda, torch poisoned
    TORCH_CUDA_ARCH_LIST ignored             setup.py turns it into nvcc's flags       test_architectures, test_max_jobs
    an sdist without csrc                    MANIFEST.in                             test_sdist_is_whole; wheels are built of it
    a silently wrong cubin                   flags and headers count as changes      test_a_change_compiles_again
    "no kernel image" on sm_87               8.7 with PTX in every default           test_default_architectures, test_cuda_build
    -j6 runs an 8 GB Orin out of memory      2 GB per job, MAX_JOBS; benchmarks.build  test_jobs, test_max_jobs
    a torch bound that replaced the wheel    "torch" without a version               test_metadata
    triton missing, or without a driver      an extra that no import needs           test_metadata, test_import.py
    builds that swallow their errors         the compiler's words, then one line     test_compile_errors_show
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

from helpers.builds import ROOT, python
from lora_edge.environment import extension as _extension

LAUNCHES = (
    "tt_fuse_forward", "tt_fuse_backward", "dora_fuse_forward", "dora_fuse_backward", "tt_block_forward", "tt_block_backward",
)  # fmt: skip
MISSING = [name for name in ("setuptools", "pybind11", "build") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'{MISSING} not installed: pip install "lora_edge[test]"')

# Builds a plan, launches each op, and says what came of it.
LAUNCH = """
plan = extension.Plan(**dict.fromkeys(extension.call_fields("Plan"), 1) | {"cores": 0, "type": 0})
print(extension.build_info(), extension.device_info())
for op in OPS:
    try:
        getattr(plan, op)((0,) * len(extension.call_fields(op)), 0, 0)
    except RuntimeError as error:
        print(error)
""".replace("OPS", repr(LAUNCHES))


def load_from(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def setup_py():
    return load_from(ROOT / "setup.py", "lora_edge_setup")


@pytest.fixture(scope="session")
def module(wheel):
    """The extension of the wheel, imported beside the installed one."""
    return load_from(next((wheel / "lora_edge").glob("_C*.so")), "_C")


@pytest.fixture
def fields(module) -> dict[str, float]:
    """Keywords of a small plan."""
    return dict.fromkeys(module.call_fields("Plan"), 1) | {"cores": 0, "type": 0, "low": 0.0, "high": 6.0, "scale": 0.5}


# The package


def test_sdist_is_whole(copy, unpacked):
    def files(root: Path, *folders: str) -> set[str]:
        return {str(path.relative_to(root)) for folder in folders for path in (root / folder).rglob("*") if path.is_file()}

    folders = ("csrc", "lora_edge", "benchmarks", "tests")
    assert "csrc/emulator/gpu.h" in files(unpacked, "csrc")
    assert files(unpacked, *folders) == files(copy, *folders)
    assert (unpacked / "Makefile").is_file()


def test_wheel_without_cuda(wheel):
    code = (
        "import lora_edge.environment.extension as e; print(e.__file__); extension = e.load(); assert e.reason() is None"
        + LAUNCH
    )
    done = python("-c", code, cwd=wheel)
    lines = done.stdout.splitlines()
    assert lines[0] == str(wheel / "lora_edge" / "environment" / "extension.py"), done.stdout
    assert "'cuda': None" in lines[1]
    assert "built without CUDA" in lines[1]
    assert [line.split(": ")[0] for line in lines[2:]] == list(LAUNCHES)
    assert all("built without CUDA; put nvcc on PATH" in line for line in lines[2:])


def test_benchmarks_are_part_of_the_wheel(wheel):
    names = ("memory", "workloads")  # the others need the sources of a clone
    code = (
        "import importlib.util, lora_edge.benchmarks\n"
        "print(lora_edge.benchmarks.RESULTS, importlib.util.find_spec('benchmarks'))\n"
        f"for name in {names}: importlib.import_module('lora_edge.benchmarks.' + name)"
    )
    done = python("-c", code, cwd=wheel)
    assert done.stdout == "results None\n"
    assert "usage: python -m benchmarks.memory" in python("-m", "lora_edge.benchmarks.memory", "--help", cwd=wheel).stdout
    assert not [path for path in (wheel / "lora_edge" / "benchmarks").iterdir() if path.name in ("study", "orin", "results")]


def test_types_come_with_the_wheel(wheel):
    assert (wheel / "lora_edge" / "py.typed").is_file()


def test_metadata(wheel):
    about = message_from_string(next(wheel.glob("*.dist-info/METADATA")).read_text())
    required = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["numpy", "safetensors", "torch"]
    assert {"bench", "har", "test", "triton"} <= set(about.get_all("Provides-Extra"))
    assert not any(
        "triton" in line for line in about.get_all("Requires-Dist") if 'extra == "t' not in line
    )  # [triton] and [test]


def test_links_nothing_of_torch_or_cuda(wheel):
    _links_nothing_of_torch_or_cuda(next((wheel / "lora_edge").glob("_C*.so")))


def _links_nothing_of_torch_or_cuda(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not on PATH")
    dynamic = subprocess.run(["readelf", "-d", "--dyn-syms", "-W", library], check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in dynamic.splitlines() if line.strip()}  # libraries and symbols, besides addresses
    assert "PyInit__C" in names
    assert [name for name in names if re.search("torch|c10|cuda", name) and not name.startswith("0x")] == []


# setup.py


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8.7", ["8.7"]),
        (" 8.7+PTX ", ["8.7+PTX"]),
        ("8.0;8.6;8.7+PTX", ["8.0", "8.6", "8.7+PTX"]),
        ("8.0 8.7;", ["8.0", "8.7"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("Ampere;8.7;9.0a", ["8.0", "8.6+PTX", "8.7", "9.0a"]),
        ("5.2 6.0 7.5 8.0 10.0+PTX", ["8.0", "10.0+PTX"]),  # as in an NGC container
    ],
)
def test_architectures(setup_py, monkeypatch, text, wanted):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert setup_py.architectures() == wanted


@pytest.mark.parametrize("text", ["87", "8.7+ptx", "sm_87", "8.7,8.6", "Pascal", "7.5"])
def test_architectures_refused(setup_py, monkeypatch, text):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(setup_py.OptionError, match=r"^TORCH_CUDA_ARCH_LIST .* 8\.7"):
        setup_py.architectures()


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_default_architectures(setup_py, monkeypatch, machine):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup_py.platform, "machine", lambda: machine)
    assert setup_py.architectures()[-1] == "8.7+PTX"
    assert setup_py.gencode("8.7+PTX") == ["-gencode=arch=compute_87,code=sm_87", "-gencode=arch=compute_87,code=compute_87"]


def test_jobs(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_py.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(setup_py.OptionError, match="MAX_JOBS is 'many'; it must be a positive number"):
        setup_py.jobs()
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(setup_py.os, "sched_getaffinity", lambda _: set(range(6)))
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(setup_py, "MEMINFO", meminfo)
    for free, wanted in ((6_300_000, 3), (64_000_000, 6), (500_000, 1)):
        meminfo.write_text(f"MemTotal: 7800000 kB\nMemAvailable:   {free} kB\n")
        assert setup_py.jobs() == wanted


@pytest.fixture
def no_toolkit(setup_py, monkeypatch, tmp_path):
    """A machine without CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "LORA_EDGE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup_py, "USUAL_TOOLKIT", str(tmp_path / "cuda"))


def test_cuda_demanded_but_absent(setup_py, monkeypatch, no_toolkit):
    assert setup_py.cuda_toolkit() is None
    monkeypatch.setenv("LORA_EDGE_CUDA", "1")
    with pytest.raises(
        setup_py.PlatformError, match="LORA_EDGE_CUDA=1 asks for the CUDA kernels, but there is no nvcc in CUDA_HOME"
    ):
        setup_py.cuda_toolkit()
    monkeypatch.setenv("LORA_EDGE_CUDA", "yes")
    with pytest.raises(setup_py.OptionError, match="LORA_EDGE_CUDA is 'yes'; it must be 0, 1 or unset"):
        setup_py.cuda_toolkit()


def test_cuda_demanded_but_absent_ends_the_build(copy, tmp_path):
    code = f"import sys, setup; setup.USUAL_TOOLKIT = {str(tmp_path)!r}; sys.argv = ['setup.py', 'build_ext']; setup.main()"
    done = python("-c", code, cwd=copy, PATH=str(tmp_path), LORA_EDGE_CUDA="1", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error: LORA_EDGE_CUDA=1 asks for the CUDA kernels")


def fake_nvcc(folder: Path, body: str) -> str:
    """Write an nvcc in Python, in a toolkit of its own under `folder`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!{sys.executable}\nimport sys, time\nfrom pathlib import Path\n{body}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.mark.parametrize(
    ("name", "place"), [("CUDA_HOME", "env"), ("CUDA_PATH", "env"), ("PATH", "bin"), ("USUAL_TOOLKIT", "usual")]
)
def test_toolkit_is_found(setup_py, monkeypatch, no_toolkit, tmp_path, name, place):
    home = tmp_path / "a toolkit"
    said = f'#$ INCLUDES="-I{home}/bin/../include"\n#$ LIBRARIES=  "-L{home}/bin/../lib/stubs" "-L{home}/bin/../lib"\n'
    nvcc = fake_nvcc(home, f"sys.stderr.write({said!r})")
    if place == "usual":
        monkeypatch.setattr(setup_py, name, str(home))
    else:
        monkeypatch.setenv(name, str(home / "bin" if place == "bin" else home))
    with pytest.raises(
        setup_py.PlatformError, match=r"nvcc has no cuda_runtime_api\.h .*; install the CUDA runtime's development"
    ):
        setup_py.cuda_toolkit()
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime_api.h").touch()
    with pytest.raises(setup_py.PlatformError, match=r"nvcc has no libcudart_static\.a .*/lib/stubs"):
        setup_py.cuda_toolkit()
    (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").touch()
    assert setup_py.cuda_toolkit() == (nvcc, str(home / "include"), str(home / "lib"))


COMPILE = """
out = Path(sys.argv[sys.argv.index("-o") + 1])
with open("log", "a") as log: log.write("+")
time.sleep(0.3)
with open("log", "a") as log: log.write("-")
out.write_text(" ".join(sys.argv))
if "-MF" in sys.argv: Path(sys.argv[sys.argv.index("-MF") + 1]).write_text(f"{out}: {sys.argv[-3]} csrc/cuda/a.h\\n")
"""


@pytest.fixture(params=["ninja", "no ninja"])
def project(request, setup_py, monkeypatch, tmp_path) -> Path:
    """A project of three kernels, with ninja and without."""
    if request.param == "ninja" and importlib.util.find_spec("ninja") is None:
        pytest.skip("ninja is not installed")
    if request.param == "no ninja":
        monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(setup_py.shutil, "which", lambda _: None)
    monkeypatch.chdir(tmp_path)
    Path("csrc/cuda").mkdir(parents=True)
    for name in ("a.cu", "b.cu", "c.cu", "a.h"):
        Path("csrc/cuda", name).touch()
    return tmp_path


def test_max_jobs(setup_py, project, monkeypatch):
    toolkit = setup_py.Toolkit(fake_nvcc(project / "with space", COMPILE), "", "")
    monkeypatch.setenv("MAX_JOBS", "1")
    objects = setup_py.compile_kernels(toolkit, ["8.7+PTX"])
    assert [Path(made).name for made in objects] == ["a.o", "b.o", "c.o"]
    assert Path("log").read_text() == "+-+-+-"
    assert "-gencode=arch=compute_87,code=sm_87 -gencode=arch=compute_87,code=compute_87 " in Path(objects[0]).read_text()


def test_a_change_compiles_again(setup_py, project):
    toolkit = setup_py.Toolkit(fake_nvcc(project / "cuda", COMPILE), "", "")
    setup_py.compile_kernels(toolkit, ["8.7"])
    first = setup_py.compile_kernels(toolkit, ["8.0"])
    assert "arch=compute_80" in Path(first[0]).read_text()
    with_ninja = Path("build/cuda/8.0/build.ninja").exists()
    for touched in ("csrc/cuda/a.h", "csrc/cuda/b.cu"):
        Path("log").unlink()
        Path(touched).touch()
        setup_py.compile_kernels(toolkit, ["8.0"])
        assert Path("log").read_text().count("+") == (1 if with_ninja and touched == "csrc/cuda/b.cu" else 3)


def test_compile_errors_show(setup_py, project, capfd):
    toolkit = setup_py.Toolkit(fake_nvcc(project / "cuda", "sys.exit('csrc/cuda/a.cu(3): error: this is no C++')"), "", "")
    with pytest.raises(setup_py.CompileError, match="the CUDA kernels do not compile, see the compiler's messages above"):
        setup_py.compile_kernels(toolkit, ["8.7"])
    said = capfd.readouterr()
    assert "csrc/cuda/a.cu(3): error: this is no C++" in said.out + said.err


# The module


def test_plan_names_what_is_wrong(module, fields):
    plan = module.Plan(**fields)
    assert "built without CUDA" in plan.refusal("tt_fuse")
    assert set(plan.scratch()) == {"packed_forward", "packed_backward", "partial", "fuse_partial", "h", "bits"}
    for change, error, text in (
        ({"colour": 1}, TypeError, "there is no field colour"),
        ({"stride_h": 1.0}, TypeError, "stride_h is 1.0; it must be an int"),
        ({"rank": True}, TypeError, "rank is True; it must be an int"),
        ({"scale": "1"}, TypeError, "scale is '1'; it must be a number"),
        ({"stride_h": 0}, ValueError, "stride_h is 0; it must lie in 1..2147483647"),
        ({"batch": 2**31}, ValueError, "batch is 2147483648; it must lie in 0..2147483647"),
        ({"batch": 2**70}, ValueError, f"batch is {2**70}; it must lie in 0..2147483647"),
        ({"type": 3}, ValueError, "type is 3; it must lie in 0..2"),
        ({"groups": 2}, ValueError, r"groups is 2; it must divide channels \(1\) and outputs \(1\)"),
        ({"cores": 1}, ValueError, "cores is 1; it must be 0, 2 or 3"),
        ({"cores": 3, "bond3": 0}, ValueError, "a bond is 0; the bonds between the cores must be at least 1"),
    ):
        with pytest.raises(error, match=f"^Plan: {text}$"):
            module.Plan(**fields | change)
    del fields["dilation_w"]
    with pytest.raises(TypeError, match=r"^Plan: the field dilation_w is missing$"):
        module.Plan(**fields)
    with pytest.raises(ValueError, match=r"^refusal: there is no op tt_conv; it must be tt_fuse, dora_fuse or tt_block$"):
        plan.refusal("tt_conv")


@pytest.mark.parametrize("op", LAUNCHES)
def test_launch_names_what_is_wrong(module, fields, op):
    launch, names = getattr(module.Plan(**fields), op), module.call_fields(op)
    args = (0,) * len(names)
    for wrong, text in (
        (list(args), "args is a list; it must be a tuple"),
        (args[1:], rf"args has {len(args) - 1} values; it must have {len(args)}, see call_fields\(\"{op}\"\)"),
        ((0, None, *args[2:]), rf"args\[1\] \({names[1]}\) is None; it must be an int of at most 64 bits"),
        ((*args[:-1], 0.5), rf"args\[{len(args) - 1}\] \({names[-1]}\) is 0.5; it must be an int of at most 64 bits"),
        ((2**64, *args[1:]), rf"args\[0\] \({names[0]}\) is {2**64}; it must be an int of at most 64 bits"),
    ):
        with pytest.raises(TypeError, match=f"^{op}: {text}$"):
            launch(wrong, 0, 0)
    with pytest.raises(TypeError, match=f"^{op}: device is None; it must be an int"):
        launch(args, None, 0)
    with pytest.raises(TypeError, match=f"^{op}: stream is 'default'; it must be an int"):
        launch(args, 0, "default")


def test_extension_says_why_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_edge._C", None)
    _extension._find.cache_clear()
    try:
        assert _extension.reason().startswith("not built; install lora_edge with pip")
        with pytest.raises(RuntimeError, match=r"^lora_edge\._C is not built; install lora_edge with pip from a clone"):
            _extension.load()
    finally:
        _extension._find.cache_clear()


def test_extension_says_why_it_does_not_load(monkeypatch):
    def broken(name: str):
        raise ImportError("GLIBCXX_3.4.32 not found")

    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    _extension._find.cache_clear()
    try:
        assert _extension.reason().startswith("not loadable (GLIBCXX_3.4.32 not found); install lora_edge with pip")
    finally:
        _extension._find.cache_clear()


@pytest.mark.slow
def test_cuda_build(setup_py, monkeypatch, tmp_path):
    """The kernels for Orin compile (minutes; later only what has changed), link and import; a launch names what is missing."""
    monkeypatch.delenv("LORA_EDGE_CUDA", raising=False)
    if setup_py.cuda_toolkit() is None:
        pytest.skip("nvcc is not installed")
    arguments = ("setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path)
    done = python(*arguments, cwd=ROOT, LORA_EDGE_CUDA="1", TORCH_CUDA_ARCH_LIST="8.7+PTX")
    assert done.returncode == 0, done.stdout
    library = next((tmp_path / "lora_edge").glob("_C*.so"))
    _links_nothing_of_torch_or_cuda(library)
    if (cuobjdump := _cuobjdump()) is not None:
        listed = subprocess.run(
            [cuobjdump, "--list-elf", "--list-ptx", library], check=True, capture_output=True, text=True
        ).stdout
        kernels = len(list((ROOT / "csrc").glob("cuda/*.cu")))
        assert set(re.findall(r"sm_\d+\.\w+", listed)) == {"sm_87.cubin", "sm_87.ptx"}
        assert listed.count("sm_87.cubin") == listed.count("sm_87.ptx") == kernels
    done = python("-c", "import _C as extension" + LAUNCH, cwd=library.parent, CUDA_VISIBLE_DEVICES="")
    lines = done.stdout.splitlines()
    assert "'architectures': '8.7+PTX'" in lines[0], done.stdout
    assert [line.split(": ")[0] for line in lines[1:]] == list(LAUNCHES)
    if "'driver': None" in lines[0]:
        assert "'error': 'no NVIDIA driver is loaded on this machine'" in lines[0]
        assert all(line.endswith("(no NVIDIA driver is loaded on this machine)") for line in lines[1:])


def _cuobjdump() -> str | None:
    """The path of a cuobjdump: the toolkit's, or the one in the triton wheel."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in triton.submodule_search_locations] if triton else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
