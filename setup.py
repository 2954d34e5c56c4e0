"""Builds lora_edge._C: always module.cpp and the CPU engine, and the CUDA kernels if nvcc is found.

The build needs no network, no GPU and no torch.

LORA_EDGE_CUDA          1: build the kernels or fail; 0: do not build them; unset: build them if nvcc is found
CUDA_HOME, CUDA_PATH    the CUDA toolkit; default: the one whose nvcc is on PATH, then /usr/local/cuda
TORCH_CUDA_ARCH_LIST    in torch's format: "8.7", "8.7+PTX", "8.0;8.6;8.7+PTX", "Ampere"; default: `default_architectures`
MAX_JOBS                compilers at once; default: one job per core, and at most one per 2 GB of free memory
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError, PlatformError

NAMES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}
OLDEST = 8.0  # the first with cp.async and TF32 tensor cores
USUAL_TOOLKIT = "/usr/local/cuda"
MEMINFO = Path("/proc/meminfo")
BYTES_PER_JOB = 2e9


class Toolkit(NamedTuple):
    """Paths of the CUDA toolkit: the compiler, the headers and the libraries."""

    nvcc: str
    include: str
    library: str


def cuda_toolkit() -> Toolkit | None:
    """Return the toolkit that compiles the kernels, or None if they are not built."""
    wish = os.environ.get("LORA_EDGE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise OptionError(f"LORA_EDGE_CUDA is {wish!r}; it must be 0, 1 or unset")
    if wish == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), shutil.which("nvcc"), f"{USUAL_TOOLKIT}/bin/nvcc"]
    nvcc = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if nvcc is None and wish == "1":
        raise PlatformError(
            "LORA_EDGE_CUDA=1 asks for the CUDA kernels, but there is no nvcc in CUDA_HOME, in CUDA_PATH, on PATH "
            f"or in {USUAL_TOOLKIT}; install the CUDA toolkit, or unset LORA_EDGE_CUDA to build without the kernels"
        )
    return nvcc and toolkit_of(nvcc)


def toolkit_of(nvcc: str) -> Toolkit:
    """Return the toolkit with the folders that nvcc itself uses: nvcc may be a wrapper, and distributions differ in layout."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr

    def folder(flag: str, file: str) -> str:
        places = re.findall(rf'"-{flag}([^"]+)"', said)
        for place in places:
            if Path(place, file).is_file():
                return os.path.realpath(place)
        raise PlatformError(
            f"{nvcc} has no {file} ({', '.join(places) or 'nvcc --dryrun names no folder'}); "
            "install the CUDA runtime's development package (cuda-cudart-dev), or set LORA_EDGE_CUDA=0 to build without CUDA"
        )

    return Toolkit(nvcc, folder("I", "cuda_runtime_api.h"), folder("L", "libcudart_static.a"))


def default_architectures() -> str:
    """Return Orin's, with PTX for later devices; except on ARM also 8.0, whose binary runs on older and desktop cards."""
    return "8.7+PTX" if platform.machine() == "aarch64" else "8.0;8.7+PTX"


