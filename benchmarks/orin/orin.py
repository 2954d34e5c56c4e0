"""The figures of an Orin Nano 8 GB, and the predicted time of a launch on it.

The predicted time is the largest of five terms: a throughput bound without latencies, launch overhead and throttling. The
compute terms are those of the busiest SM, whose last wave may not fill it.
"""

from __future__ import annotations

from dataclasses import dataclass

SMS = 8
SCHEDULERS = 4  # per SM; each issues one instruction of its own warps per cycle
WARPS = 48
BLOCKS = 16
REGISTERS = 65536
REGISTER_UNIT = 256  # registers are allocated to warps in units of this
SHARED_BYTES = 164 * 1024
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # bytes per block, for the system
SHARED_MOST = 163 * 1024  # bytes per block
MULTIPLY_ADDS = {"fp32": 128, "tf32": 512, "half": 1024}  # per SM and cycle: 1.28, 5.1, 10.2 TFLOP/s at 625 MHz
# Bytes per SM and cycle. No figure is published for Orin. A100's 5,120 bytes per cycle for 108 SMs are 47; the 2 MB here would
# be four of its slices of 512 KB with 64 bytes per cycle each, which are 32.
L2_BYTES = 47.4
L2_BYTES_LOW = 32.0
L2_CAPACITY, L2_WAYS, SECTOR = 2 << 20, 16, 32


@dataclass(frozen=True)
class Mode:
    """A power mode: clock in hertz, DRAM bandwidth in bytes per second."""

    name: str
    clock: float
    bandwidth: float

    def peak(self, unit: str) -> float:
        """Multiply-adds per second."""
        return SMS * MULTIPLY_ADDS[unit] * self.clock


MODES = (Mode("625 MHz", 625e6, 68e9), Mode("1020 MHz", 1020e6, 102e9))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def blocks_per_sm(threads: int, registers: int, shared_bytes: int) -> int:
    """Resident blocks per SM, as CUDA's occupancy calculator counts them; 0 if a block does not fit.

    Args:
        threads: per block.
        registers: per thread.
        shared_bytes: per block, static and dynamic.
    """
    warps = -(-threads // 32)
    registers_per_warp = _up(32 * registers, REGISTER_UNIT)
    fitting_warps = REGISTERS // SCHEDULERS // registers_per_warp * SCHEDULERS
    if registers_per_warp * _up(warps, SCHEDULERS) > REGISTERS or shared_bytes > SHARED_MOST:
        return 0
    by_shared = SHARED_BYTES // _up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)
    return min(BLOCKS, WARPS // warps, fitting_warps // warps, by_shared)


@dataclass(frozen=True)
class Launch:
    """What one launch executes. Counts are sums over the grid, padding included."""

    blocks: int
    warps: int  # per block
    resident: int  # blocks per SM
    unit: str  # of the multiply-adds: a key of MULTIPLY_ADDS
    dram_bytes: float
    l2_bytes: float  # as if there were no L1
    l2_bytes_with_l1: float  # if every access of a block to a sector after its first hit the L1
    multiply_adds: float
    instructions: float  # of whole warps
    wavefronts: float  # of shared memory, conflicts included

    def uneven(self) -> float:
        """Time of the busiest SM over the time with all SMs and schedulers evenly loaded."""
        busiest = -(-self.blocks // SMS)
        waves, rest = divmod(busiest, self.resident)
        alone = SCHEDULERS / self.warps  # blocks that keep every scheduler busy
        time = waves * max(self.resident, alone) + (max(rest, alone) if rest else 0)
        return time * SMS / self.blocks

    def terms(self, mode: Mode, l2_bytes_per_cycle: float = L2_BYTES) -> dict[str, float]:
        """Seconds by limiting term."""
        cycles = SMS * mode.clock
        return {
            "dram": self.dram_bytes / mode.bandwidth,
            "l2": self.l2_bytes / (l2_bytes_per_cycle * cycles),
            "multiply-adds": self.uneven() * self.multiply_adds / (MULTIPLY_ADDS[self.unit] * cycles),
            "instructions": self.uneven() * self.instructions / (SCHEDULERS * cycles),
            "shared": self.uneven() * self.wavefronts / cycles,
        }

    def seconds(self, mode: Mode, l2_bytes_per_cycle: float = L2_BYTES) -> tuple[float, str]:
        """The predicted time and the term that limits it."""
        terms = self.terms(mode, l2_bytes_per_cycle)
        bound = max(terms, key=lambda name: terms[name])
        return terms[bound], bound
