// Shared by the launchers of both directions: counts tiles, and chooses how memory is accessed and which kernel runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tt_conv.cuh"

namespace lora_edge {

// Whether 16-byte accesses along the channels stay aligned at every position.
inline bool in_vectors(const void* data, const Strides& s, Type type) {
  const int64_t whole = 16 / bytes_of(type);
  return s.c == 1 && s.n % whole == 0 && s.h % whole == 0 && s.w % whole == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline bool whole_octets(int32_t channels) { return channels % 8 == 0; }

inline Access source_access(const Gemm& g, Type type, bool masks) {
  if (g.channels.d % (16 / bytes_of(type)) == 0 && in_vectors(g.source, g.strides, type)) return Access::vector;
  if (masks && !whole_octets(g.channels.d)) return Access::channels;  // a tap may begin within a byte of bits
  return g.strides.c == 1 ? Access::channels : Access::positions;
}

// Sets the fields common to all phases. A remainder of at most one fragment's columns joins the last tile.
inline void set_tiles(Gemm& g, int32_t batch, int32_t groups, int32_t channels, int32_t columns) {
  const int32_t rest = columns % kColumns;
  g.extra = columns > kColumns && rest > 0 && rest <= kExtra;
  g.batch = batch, g.columns = columns;
  g.channels = Divider(channels), g.groups = Divider(groups);
  g.tiles_n = Divider(g.extra ? columns / kColumns : (columns + kColumns - 1) / kColumns);
}

inline int64_t row_tiles(const Gemm& g, int32_t phase) {
  const int32_t h = phase / g.phases_w.d, w = phase % g.phases_w.d;
  return (static_cast<int64_t>(g.batch) * g.h[h].rows.d * g.w[w].rows.d + kRows - 1) / kRows;
}

// Assumptions for the order of blocks: halves that run at the same time on Orin Nano, two on each of 8 SMs, and the bytes that
// stay in its L2 while others stream through.
constexpr int64_t kTogether = 16, kStaying = 1 << 20;

// Sets the order of the blocks, after the phases are set, and returns the number of blocks. The order depends on the bytes of
// the source and of `packed`: with `rows` row tiles together, their part of the source is read once if it stays in the L2,
// otherwise by each wave as often as it sweeps over it; `packed` is read once per set. The fewest bytes win.
inline int64_t set_blocks(Gemm& g, int64_t source_bytes, int64_t packed_bytes, double sweeps, int64_t halves = 1) {
  const int64_t together = kTogether / halves;
  int64_t most = 0;
  for (int32_t i = 0; i < g.phases.d; ++i) most = std::max(most, row_tiles(g, g.run[i]));
  const int64_t blocks = most * g.phases.d * g.groups.d * g.tiles_n.d;
  double fewest = 0;
  g.tiles_m = static_cast<int32_t>(most);
  for (int64_t rows = 1; rows == 1 || rows < 2 * std::min(most, together); rows *= 2) {
    const double sets = static_cast<double>(quotient_up(most, rows)), source = static_cast<double>(source_bytes);
    const double part = source / sets, waves = static_cast<double>(quotient_up(blocks, together));
    const double bytes = (part <= kStaying ? source : waves * part * std::max(1.0, sweeps)) +
                         static_cast<double>(packed_bytes) * (packed_bytes <= kStaying ? 1.0 : sets);
    if (rows == 1 || bytes < fewest) fewest = bytes, g.rows_together = static_cast<int32_t>(rows);
  }
  return blocks;
}

template <class Unit, class Launch>
const char* with_access(Access access, const Launch& launch) {
  if (access == Access::vector) return launch.template operator()<Unit, Access::vector>();
  if (access == Access::channels) return launch.template operator()<Unit, Access::channels>();
  return launch.template operator()<Unit, Access::positions>();
}

template <class Launch>
const char* with_kernel(const Problem& problem, Access access, const Launch& launch) {
  if (problem.type == Type::f16) return with_access<F16>(access, launch);
  if (problem.type == Type::bf16) return with_access<Bf16>(access, launch);
  return problem.precision == Precision::tf32 ? with_access<Tf32>(access, launch) : with_access<Fp32>(access, launch);
}

}  // namespace lora_edge
