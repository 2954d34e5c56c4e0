"""``make mutate``: check that the tests notice every missing barrier, wait, bounds check and boundary mask.

Every ``inside(...)``, ``sync_block()``, ``sync_warp()`` and ``async_wait<N>()`` of the kernels is a site. One copy of the
kernels, built once with the sanitizers, can switch off any of them at start. For each site the emulator runs the case matrix
(``kernel_cases.py``), cheapest cases first, until one fails: by an error of the emulator, a crash, a timeout or a wrong result.
Only cases in which the site has an effect are run: where its condition is false, or its barrier is reached.

A site that no test can notice carries its proof on its line, ``// proven: <why>``, and is counted separately. The output ends
with ``caught N of N``, or with the sites that were not caught and exit code 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers import emulator, kernel_cases
from helpers.emulator import CSRC, Job

PATTERN = re.compile(r"\binside\(|\bsync_block\(\)|\bsync_warp\(\)|\basync_wait<\d+>\(\)")
COPY = emulator.ROOT / "build" / "mutants"
SEEDS = 2  # the happens-before record does not depend on the schedule, nor does a wrong index
TIMEOUT = 60.0  # seconds per batch of cases
WORKERS = 2

_SWITCHES = """
namespace lora_edge {
extern const int switched_off;
extern unsigned char did_something[];  // by site

inline bool inside_at(int site, bool condition) {
  if (!condition) did_something[site] = 1;
  return condition || switched_off == site;
}
inline bool stays(int site) {
  did_something[site] = 1;
  return switched_off != site;
}
}  // namespace lora_edge
"""

_SWITCHBOARD = """
#include <chrono>
#include <cstdlib>
#include "emulator/job.h"
namespace lora_edge {
extern const int switched_off = std::getenv("LORA_EDGE_SITE") == nullptr ? -1 : std::atoi(std::getenv("LORA_EDGE_SITE"));
unsigned char did_something[%d];

// The time in seconds, and the sites that did something since the last answer.
static std::string answer(const emulator::Job&) {
  std::string text = std::to_string(std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count());
  for (size_t site = 0; site < sizeof did_something; ++site) {
    if (did_something[site] != 0) text += " " + std::to_string(site);
    did_something[site] = 0;
  }
  return text;
}
static const emulator::Register op({"sites", nullptr, nullptr, nullptr, answer});
}  // namespace lora_edge
"""


@dataclass(frozen=True)
class Site:
    number: int
    file: str
    line: int
    text: str  # the code that is switched off
    proof: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def find_and_switch(text: str, file: str, first: int) -> tuple[str, list[Site]]:
    """Return the text with a switch at every site, and the sites, numbered from `first`. Lines keep their numbers."""
    lines: list[str] = []
    sites: list[Site] = []
    for number, line in enumerate(text.split("\n"), 1):
        code, slashes, comment = line.partition("//")
        proof = re.search(r"\bproven: *(\S.*)", comment)
        switched, copied = "", 0
        for match in PATTERN.finditer(code):
            site = Site(first + len(sites), file, number, _whole(code, match.start()), proof.group(1) if proof else None)
            sites.append(site)
            matched = match.group()
            switch = f"inside_at({site.number}, " if matched == "inside(" else f"(stays({site.number}) ? {matched} : void())"
            switched += code[copied : match.start()] + switch
            copied = match.end()
        lines.append(switched + code[copied:] + slashes + comment)
    return "\n".join(lines), sites


def _whole(code: str, at: int) -> str:
    """The call that begins at `at`, up to the end of the line."""
    depth = 0
    for end in range(at, len(code)):
        depth += (code[end] == "(") - (code[end] == ")")
        if depth == 0 and code[end] == ")":
            return code[at : end + 1]
    return code[at:].strip()


def switched_copy() -> list[Site]:
    """Write the copy of csrc under build/mutants and return its sites."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(CSRC, COPY)
    sites: list[Site] = []
    for path in sorted(COPY.glob("cuda/*.cu*")):
        if path.name == "gpu.cuh":
            path.write_text(path.read_text() + _SWITCHES)
            continue
        text, found = find_and_switch(path.read_text(), path.name, len(sites))
        path.write_text(text)
        sites += found
    (COPY / "switchboard.cpp").write_text(_SWITCHBOARD % max(len(sites), 1))
    return sites


