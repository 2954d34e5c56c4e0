"""``make compat``: the core tests on the oldest torch, as a Jetson has it, and on the newest, beside the pinned one.

    aarch64    torch 2.4.1 on an emulated aarch64 (``aarch64.sh``), every 5th case of each test: some 15 times slower
    newest     the newest torch that pip installs here, in a virtual environment of its own (a CUDA build takes 5.5 GB)
    pinned     the torch of .venv, with the same tests

What is installed lies in build/compat and is kept. The extension is compiled once per Python: it does not link torch. Writes a
row each to benchmarks/results/compat.csv, in place of the last one of its name, and fails where a test does.
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
# Not the core: they need extras, a compiler, a device or minutes; torch's version is nothing to them or tested by what is left.
LEFT_OUT = {
    "build", "check", "cli", "cuda_backend", "frame", "har", "emulator", "kernel_benchmark", "kernels", "methods", "peft",
    "orin", "study", "triton", "finds_out_early", "not_a_number", "plain_install",
}  # fmt: skip
ONLY_NATIVE = {"integration"}  # torch.compile and DistributedDataParallel: a compiler and processes of the emulated machine
ABOUT = "import json, platform, torch; print(json.dumps([platform.machine(), torch.__version__, platform.python_version()]))"


class Machine(NamedTuple):
    """A Python to run the tests with, and how."""

    python: Path
    every: int
    tests: list[Path]
    options: list[str]


def core(left_out: set[str]) -> list[Path]:
    """The core's test files; a new file belongs to it unless it is named above."""
    return [path for path in sorted((ROOT / "tests").glob("*/test_*.py")) if path.stem.removeprefix("test_") not in left_out]


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
    """Write a row in the place of the last one of its machine."""
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
    parser.add_argument("machines", nargs="*", metavar="machine", help=f"{', '.join(MACHINES)}; all where none is named")
    parser.add_argument("--every", type=int, help="every N-th case of each test, on all of them")
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
