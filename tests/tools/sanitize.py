"""Check that this build of the extension is instrumented and that planted faults are found; ``make sanitize`` runs it first.

1. The library holds the symbols of the address and the undefined-behaviour sanitizer.
2. A launch that is given a weight shorter than its fields say reads past its end in the engine's own loops: the address
   sanitizer must end the process and name the overflow.
3. ``planted.cpp``, compiled with the library's own flags, adds one to the largest int: the undefined-behaviour sanitizer must
   end the process and name it.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]


def check_symbols(library: Path) -> None:
    names = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
    for symbol in ("__asan_report_load", "__ubsan_handle"):
        if symbol not in names:
            sys.exit(f"sanitize: {library.name} has no {symbol}*; it is not instrumented, see CXXFLAGS in the Makefile")


def check_found(name: str, wanted: str) -> None:
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    if done.returncode == 0 or wanted not in done.stderr:
        sys.exit(f"sanitize: the planted {name} was not found (exit {done.returncode}):\n{done.stderr[-2000:]}")
    print(f"sanitize: the planted {name} is found: {next(line for line in done.stderr.splitlines() if wanted in line)}")


def overflow() -> None:
    """Launch with a weight of 8 floats whose fields promise more."""
    import random

    from helpers.fuzz_calls import Call, Launch

    launches = (Launch(Call(random.Random(seed)), False) for seed in range(99))
    launch = next(launch for launch in launches if launch.numbers["weight_bytes"] > 32)
    short = launch.held["weight"].flatten()[:8].clone()
    launch.numbers["weight"] = short.data_ptr()
    launch.run()


def wrap() -> None:
    """Add one to INT_MAX in C++."""
    ctypes.CDLL(str(HERE / "planted.so")).planted_wrap(2**31 - 1)


def main() -> None:
    library = next((ROOT / "lora_edge").glob("_C*.so"))
    check_symbols(library)
    flags = shlex.split(os.environ["CXXFLAGS"])
    clean = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run(
        [*compiler, *flags, "-shared", "-fPIC", HERE / "planted.cpp", "-o", HERE / "planted.so"], check=True, env=clean
    )
    check_found("overflow", "ERROR: AddressSanitizer: heap-buffer-overflow")
    check_found("wrap", "runtime error: signed integer overflow")
    print(f"sanitize: {library.name} holds both sanitizers' symbols")


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(ROOT)]
    {"overflow": overflow, "wrap": wrap}.get(sys.argv[1] if len(sys.argv) > 1 else "", main)()