def architectures() -> list[str]:
    """Return the architectures to compile for, such as ``["8.0", "8.7+PTX"]``."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or default_architectures()
    for name, numbers in NAMES.items():
        text = re.sub(rf"\b{name}\b", numbers, text)
    found = []
    for architecture in re.split(r"[;\s]+", text.strip("; ")):
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", architecture)
        if number is None:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST has {architecture!r}; it must be a list such as 8.7+PTX or 8.0;8.6;8.7+PTX, "
                f"or of the names {', '.join(NAMES)}"
            )
        if float(number[1]) >= OLDEST:
            found.append(architecture)
        else:
            print(f"lora_edge: skipping {architecture} in TORCH_CUDA_ARCH_LIST; the kernels need {OLDEST} or newer")
    if not found:
        raise OptionError(f"TORCH_CUDA_ARCH_LIST is {text!r}; the kernels need {OLDEST} or newer (Orin is 8.7)")
    return found


def gencode(architecture: str) -> list[str]:
    """Return nvcc's flags for one architecture: for its binary and, if requested, its PTX."""
    number = architecture.removesuffix("+PTX").replace(".", "")
    kinds = ["sm", "compute"] if architecture.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def jobs() -> int:
    """Return how many compilers may run at once; six of them exhaust the memory of an Orin with 8 GB."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if text:
        if not text.isdecimal() or int(text) == 0:
            raise OptionError(f"MAX_JOBS is {text!r}; it must be a positive number")
        return int(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.is_file() else None
    return max(1, min(cores, int(1024 * int(free[1]) / BYTES_PER_JOB))) if free else cores


def compile_kernels(toolkit: Toolkit, targets: list[str]) -> list[str]:
    """Compile csrc/cuda/*.cu and return the object files. Ninja compiles in parallel and only what has changed."""
    folder = Path("build", "cuda", "_".join(targets))
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{source.stem}.o" for source in sorted(Path("csrc/cuda").glob("*.cu"))}
    flags = dict.fromkeys(flag for target in targets for flag in gencode(target))
    nvcc = [toolkit.nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *flags]
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else [shutil.which("ninja")]
    if ninja[-1] is None:
        runs = [[*nvcc, "-c", str(source), "-o", str(made)] for source, made in objects.items()]
    else:
        rule = shlex.join(nvcc).replace("$", "$$") + " -MD -MF $out.d -c $in -o $out"
        lines = [f"builddir = {folder}\nrule nvcc\n  command = {rule}\n  depfile = $out.d\n  deps = gcc\n"]
        lines += [f"build {made}: nvcc {source}\n" for source, made in objects.items()]
        file = folder / "build.ninja"
        file.write_text("".join(lines))
        runs = [[*ninja, "-f", str(file), "-j", str(jobs())]]
    for run in runs:
        print(shlex.join(run), flush=True)
        if subprocess.call(run) != 0:
            raise CompileError(f"the CUDA kernels do not compile, see the compiler's messages above; failed: {shlex.join(run)}")
    return [str(made) for made in objects.values()]


class BuildExtension(build_ext):
    """Compile the kernels before the extension."""

    def build_extension(self, extension: Extension) -> None:
        self.force = True  # setuptools checks only the dates of the sources, but flags and kernels may have changed
        toolkit = cuda_toolkit()
        if toolkit is None:
            print("lora_edge: building without the CUDA kernels")
            extension.sources += ["csrc/without_cuda.cpp"]
        else:
            targets = architectures()
            extension.extra_objects += compile_kernels(toolkit, targets)
            extension.sources += ["csrc/device.cpp"]
            extension.include_dirs += [toolkit.include]
            extension.library_dirs += [toolkit.library]
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
            # Hide the symbols of the static runtime; otherwise these calls would go to the libcudart that torch has loaded.
            extension.extra_link_args += ["-Wl,--exclude-libs,ALL"]
            extension.define_macros += [("LORA_EDGE_ARCHITECTURES", f'"{";".join(targets)}"')]
        super().build_extension(extension)


def main() -> None:
    """Run setuptools. The other metadata is in pyproject.toml."""
    if int(setuptools.__version__.split(".")[0]) < 77 or importlib.util.find_spec("pybind11") is None:
        sys.exit('lora_edge: without build isolation, first: pip install "setuptools>=77" "pybind11>=2.11" ninja')
    from pybind11.setup_helpers import Pybind11Extension

    sources = ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    extension = Pybind11Extension("lora_edge._C", sources, cxx_std=17, extra_compile_args=["-O3", "-Wall", "-Wextra"])
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
        packages=[*find_packages(include=["lora_edge*"]), "lora_edge.benchmarks"],  # without benchmarks.study and .orin
        package_dir={"lora_edge.benchmarks": "benchmarks"},
        package_data={"lora_edge": ["py.typed"]},
    )


if __name__ == "__main__":
    main()
