"""``make compat``: run the core tests on the oldest torch, as on a Jetson, on the newest, and on the pinned one.

    aarch64    torch 2.4.1 on an emulated aarch64 (``aarch64.sh``), every 5th case of each test: about 15 times slower
    newest     the newest torch that pip installs here, in a virtual environment of its own (a CUDA build needs 5.5 GB)
    pinned     the torch of .venv, with the same tests

Installations are kept in build/compat. The extension is compiled once per Python: it does not link torch. Each run writes a row
to benchmarks/results/compat.csv, which replaces the last one of the same name, and fails if a test fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "compat"
ROWS = ROOT / "benchmarks" / "results" / "compat.csv"
FIELDS = (
    "machine",
    "processor",
    "torch",
    "python",
    "cases",
    "passed",
    "failed",
    "skipped",
    "deselected",
    "minutes",
    "lora_edge",
    "date",
)
NEEDED = ["numpy", "safetensors", "pytest", "hypothesis", "tensorly", "pybind11>=2.11", "setuptools>=77", "ninja"]
# Paths under tests/. The other folders need extras, a compiler or minutes, and torch's version matters little to them.
FOLDERS = ("core", "ops", "engines")
ALSO = {"tools/test_models_benchmark.py"}
LEFT_OUT = {  # they need extras, a compiler or a device
    "core/test_peft.py", "engines/test_cuda_backend.py", "engines/test_emulator.py",
    "engines/test_kernels.py", "engines/test_triton.py",
}  # fmt: skip
ONLY_NATIVE = {"core/test_integration.py"}  # torch.compile and DistributedDataParallel need a compiler and several processes
ABOUT = "import json, platform, torch; print(json.dumps([platform.machine(), torch.__version__, platform.python_version()]))"


class Machine(NamedTuple):
    """A Python to run the tests with, and how."""

    python: Path
    every: int
    tests: list[Path]
    options: list[str]


def core(left_out: set[str]) -> list[Path]:
    """The core's test files. A new file in one of ``FOLDERS`` belongs to it unless it is named above.

    Raises:
        SystemExit: a name above has no file.
    """
    tests = ROOT / "tests"
    if stale := sorted(name for name in ALSO | LEFT_OUT | ONLY_NATIVE if not (tests / name).is_file()):
        raise SystemExit(f"make compat: run.py names tests that do not exist: {', '.join(stale)}")
    found = {path.relative_to(tests).as_posix() for folder in FOLDERS for path in (tests / folder).glob("test_*.py")}
    return [tests / name for name in sorted((found | ALSO) - left_out)]


def aarch64(every: int) -> Machine:
    run(["bash", ROOT / "tests" / "tools" / "compat" / "aarch64.sh", FOLDER / "aarch64"])
    return Machine(FOLDER / "aarch64" / "python", every, core(LEFT_OUT | ONLY_NATIVE), ["-m", "not other_python and not timed"])


def newest(every: int) -> Machine:
    folder = Path(os.environ.get("LORA_EDGE_NEWEST", FOLDER / "newest"))
    python = folder / "bin" / "python"
    if not python.is_file():
        run([sys.executable, "-m", "venv", folder])
    run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "torch", *NEEDED])
    suffix = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = subprocess.run([python, "-c", suffix], capture_output=True, text=True, check=True).stdout.strip()
    if not (ROOT / "lora_edge" / f"_C{suffix}").is_file():
        run([python, "setup.py", "-q", "build_ext", "--inplace"], LORA_EDGE_CUDA="0")
    return Machine(python, every, core(LEFT_OUT), [])


def pinned(every: int) -> Machine:
    return Machine(Path(sys.executable), every, core(LEFT_OUT), [])


def examine(name: str, machine: Machine) -> dict[str, object]:
    """The machine's row; the tests' own output goes to the terminal and to build/compat/NAME.log."""
    about = subprocess.run([machine.python, "-W", "ignore", "-c", ABOUT], capture_output=True, text=True, check=True, cwd=ROOT)
    processor, torch, python = json.loads(about.stdout.splitlines()[-1])
    print(f"{name}: {processor}, torch {torch}, Python {python}", flush=True)
    command = [machine.python, "-u", "-m", "pytest", "-p", "no:cacheprovider", "--every", machine.every, "--durations=10"]
    started = time.monotonic()
    process = subprocess.Popen(
        [*map(str, [*command, *machine.options]), *(str(path.relative_to(ROOT)) for path in machine.tests)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )  # fmt: skip
    assert process.stdout is not None
    last = ""
    with (FOLDER / f"{name}.log").open("w") as log:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
            last = line.strip() or last
    process.wait()
    counts = {
        what.rstrip("s"): int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|deselected|errors?)", last)
    }
    if "passed" not in counts or (process.returncode and not counts.get("failed", 0) + counts.get("error", 0)):
        raise SystemExit(f"make compat: pytest ended with {process.returncode} on {name}: {last}")
    version = re.search(r'VERSION = "(.*)"', (ROOT / "lora_edge" / "_version.py").read_text())
    return {
        "machine": name, "processor": processor + " emulated" * (name == "aarch64"), "torch": torch, "python": python,
        "cases": "all" if machine.every == 1 else f"1 in {machine.every}", "passed": counts["passed"],
        "failed": counts.get("failed", 0) + counts.get("error", 0), "skipped": counts.get("skipped", 0),
        "deselected": counts.get("deselected", 0), "minutes": f"{(time.monotonic() - started) / 60:.1f}",
        "lora_edge": version[1] if version else "", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def keep(row: dict[str, object]) -> None:
    """Write a row, replacing the last one of the same machine."""
    rows: dict[str, dict[str, object]] = {}
    if ROWS.is_file():
        with ROWS.open(newline="") as file:
            rows = {old["machine"]: dict(old) for old in csv.DictReader(file)}
    rows[str(row["machine"])] = row
    with ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows.values())


def run(command: list[object], **environment: str) -> None:
    subprocess.run([*map(str, command)], check=True, cwd=ROOT, env={**os.environ, **environment})


MACHINES = {"aarch64": (aarch64, 5), "newest": (newest, 1), "pinned": (pinned, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make compat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("machines", nargs="*", metavar="machine", help=f"{', '.join(MACHINES)}; all by default")
    parser.add_argument("--every", type=int, help="run every N-th case of each test, on all machines")
    options = parser.parse_args()
    if unknown := [name for name in options.machines if name not in MACHINES]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(MACHINES)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.machines or MACHINES:
        prepare, every = MACHINES[name]
        row = examine(name, prepare(options.every or every))
        keep(row)
        print({key: row[key] for key in FIELDS}, flush=True)
        failed += int(str(row["failed"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
