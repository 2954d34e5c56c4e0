"""The simulated L2 cache (``l2.cpp``, compiled when first needed)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.orin import orin

SOURCE = Path(__file__).with_name("l2.cpp")
BUILD = Path(__file__).parents[2] / "build" / "orin"
TURN = 64  # sectors that a block touches before it is the next one's turn: part of a k tile


@dataclass(frozen=True)
class Touches:
    """The sectors that a block touches, in order: 32-byte addresses, whether each is written, and its tensor."""

    sectors: NDArray[np.int64]
    written: NDArray[np.bool_]
    tensor: NDArray[np.int32]


NOTHING = Touches(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.int32))


@functools.cache
def _library() -> ctypes.CDLL:
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = BUILD / f"l2-{name}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{id(path)}")
        subprocess.run(["g++", "-O2", "-std=c++17", "-shared", "-fPIC", str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.rename(path)
    return ctypes.CDLL(str(path))


def dram_sectors(
    patterns: Sequence[Touches], pattern_of: NDArray[np.int32], shift: NDArray[np.int64], resident: int
) -> tuple[int, int]:
    """Sectors read from and written to DRAM by a launch that starts with an empty cache.

    Args:
        patterns: what the traced blocks touched.
        pattern_of: for each block of the grid, the traced block that represents it.
        shift: ``(blocks, tensors)`` sectors by which each tensor is moved for each block.
        resident: blocks that run at once, on all SMs.
    """
    first = np.concatenate([[0], np.cumsum([len(p.sectors) for p in patterns])]).astype(np.int64)
    sectors = np.concatenate([p.sectors * 2 + p.written for p in patterns]).astype(np.int64)
    tensor = np.concatenate([p.tensor for p in patterns]).astype(np.int32)
    pattern_of, shift = np.ascontiguousarray(pattern_of, np.int32), np.ascontiguousarray(shift, np.int64)
    read, written = ctypes.c_int64(), ctypes.c_int64()

    def pointer(array: NDArray) -> ctypes.c_void_p:  # type: ignore[type-arg]
        return array.ctypes.data_as(ctypes.c_void_p)

    _library().l2_traffic(
        ctypes.c_int64(orin.L2_CAPACITY), orin.L2_WAYS, ctypes.c_int64(resident), ctypes.c_int64(TURN),
        ctypes.c_int64(len(pattern_of)), pointer(sectors), pointer(tensor), pointer(first), pointer(pattern_of), pointer(shift),
        shift.shape[1], ctypes.byref(read), ctypes.byref(written),
    )  # fmt: skip
    return read.value, written.value
