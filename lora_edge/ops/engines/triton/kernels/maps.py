"""Tiles of a map in memory: rows are positions, columns are channels, and either may be adjacent in memory."""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(-(1 << 29))  # the coordinate of positions that do not exist: no tap reaches a map from there


@triton.jit
def load_tile(at, ok, CHANNELS_LAST: tl.constexpr):
    """The tile at addresses ``at (rows, columns)``, zero where not ``ok``.

    By default Triton lets the lanes of a warp run along a tile's last axis, so a tile whose positions are adjacent in memory is
    read transposed.
    """
    if CHANNELS_LAST:
        return tl.load(at, mask=ok, other=0.0)
    else:
        return tl.trans(tl.load(tl.trans(at), mask=tl.trans(ok), other=0.0))


@triton.jit
def store_tile(at, value, ok, CHANNELS_LAST: tl.constexpr):
    """Store a tile; the counterpart of :func:`load_tile`."""
    if CHANNELS_LAST:
        tl.store(at, value, mask=ok)
    else:
        tl.store(tl.trans(at), tl.trans(value), mask=tl.trans(ok))


@triton.jit
def position_of(row, height, width):
    """Sample, line and column of a row; positions are counted along the width first."""
    line = row // width
    sample = line // height
    return sample, line - sample * height, row - line * width


@triton.jit
def masked(dy, bits, octet_at, channel, ok):
    """``dy`` where the bit of its channel is set, else zero; ``octet_at`` is the byte of a position's first channel."""
    byte = tl.load(bits + (octet_at + channel // 8), mask=ok, other=0).to(tl.int32)
    return tl.where((byte >> (channel % 8)) & 1 != 0, dy, 0.0).to(dy.dtype)


@triton.jit
def masked_rows(dy, bits, octet_at, first_octet, octets, ok_row, CHANNELS: tl.constexpr, WORDS: tl.constexpr):
    """:func:`masked` for up to 32 adjacent channels that begin at a whole octet: one word per row, read once.

    WORDS says that a row's octets are whole words and are read as such. Reading bytes costs more than the loads: Triton then
    infers an operand type that is too narrow.
    """
    at = bits + (octet_at + first_octet)
    if WORDS:
        word = tl.load(at.to(tl.pointer_type(tl.int32)), mask=ok_row & (first_octet < octets), other=0)
    else:
        word = tl.zeros(octet_at.shape, tl.int32)
        for i in tl.static_range(CHANNELS // 8):
            byte = tl.load(at + i, mask=ok_row & (first_octet + i < octets), other=0)
            word |= byte.to(tl.int32) << (8 * i)
    return tl.where((word[:, None] >> tl.arange(0, CHANNELS)[None, :]) & 1 != 0, dy, 0.0).to(dy.dtype)


@triton.jit
def next_tile(block, tap_column, tap_row, blocks, width):
    """The next tile of k: the next block of channels, else the next tap of the line, else the first of the next line."""
    block += 1
    done = block == blocks
    block = tl.where(done, 0, block)
    tap_column = tl.where(done, tap_column + 1, tap_column)
    last = tap_column == width
    return block, tl.where(last, 0, tap_column), tl.where(last, tap_row + 1, tap_row)
