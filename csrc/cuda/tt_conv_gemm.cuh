// The implicit GEMM of both directions of tt_conv and tt_block: rows are positions, columns are channels, k runs over (tap,
// channel of the group).
//
//   C[row, column] = sum_k A[row, k] * B[column, k]
//   A   the source map (x forward, dy backward), gathered at the row's position and the tap's offset, zero outside
//   B   the composed kernel `packed` (packing.h); in forward its last r1 columns are the suffix and give h
//
// Tiles: a block of 128 threads computes 128 rows x 64 columns; a remainder of up to 8 columns (the r1 rows of S) joins the
// last tile as one extra n8 fragment. A wide block is two such halves of 128 threads each that stage the same A together; each
// half has its own 64 columns and their B. A k tile is 128 bytes of k: 32 elements of 4 bytes or 64 of 2.
//
//   tt_conv_gemm.cuh    this file: the sizes, the phases, and which tile a block computes
//   tt_conv_stage.cuh   stages a k tile of A and B in shared memory
//   tt_conv_sums.cuh    the products of a k tile, by FP32 multiply-adds or tensor cores
//   tt_conv.cuh         the loop over k tiles, and the output of the finished tile
#pragma once

#include "../packing.h"
#include "../problem.h"
#include "elements.cuh"
#include "gpu.cuh"

namespace lora_edge {

constexpr int kRows = 128;    // rows of a tile, and threads of a half
constexpr int kColumns = 64;  // columns of a half, without the extra fragment
constexpr int kExtra = 8;     // columns of the extra fragment
constexpr int kWords = 32;    // 4-byte words of k per k tile

template <class Element>
constexpr int kPack = 4 / static_cast<int>(sizeof(Element));  // elements per word

// One phase along one axis: rows u = low .. low + rows - 1, source position u * step + origin - j * advance for tap index j.
struct Axis {
  int32_t low, origin, advance;
  Divider rows, taps;
};

struct Gemm {
  const void *source, *packed;
  Strides strides;              // of the source
  int32_t source_h, source_w;
  int32_t step_h, step_w;       // source positions from row to row: the stride forward, 1 backward
  int32_t target_h, target_w;   // target positions from row to row: 1 forward, the stride backward
  int32_t batch, columns, own, shared_row, pitch;  // columns of a group: the first `own` are the group's rows of `packed`,
                                                   // the others, the suffix, are at shared_row for all groups
  Divider channels;             // source channels of a group: k = tap * channels + channel
  Divider groups, tiles_n, phases_w;
  Divider phases;               // that are run
  int32_t tiles_m;              // row tiles of the phase with the most
  int32_t rows_together;        // row tiles that neighbouring blocks compute for the same columns
  int32_t extra;
  int32_t run[kMostPhases];     // the phases that are run
  int32_t base[kMostPhases];    // first column of `packed` of each phase
  int32_t k_end[kMostPhases];   // taps * channels of each phase
  Axis h[kMostStride], w[kMostStride];
};

// Which tile of which phase a block computes. Blocks that run at the same time should share their reads in the L2: the order is
// by sets of row tiles, within a set by column tile, group and phase, and within these by row tile.
// Tiles of a phase with fewer rows than another may be empty.
struct Tile {
  int phase, phase_h, phase_w, group, column, row, rows;  // first column of the half, first row, number of rows of the phase
  bool first, extra;                                      // the first column tile; this half has the extra fragment
  int halves, half, thread;                               // halves of the block; this thread's half and its index in it

  DEVICE explicit Tile(const Gemm& g, int halves = 1) : halves(halves) {
    const int block = block_index(), across = g.tiles_n.d * g.groups.d * g.phases.d;
    const int set = block / (g.rows_together * across), first_row = set * g.rows_together;
    const int rows_here = g.tiles_m - first_row < g.rows_together ? g.tiles_m - first_row : g.rows_together;
    const int rest_of_set = block - first_row * across, place = rest_of_set / rows_here;
    const int tile_m = first_row + rest_of_set - place * rows_here;
    const int rest = g.tiles_n.quotient(place), tile_n = place - rest * g.tiles_n.d;
    const int nth_phase = g.groups.quotient(rest);
    group = rest - nth_phase * g.groups.d;
    phase = g.run[nth_phase];
    phase_h = g.phases_w.quotient(phase);
    phase_w = phase - phase_h * g.phases_w.d;
    half = halves == 1 ? 0 : thread_index() / kRows;
    thread = thread_index() - half * kRows;
    column = (tile_n * halves + half) * kColumns;
    row = tile_m * kRows;
    rows = g.batch * g.h[phase_h].rows.d * g.w[phase_w].rows.d;
    first = tile_n == 0;
    extra = g.extra != 0 && tile_n == g.tiles_n.d - 1 && half == halves - 1;
  }
};

// A row's sample and its position u among the rows of the phase.
struct Place {
  int sample, h, w;

  DEVICE Place(const Gemm& g, const Tile& tile, int row) {
    const Axis &axis_h = g.h[tile.phase_h], &axis_w = g.w[tile.phase_w];
    const int line = axis_w.rows.quotient(row);
    sample = axis_h.rows.quotient(line);
    h = line - sample * axis_h.rows.d + axis_h.low;
    w = row - line * axis_w.rows.d + axis_w.low;
  }
};

}  // namespace lora_edge
