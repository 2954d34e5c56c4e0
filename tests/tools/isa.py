"""``make test-isa``: run the tests of numerics on every instruction set of this processor, each on one and on two threads.

    python tests/tools/isa.py [tests ...]

torch's kernels, oneDNN's and the CPU engine's are limited to the same set: this finds tolerances that hold on one machine only.
A set that the processor does not have is named and left out. Without arguments the files of ``NUMERICS`` run; the others build,
emulate or read files. Exit status 1: a test failed, or no set ran.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETS = {  # ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, LORA_EDGE_CPU
    "default": ("default", "SSE41", "baseline"),
    "avx2": ("avx2", "AVX2", "avx2"),
    "avx512": ("avx512", "AVX512_CORE", "avx512"),
}
THREADS = (1, 2)
NUMERICS = [
    *(f"tests/core/test_{name}.py" for name in (
        "adapt", "adapter_file", "blocks", "budget", "inference", "integration", "lean", "peft", "subspace", "tt",
    )),
    *(f"tests/ops/test_{name}.py" for name in ("doors", "tt_block", "tt_conv")),
    "tests/methods/test_every_method.py", "tests/engines/test_cpu_engine.py",
    "tests/har/test_frame.py", "tests/har/test_har.py",
]  # fmt: skip
ASK = """
import torch
from lora_edge.environment import extension
print(torch.backends.cpu.get_cpu_capability().lower(), "none" if extension.reason() else extension.load().build_info()["cpu"])
"""


def environment(name: str, threads: int) -> dict[str, str]:
    aten, onednn, engine = SETS[name]
    chosen = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "LORA_EDGE_CPU": engine}
    # torch.compile's cache does not distinguish instruction sets: it compiles AVX-512 code that it finds there for any set
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor" / name)}
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return {**os.environ, **chosen, **cache, **paths, "OMP_NUM_THREADS": str(threads)}


def missing(name: str) -> str | None:
    """Why a set does not run here, None where it does.

    Raises:
        SystemExit: Python raised an error, which is a fault of this file or of the installation and not of the processor.
    """
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, cwd=ROOT, env=environment(name, 1))
    if done.returncode < 0:
        return f"torch does not run with it: signal {-done.returncode}"
    if done.returncode > 0:
        sys.exit(f"isa: cannot ask for the instruction set of {name}:\n{done.stderr}")
    torch_has, engine_has = done.stdout.split()
    if torch_has not in (name, "no avx") and not (name == "default" and torch_has not in SETS):
        return f"torch uses {torch_has}"
    return None if engine_has in (SETS[name][2], "none") else f"the CPU engine uses {engine_has}"


def main() -> None:
    ran, failed = 0, []
    for name in SETS:
        why = missing(name)
        if why is not None:
            print(f"{name}: left out, {why}", flush=True)
            continue
        for threads in THREADS:
            ran += 1
            began = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(sys.argv[1:] or NUMERICS)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(name, threads))
            last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-300:]
            print(f"{name}, {threads} threads, {time.monotonic() - began:.0f} s: {last}", flush=True)
            if done.returncode != 0:
                failed.append(f"{name}, {threads} threads")
                print(done.stdout[-6000:], done.stderr[-1000:], flush=True)
    if not ran:
        sys.exit("isa: none of the sets runs here")
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