@dataclass
class Case:
    launch: kernel_cases.Launch
    job: Job
    seconds: float = 0.0
    sites: frozenset[int] = frozenset()

    def failure(self, result: emulator.Result) -> str | None:
        if result.error is not None:
            return result.error.splitlines()[0]
        if result.refused is not None:
            return f"refused: {result.refused}"
        for name, error in self.launch.errors(result.outputs).items():
            if not error <= self.launch.tolerance.get(name, 0.0):
                return f"{name} is wrong by {error:.2g}"
        return None


def all_cases() -> list[Case]:
    return [Case(x, Job(x.name, x.op, x.fields, x.inputs, x.outputs, x.scratch, seeds=SEEDS)) for x in kernel_cases.launches()]


def measure(cases: Sequence[Case], runner: Path) -> None:
    """Run every case with nothing switched off; record its time and the sites that had an effect in it."""
    question = Job("sites", "sites", {})
    results = emulator.run([job for case in cases for job in (case.job, question)], runner)
    before = 0.0
    for case, result, answer in zip(cases, results[::2], results[1::2], strict=True):
        failure = case.failure(result)
        if failure is not None:
            raise SystemExit(f"fails with nothing switched off: {case.job.name}: {failure}")
        assert answer.answer is not None
        now, *sites = answer.answer.split()
        case.seconds = float(now) - before if before else 1.0
        case.sites = frozenset(map(int, sites))
        before = float(now)


def catch(site: Site, cases: Sequence[Case], runner: Path) -> str | None:
    """Return the first case that notices, and how; None if all pass. The cases run in batches of growing size."""
    able = sorted((case for case in cases if site.number in case.sites), key=lambda case: case.seconds)
    begin, size = 0, 2
    while begin < len(able):
        batch = able[begin : begin + size]
        results = emulator.run([case.job for case in batch], runner, TIMEOUT, {"LORA_EDGE_SITE": str(site.number)})
        for case, result in zip(batch, results, strict=True):
            failure = case.failure(result)
            if failure is not None:
                return f"{case.job.name}: {failure}"
        begin, size = begin + size, size * 2
    return None


def report(sites: Sequence[Site], caught: dict[int, str | None]) -> int:
    for file in sorted({site.file for site in sites}):
        here = [site for site in sites if site.file == file]
        found = sum(caught.get(site.number) is not None for site in here)
        proven = sum(site.proof is not None for site in here)
        print(f"{file}: {len(here)} sites, {found} caught, {proven} proven")
    missed = [site for site in sites if site.proof is None and caught[site.number] is None]
    for site in missed:
        print(f"not caught: {site}")
    open_sites = [site for site in sites if site.proof is None]
    for site in sites:
        if site.proof is not None:
            print(f"proven: {site}: {site.proof}")
    print(f"caught {len(open_sites) - len(missed)} of {len(open_sites)}")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--file", help="only the sites of this file, such as tt_fuse.cu")
    parser.add_argument("--list", action="store_true", help="print the sites and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    sites = switched_copy()
    if arguments.list:
        print(*sites, sep="\n")
        return 0
    sources = [*sorted(COPY.glob("cuda/*.cu")), COPY / "switchboard.cpp", COPY / "emulator" / "problem_ops.cpp"]
    runner = emulator.build(True, sources=sources, include=COPY)
    cases = all_cases()
    measure(cases, runner)
    print(f"{len(sites)} sites, {len(cases)} cases; built and measured in {time.monotonic() - begin:.0f} s", flush=True)
    sites = [site for site in sites if arguments.file in (None, site.file)]
    caught: dict[int, str | None] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        wanted = [site for site in sites if site.proof is None]
        for site, how in zip(wanted, pool.map(lambda site: catch(site, cases, runner), wanted), strict=True):
            caught[site.number] = how
            able = sum(site.number in case.sites for case in cases)
            print(f"  {site}: {how or f'NOT CAUGHT by the {able} cases in which it does something'}", flush=True)
    print(f"{time.monotonic() - begin:.0f} s")
    return report(sites, caught)


if __name__ == "__main__":
    sys.exit(main())
