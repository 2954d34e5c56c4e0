"""The tiles that the tuner tries for the two implicit GEMMs, by the unit that multiplies; without tuning the first is used.

Each fits sm_87: at most 163 KB of shared memory per block, no spilled register. ``benchmarks/results/orin/triton.csv`` lists
what the compiler makes of each, and a test checks it.
"""

from __future__ import annotations

from lora_edge.ops.engines.triton.kernels.tuner import Configuration

# How much a tap's channels may be padded before k runs over taps and channels as one, which needs three to five times as many
# instructions per tile on tensor cores, and a sixth more in float32.
MOST_PADDED = {"ieee": 1.15, "tf32": 2.5, "half": 2.5}

MOST_REGISTERS = 255  # per thread: without this limit ptxas may spill a few to fit one more block per SM

GEMM = {
    "ieee": (Configuration(64, 64, 16, 8, 3), Configuration(64, 32, 16, 4, 3), Configuration(128, 32, 16, 8, 3)),
    "tf32": (Configuration(64, 64, 32, 8, 3), Configuration(128, 64, 32, 8, 3), Configuration(64, 32, 32, 4, 3)),
    "half": (Configuration(64, 64, 32, 4, 3), Configuration(128, 64, 32, 8, 3), Configuration(64, 32, 32, 4, 3)),
}


def is_flat(channels: int, depth: int, unit: str) -> bool:
    """Whether k runs over taps and channels (forward) or taps and outputs (backward) of a group as one."""
    return -(-channels // depth) * depth > MOST_PADDED[unit] * channels
