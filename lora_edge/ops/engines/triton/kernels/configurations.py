"""The tiles of the two implicit GEMMs that the tuner tries, by the unit that multiplies; the first is taken where it may not.

Each fits sm_87: at most 163 KB of shared memory a block, no spilled register. ``benchmarks/results/orin/triton.csv`` has what
the compiler makes of each, and a test holds it.
"""

from __future__ import annotations

from lora_edge.ops.engines.triton.kernels.tuner import Configuration

# How much a tap's channels may be padded before k runs over taps and channels as one, which takes the tensor cores three to
# five times as many instructions a tile, and float32 a sixth more.
MOST_PADDED = {"ieee": 1.15, "tf32": 2.5, "half": 2.5}

MOST_REGISTERS = 255  # of a thread: without a word ptxas may spill a few for one block more an SM

GEMM = {
    "ieee": (Configuration(64, 64, 16, 8, 3), Configuration(64, 32, 16, 4, 3), Configuration(128, 32, 16, 8, 3)),
    "tf32": (Configuration(64, 64, 32, 8, 3), Configuration(128, 64, 32, 8, 3), Configuration(64, 32, 32, 4, 3)),
    "half": (Configuration(64, 64, 32, 4, 3), Configuration(128, 64, 32, 8, 3), Configuration(64, 32, 32, 4, 3)),
}


def is_flat(channels: int, depth: int, unit: str) -> bool:
    """Whether k runs over taps and channels as one, for a group's channels (forward) or outputs (backward)."""
    return -(-channels // depth) * depth > MOST_PADDED[unit] * channels
