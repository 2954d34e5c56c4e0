"""Compiles Triton's kernels ahead of time, for an architecture that need not be present: what a launch would have compiled.

    with recorded() as found:
        tt_block.forward(plan, ...)  # on tensors without memory
    resources(compile_variant(found[0], 87))

Every configuration that the tuner could try is recorded. A variant is one compilation of Triton's: a kernel, its types, its
constants, and which arguments are 1 or multiples of 16.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.orin import sass
from lora_edge.ops.engines.triton.kernels.tuner import Tuned

WARP = 32
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Variant:
    """One compilation: arguments by position as types, constants and alignments."""

    module: str
    name: str
    configuration: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def warps(self) -> int:
        return dict(self.options).get("num_warps", 4)

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant. Bytes, except for the registers."""

    registers: int
    stack: int
    local: int
    shared: int
    code: sass.Code | None


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """Record kernels instead of launching them, with each of their configurations."""
    found: list[Variant] = []
    current = [""]

    def every(self: Tuned, kind: Any, launch: Any) -> None:
        for configuration in self.configurations:
            current[0] = configuration.name
            launch(configuration)
            current[0] = ""

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_variant(self, current[0], args, options))

    with mock.patch.object(Tuned, "run", every), mock.patch.object(JITFunction, "run", note):
        yield found


def _variant(kernel: JITFunction[Any], configuration: str, args: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, Tensor):
            signature.append((parameter.name, POINTERS[value.dtype]))
        else:
            signature.append((parameter.name, "fp32" if isinstance(value, float) else "i32"))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and specialized):
            aligned.append(parameter.name)
    return Variant(
        kernel.fn.__module__,
        kernel.fn.__name__,
        configuration,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(launch.items()),
    )


def compile_variant(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel for an architecture such as 87.

    Raises:
        Exception: whatever the compiler says.
    """
    names = [name for name, _ in variant.signature]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constants = {(names.index(name),): value for name, value in variant.constants}
    kernel = getattr(importlib.import_module(variant.module), variant.name)
    source = ASTSource(kernel, dict(variant.signature), constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=dict(variant.options))


def resources(compiled: Any, with_code: bool = False) -> Compiled:
    """Registers, spills and shared memory as cuobjdump reads them from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [sass.disassembler(), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        code = next(iter(sass.disassemble(cubin).values())) if with_code else None
    return Compiled(numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.metadata.shared, code)


def is_spilled(found: Compiled) -> bool:
    """Whether registers were spilled to memory; Triton's kernels have no local arrays."""
    return found.stack > 0 or found.local > 0
