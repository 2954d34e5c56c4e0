"""Reads what the compiler made of a kernel: registers and spills from ptxas, instructions and loops from the SASS."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_JUMPS = ("BRA", "JMP", "CALL")
_ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@predicate opcode operands`` at a byte address."""

    address: int
    predicate: str
    opcode: str
    operands: str

    def target(self) -> int | None:
        """The target of a jump, its last hexadecimal operand; None if it does not jump."""
        if self.opcode.split(".")[0] not in _JUMPS:
            return None
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    def ends(self) -> bool:
        """Whether a warp that executes it ends here."""
        return self.opcode.split(".")[0] in _ENDS

    def may_fall_through(self) -> bool:
        """Whether the next instruction can follow it."""
        if not self.ends() and self.target() is None:
            return True
        conditional = "," in self.operands and "P" in self.operands.split(",")[0]
        return bool(self.predicate) or conditional or self.opcode.startswith(("CALL", "BRA.DIV", "BRA.CONV"))


def is_tensor(i: Instruction) -> bool:
    return i.opcode.startswith("HMMA")


def is_fma(i: Instruction) -> bool:
    return i.opcode.startswith("FFMA")


def is_async_copy(i: Instruction) -> bool:
    return i.opcode.startswith("LDGSTS")


def is_wide(i: Instruction) -> bool:
    """Accesses of 16 bytes per lane: global, shared, asynchronous, and the matrix loads."""
    memory = i.opcode.startswith(("LDG", "STG", "LDS", "STS"))
    return (memory and ".128" in i.opcode) or i.opcode.startswith("LDSM")


def is_barrier(i: Instruction) -> bool:
    return i.opcode.startswith("BAR")


def is_local(i: Instruction) -> bool:
    """Local memory: spilled registers, and arrays that are indexed at run time."""
    return i.opcode.startswith(("STL", "LDL"))


Kind = Callable[[Instruction], bool]


@dataclass(frozen=True)
class Loop:
    """A natural loop. ``own`` are the instructions outside its inner loops."""

    head: int
    instructions: tuple[Instruction, ...]
    own: tuple[Instruction, ...]

    def count(self, kind: Kind) -> int:
        return sum(map(kind, self.instructions))


@dataclass(frozen=True, eq=False)
class Code:
    """The instructions of one kernel."""

    symbol: str
    instructions: tuple[Instruction, ...]

    def count(self, kind: Kind) -> int:
        return sum(map(kind, self.instructions))

    @cached_property
    def blocks(self) -> dict[int, list[Instruction]]:
        """Basic blocks by their first address."""
        return _basic_blocks(self.instructions)

    @cached_property
    def flow(self) -> nx.DiGraph:
        """The control-flow graph of the basic blocks."""
        return _control_flow(self.blocks)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All natural loops by their heads: back edges of the control flow are those whose target dominates their source."""
        entry = min(self.blocks)
        dominators = nx.immediate_dominators(self.flow, entry)
        members: dict[int, set[int]] = {}
        for source, head in self.flow.edges:
            if source in dominators and _dominates(dominators, head, source, entry):
                backwards = self.flow.reverse(copy=False).subgraph(set(self.flow) - {head})
                inside = nx.descendants(backwards, source) | {source} if source != head else set()
                members.setdefault(head, {head}).update(inside)
        loops = []
        for head, inside in sorted(members.items()):
            nested = {b for other, theirs in members.items() if other != head and other in inside for b in theirs}
            loops.append(Loop(head, self._instructions_of(inside), self._instructions_of(inside - nested)))
        return tuple(loops)

    @cached_property
    def innermost(self) -> Loop | None:
        """The loop with the most multiply-adds of its own, without its inner loops; None without multiply-adds in a loop."""
        found = max(self.loops, key=lambda p: (sum(map(is_tensor, p.own)), sum(map(is_fma, p.own))), default=None)
        return found if found is not None and (found.count(is_tensor) or found.count(is_fma)) else None

    @cached_property
    def outermost(self) -> Loop | None:
        """The outermost loop around :attr:`innermost`: that over the k tiles, if there is one. None without an innermost."""
        if self.innermost is None:
            return None
        around = [loop for loop in self.loops if self.innermost.instructions[0] in loop.instructions]
        return max(around, key=lambda loop: len(loop.instructions))

    def _instructions_of(self, blocks: Iterable[int]) -> tuple[Instruction, ...]:
        return tuple(i for b in sorted(blocks) for i in self.blocks[b])


def parse(text: str) -> dict[str, Code]:
    """The kernels of ``cuobjdump -sass``, by mangled name."""
    parts = _FUNCTION.split(text)[1:]
    found = {}
    for symbol, body in zip(parts[::2], parts[1::2], strict=True):
        instructions = [
            Instruction(int(address, 16), predicate or "", opcode, operands)
            for address, predicate, opcode, operands in _INSTRUCTION.findall(body)
        ]
        found[symbol] = Code(symbol, _without_padding(instructions))
    return found


def _without_padding(instructions: list[Instruction]) -> tuple[Instruction, ...]:
    """Return the code without the NOPs and the jump to itself that fill the end of a kernel."""
    while instructions and (instructions[-1].opcode == "NOP" or instructions[-1].target() == instructions[-1].address):
        instructions = instructions[:-1]
    return tuple(instructions)


def _basic_blocks(instructions: Iterable[Instruction]) -> dict[int, list[Instruction]]:
    instructions = list(instructions)
    leaders = {i.target() for i in instructions}
    blocks: dict[int, list[Instruction]] = {}
    current: list[Instruction] = []
    for i in instructions:
        if i.address in leaders or not current or current[-1].target() is not None or current[-1].ends():
            current = blocks.setdefault(i.address, [])
        current.append(i)
    return blocks


def _control_flow(blocks: dict[int, list[Instruction]]) -> nx.DiGraph:
    flow = nx.DiGraph()
    flow.add_nodes_from(blocks)
    starts = sorted(blocks)
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        last = blocks[start][-1]
        if last.target() in blocks:
            flow.add_edge(start, last.target())
        if last.may_fall_through() and following is not None:
            flow.add_edge(start, following)
    return flow


def _dominates(dominators: dict[int, int | None], head: int, node: int, entry: int) -> bool:
    while node not in (head, entry):
        node = dominators[node]  # type: ignore[assignment]
    return node == head


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel. Bytes, except for the registers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


def parse_resources(log: str) -> dict[str, Resources]:
    """The kernels of ``ptxas -v``, by mangled name."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        symbol = part.split("'", 1)[0]
        registers = re.search(r"Used (\d+) registers", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers is None or frame is None:
            raise RuntimeError(f"ptxas -v says no registers for {symbol}; is this a CUDA release whose output has changed?")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        found[symbol] = Resources(int(registers[1]), stack, stores, loads, int(shared[1]) if shared else 0)
    return found


def disassembler() -> str:
    """Path of a cuobjdump: the triton wheel's, otherwise CUDA_HOME's, otherwise the one on PATH.

    Raises:
        RuntimeError: none was found.
    """
    spec = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (spec.submodule_search_locations or [] if spec else [])]
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"]) / "bin")
    for folder in folders:
        if (folder / "cuobjdump").is_file():
            return str(folder / "cuobjdump")
    on_path = shutil.which("cuobjdump")
    if on_path is None:
        raise RuntimeError(
            "no cuobjdump: install the triton wheel, or a CUDA toolkit with its binary tools on PATH or in CUDA_HOME"
        )
    return on_path


def disassemble(cubin: Path) -> dict[str, Code]:
    """The kernels of a cubin, by mangled name."""
    run = subprocess.run([disassembler(), "-sass", str(cubin)], check=True, capture_output=True, text=True)
    return parse(run.stdout)


def demangle(symbols: Iterable[str]) -> dict[str, str]:
    """Readable names without arguments, return type and our namespace; the mangled ones if there is no c++filt."""
    symbols = list(symbols)
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    run = subprocess.run([tool], input="\n".join(symbols), check=True, capture_output=True, text=True)
    return {symbol: short_name(name) for symbol, name in zip(symbols, run.stdout.splitlines(), strict=True)}


def short_name(name: str) -> str:
    """``void lora_edge::k<lora_edge::Fp32, 128>(lora_edge::P)`` is ``k<Fp32, 128>``."""
    name = re.sub(r"\b(lora_edge|\(anonymous namespace\))::", "", name.removeprefix("void ")).replace(
        "(anonymous namespace)::", ""
    )
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name
