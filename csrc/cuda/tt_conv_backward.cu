// tt_block backward: with dz = dy where the bit is set, else 0,
//   dresidual = ra * dz                          dx = conv^T(dz, a * W')
//   dcore[o, q] = s a[o] sum of dz[o] h[q]       dbias[o] = a[o] sum of dz[o]
// in one pass over dy. tt_conv is the same without bits and residual.
//
// Tiles: the implicit GEMM of tt_conv_gemm.cuh, rows = input positions, columns = the group's I/g inputs, k over (tap, output).
// A strided dx falls into phases (packing.h), each a GEMM over the taps that reach it. The bits mask dy as it is staged;
// the packed kernel already includes the affine.
// One tap, the star, reads every dy position in exactly one row: the first column tile sums dz h^T over the star's k tiles
// while they are in shared memory, and writes dresidual there. If padding hides dy positions from the rows of dx, rows are
// added. Sums have two stages, per row tile and then over the tiles in order: deterministic, no atomics.
// Floor: max(2 N L O (I/g) K + 2 N L O r1 operations / peak, bytes of dy, bits, h, W', dx and dresidual / bandwidth).
#include "tt_conv_backward.cuh"

#include <algorithm>

#include "sum_partials.cuh"
#include "tt_conv.cuh"
#include "tt_conv_launch.h"

namespace lora_edge {
namespace {

struct Backward {
  Gemm gemm;
  const uint8_t* bits;
  int32_t octets;
  void* dx;
  Strides dx_strides;
  int32_t dx_h, dx_w;
  void* dresidual;
  Strides dresidual_strides;
  const void* residual_scale;
  const void* h;
  float* partial;  // (row tiles of the star's phase, O, sums)
  int32_t rank, sums, sums_pitch;  // sums: r1, plus one for dbias
  int32_t star_phase, star_tap;
  Type affine_type, saved_type;
  bool bits_words, dx_vector, dresidual_vector, along_positions;  // bits_words: the bits of 32 channels are an aligned word
};

// Stored after the stages, for each row: its position in dy for a tap at (0, 0); its offset in dx; and, for the dy position
// that the star reads, the offset in dresidual and h.
struct Tables {
  DEVICE static Shared<int32_t> positions() { return shared_array<int32_t>(Stages::bytes(1), kRows); }
  DEVICE static Shared<uint32_t> residual() { return shared_array<uint32_t>(Stages::bytes(1) + kRows * 4, kRows); }
  DEVICE static Shared<uint32_t> dx() { return shared_array<uint32_t>(Stages::bytes(1) + kRows * 8, kRows); }
  DEVICE static Shared<float> h(const Backward& p) {
    return shared_array<float>(Stages::bytes(1) + kRows * 12, kRows * p.sums_pitch);
  }
  static int bytes(const Backward& p) { return Stages::bytes(1) + kRows * 12 + kRows * p.sums_pitch * 4; }
};

constexpr uint32_t kNowhere = 0xffffffffu;

DEVICE bool at_star(const Backward& p, const Tile& tile) { return tile.first && tile.phase == p.star_phase; }

// The offset of a row's first channel in dx, or kNowhere: there may be more rows than dx has.
DEVICE uint32_t dx_offset(const Backward& p, const Tile& tile, const Place& place, int row) {
  const int h = place.h * p.gemm.target_h + tile.phase_h, w = place.w * p.gemm.target_w + tile.phase_w;
  const bool ok = inside(row < tile.rows) && inside(static_cast<uint32_t>(h) < static_cast<uint32_t>(p.dx_h)) &&
                  inside(static_cast<uint32_t>(w) < static_cast<uint32_t>(p.dx_w));
  return ok ? offset_of(p.dx_strides, place.sample, tile.group * p.gemm.columns + tile.column, h, w) : kNowhere;
}

// Writes this thread's row of the tables. The column after h is 1, so that dbias is summed like dcore.
DEVICE void write_tables(const Backward& p, const Tile& tile) {
  const Gemm& g = p.gemm;
  const int thread = thread_index(), row = tile.row + thread;
  const Place place(g, tile, row);
  write_row(g, tile, place, row);
  int h = place.h + g.h[tile.phase_h].origin, w = place.w + g.w[tile.phase_w].origin;
  Tables::positions().store(thread, (place.sample * g.source_h + h) * g.source_w + w);
  Tables::dx().store(thread, dx_offset(p, tile, place, row));
  if (!at_star(p, tile)) return;
  const Step star(g, tile, p.star_tap * g.channels.d, g.k_end[tile.phase]);
  const bool ok = in_source(Stages::places(tile).load(thread), star);  // written by this thread, so no barrier
  h += star.h, w += star.w;
  const uint32_t first = offset_of(p.dresidual_strides, place.sample, tile.group * g.channels.d, h, w);
  Tables::residual().store(thread, ok ? first : kNowhere);
  if (p.partial == nullptr) return;
  const int64_t position = (place.sample * g.source_h + h) * g.source_w + w;
  const int64_t from = (position * g.groups.d + tile.group) * p.rank;
  for (int q = 0; q < p.sums; ++q) {
    const float value = load_as_float(p.h, p.saved_type, from + q, ok && inside(q < p.rank));
    Tables::h(p).store(thread * p.sums_pitch + q, ok && q == p.rank ? 1.0f : value);
  }
}

// The bits that mask dy as it is staged.
struct Mask {
  const Backward& p;
  const Tile& tile;

  DEVICE bool any() const { return p.bits != nullptr; }
  DEVICE bool words() const { return p.bits_words; }
  DEVICE uint32_t bits(int row, int h, int w, int channel) const {
    const int64_t position = Tables::positions().load(row) + h * p.gemm.source_w + w;
    const int64_t at = (position * p.gemm.groups.d + tile.group) * p.octets + channel / 8;
    if (p.bits_words) return load_global(reinterpret_cast<const uint32_t*>(p.bits), at / 4) >> channel % 32;
    return static_cast<uint32_t>(load_global(p.bits, at)) >> channel % 8;
  }
};

// Whether a k tile contains channels of the star.
template <class Element>
DEVICE bool has_star(const Backward& p, int k) {
  const int first = p.star_tap * p.gemm.channels.d;
  return k + kWords * kPack<Element> > first && k < first + p.gemm.channels.d;
}

// Writes the masked dy of the star's channels in this k tile to dresidual; lanes run along channels or positions, whichever is
// contiguous.
template <class Element>
DEVICE void write_residual(const Backward& p, const Tile& tile, int buffer, int k) {
  const int channels = p.gemm.channels.d, thread = thread_index();
  const Shared<uint32_t> a = Stages::a(tile, buffer);
  const bool along_channels = p.dresidual_strides.c == 1;
  Element* dresidual = static_cast<Element*>(p.dresidual);
  for (int i = 0; i < kChunks; ++i) {
    const int row = along_channels ? thread / kChunks + i * (kRows / kChunks) : thread;
    const int chunk = along_channels ? thread % kChunks : i;
    const uint32_t to = Tables::residual().load(row);
    if (to == kNowhere) continue;
    const Word4 words = a.load16(row * kPitch + chunk * 4);
    const int channel = k + chunk * kWhole<Element> - p.star_tap * channels;
    if (p.dresidual_vector) {
      store_global16(dresidual, to + channel, words, inside(channel >= 0) && inside(channel < channels));
      continue;
    }
    float v[kWhole<Element>];
    unpack<Element>(v, words);
    UNROLL
    for (int e = 0; e < kWhole<Element>; ++e) {
      if (!(inside(channel + e >= 0) && inside(channel + e < channels))) continue;
      const int output = tile.group * channels + channel + e;
      if (p.residual_scale != nullptr) v[e] *= load_as_float(p.residual_scale, p.affine_type, output);
      store_global(dresidual, to + offset_of(p.dresidual_strides, 0, channel + e, 0, 0), from_float<Element>(v[e]));
    }
  }
}

// The first stage of dcore and dbias, for the outputs whose star is in this k tile, `count` sums each. A warp processes 8 words
// of k; its lanes are 8 words x 4 row groups, with rows 2 apart so that the 32 lanes use 32 banks. Shuffles add the groups.
template <class Element, int count>
DEVICE void sum_core(const Backward& p, const Tile& tile, int buffer, int k, int first_sum) {
  const Gemm& g = p.gemm;
  const Shared<uint32_t> a = Stages::a(tile, buffer);
  const Shared<float> h = Tables::h(p);
  const int lane = lane_index(), word = warp_index() * 8 + lane % 8, rows = lane / 8;
  float sums[kPack<Element>][count] = {};
  UNROLL_BY(4)
  for (int i = 0; i < kRows / 4; ++i) {
    const int r = rows * 2 + i % 2 + i / 2 * 8;
    float dz[kWhole<Element>];
    unpack<Element>(dz, Word4{a.load(r * kPitch + word), 0, 0, 0});
    UNROLL
    for (int n = 0; n < count; ++n) {
      const float value = h.load(r * p.sums_pitch + first_sum + n);
      UNROLL
      for (int e = 0; e < kPack<Element>; ++e) sums[e][n] += dz[e] * value;
    }
  }
  const int64_t outputs = g.channels.d * g.groups.d;
  float* partial = p.partial + tile.row / kRows * outputs * p.sums;
  UNROLL
  for (int e = 0; e < kPack<Element>; ++e) {
    const int output = k + word * kPack<Element> + e - p.star_tap * g.channels.d;
    UNROLL
    for (int n = 0; n < count; ++n) {
      float sum = sums[e][n] + shuffle_xor(sums[e][n], 8);
      sum += shuffle_xor(sum, 16);
      if (!inside(rows == 0)) continue;
      const int64_t to = static_cast<int64_t>(tile.group * g.channels.d + output) * p.sums + first_sum + n;
      store_global(partial, to, sum, inside(output >= 0) && inside(output < g.channels.d));
    }
  }
}

template <class Element>
DEVICE void sum_core(const Backward& p, const Tile& tile, int buffer, int k) {
  int sum = 0;
  for (; sum + 4 <= p.sums; sum += 4) sum_core<Element, 4>(p, tile, buffer, k, sum);
  if (p.sums - sum >= 2) sum_core<Element, 2>(p, tile, buffer, k, sum), sum += 2;
  if (p.sums - sum == 1) sum_core<Element, 1>(p, tile, buffer, k, sum);
}

template <class Element>
DEVICE void write_octet(const Backward& p, const Tile& tile, int row, int octet) {
  const uint32_t first = Tables::dx().load(row);
  const int left = p.gemm.columns - tile.column - octet * 8;
  if (first == kNowhere || !inside(left > 0)) return;
  float v[8];
  load_finished(v, tile, row, octet);
  const uint32_t at = first + offset_of(p.dx_strides, 0, octet * 8, 0, 0);
  store_octet(static_cast<Element*>(p.dx), at, p.dx_strides.c, v, left, p.dx_vector);
}

template <class Unit, Access access>
KERNEL(kRows, 2) void tt_block_backward_kernel(const GRID_CONSTANT Backward p) {
  using Element = typename Unit::Element;
  const Gemm& g = p.gemm;
  const Tile tile(g);
  if (!inside(tile.row < tile.rows)) return;
  const bool wants_dx = p.dx != nullptr;
  write_tables(p, tile);
  sync_block();
  Sums<Unit> sums;
  sums.clear();
  constexpr int step = kWords * kPack<Element>;
  const int star = p.star_tap * g.channels.d;  // without dx, only the star's k tiles are visited
  const int k_first = wants_dx ? 0 : star / step * step, k_end = wants_dx ? g.k_end[tile.phase] : star + g.channels.d;
  run_tiles<Unit, access, 1>(g, tile, sums, wants_dx, k_first, k_end, Mask{p, tile}, [&](int buffer, int k) {
    if (!at_star(p, tile) || !has_star<Element>(p, k)) return;
    if (p.dresidual != nullptr) write_residual<Element>(p, tile, buffer, k);
    if (p.partial != nullptr) sum_core<Element>(p, tile, buffer, k);
  });
  if (!wants_dx) return;
  sync_block();  // all reads of the stages are done
  sums.store(tile);
  sync_block();
  for_each_octet(tile, p.along_positions, [&](int row, int octet) { write_octet<Element>(p, tile, row, octet); });
}

struct Launch {
  const Backward& p;
  int64_t blocks;
  Stream stream;

  template <class Unit, Access access>
  const char* operator()() const {
    return launch(tt_block_backward_kernel<Unit, access>, blocks, kRows, Tables::bytes(p), stream, p);
  }
};

// The star of one axis: the tap that needs the fewest additional rows to read every dy position, its place, and the rows u in
// [low, low + rows) of its phase.
struct Star {
  int32_t tap, phase, index, low, rows;
};

int32_t positions_of(int32_t in, int32_t phase, int32_t stride) { return std::max(0, (in - phase + stride - 1) / stride); }

Star star_of(int32_t in, int32_t out, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, bool alone) {
  Star best{};
  int32_t fewest = INT32_MAX;
  for (int32_t tap = 0; tap < kernel; ++tap) {
    const int32_t phase = phase_of(tap, dilation, pad, stride);
    const Taps taps = taps_of(phase, kernel, dilation, pad, stride);
    const int32_t index = (tap - taps.first) / taps.step, shift = taps.origin - index * taps.advance;
    const int32_t low = alone ? -shift : std::min(0, -shift);
    const int32_t high = alone ? out - shift : std::max(positions_of(in, phase, stride), out - shift);
    const int32_t added = high - low - positions_of(in, phase, stride);
    if (added < fewest) fewest = added, best = Star{tap, phase, index, low, high - low};
  }
  return best;
}

// One phase of one axis; the star's phase may have more rows than dx.
Axis axis_of(const Taps& taps, int32_t phase, int32_t in, int32_t stride, const Star* star) {
  const bool at_star = star != nullptr && star->phase == phase;
  return Axis{at_star ? star->low : 0, taps.origin, taps.advance,
              Divider(at_star ? star->rows : std::max(1, positions_of(in, phase, stride))), Divider(std::max(1, taps.count))};
}

struct Stars {
  Star h, w;

  Stars(const Conv& c, bool alone)
      : h(star_of(c.in_h, c.out_h, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h, alone)),
        w(star_of(c.in_w, c.out_w, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w, alone)) {}

  int64_t row_tiles(const Conv& c) const { return (static_cast<int64_t>(c.batch) * h.rows * w.rows + kRows - 1) / kRows; }
};

}  // namespace

int64_t conv_partial_bytes(const Problem& problem) {
  const Conv& c = problem.conv;
  const int64_t tiles = std::max(Stars(c, false).row_tiles(c), Stars(c, true).row_tiles(c));
  return tiles * c.outputs * (c.rank + 1) * 4;
}

const char* conv_backward(const Problem& problem, const BackwardCall& call, Stream stream) {
  const Conv& c = problem.conv;
  const bool wants_sums = call.dcore != nullptr || call.dbias != nullptr;
  const Stars star(c, call.dx == nullptr);
  const bool needs_star = wants_sums || call.dresidual != nullptr;
  if (call.dx == nullptr && !needs_star) return nullptr;
  const PackedLayout layout = packed_layout(c, Packing::backward, bytes_of(problem.type));
  Backward p{};
  Gemm& g = p.gemm;
  g.source = call.dy, g.packed = call.packed, g.strides = call.dy_strides;
  g.source_h = c.out_h, g.source_w = c.out_w;
  g.step_h = g.step_w = 1, g.target_h = c.stride_h, g.target_w = c.stride_w;
  g.own = c.channels / c.groups, g.shared_row = 0;
  g.pitch = layout.pitch;
  g.phases_w = Divider(c.stride_w);
  set_tiles(g, c.batch, c.groups, c.outputs / c.groups, g.own);
  for (int32_t h = 0; h < c.stride_h; ++h)
    g.h[h] = axis_of(layout.taps_h[h], h, c.in_h, c.stride_h, needs_star ? &star.h : nullptr);
  for (int32_t w = 0; w < c.stride_w; ++w)
    g.w[w] = axis_of(layout.taps_w[w], w, c.in_w, c.stride_w, needs_star ? &star.w : nullptr);

  p.star_phase = star.h.phase * c.stride_w + star.w.phase;
  p.star_tap = star.h.index * layout.taps_w[star.w.phase].count + star.w.index;
  if (call.dx == nullptr) g.extra = 0, g.tiles_n = Divider(1);
  int32_t runs = 0;
  for (int32_t phase = 0; phase < c.stride_h * c.stride_w; ++phase) {
    const int32_t h = phase / c.stride_w, w = phase % c.stride_w;
    g.base[phase] = layout.base[phase];
    g.k_end[phase] = layout.taps_h[h].count * layout.taps_w[w].count * g.channels.d;
    const bool reached = positions_of(c.in_h, h, c.stride_h) > 0 && positions_of(c.in_w, w, c.stride_w) > 0;
    if ((call.dx != nullptr && reached) || (needs_star && phase == p.star_phase)) g.run[runs++] = phase;
  }
  g.phases = Divider(runs);
  const int64_t source = int64_t{c.batch} * c.outputs * c.out_h * c.out_w, packed = int64_t{layout.rows} * layout.pitch;
  const double sweeps = static_cast<double>(c.kernel_h * c.kernel_w) / (c.stride_h * c.stride_w);
  const int64_t blocks = set_blocks(g, source * bytes_of(problem.type), packed * bytes_of(problem.type), sweeps);

  p.bits = static_cast<const uint8_t*>(call.bits), p.octets = (g.channels.d + 7) / 8;
  p.dx = call.dx, p.dx_strides = call.dx_strides, p.dx_h = c.in_h, p.dx_w = c.in_w;
  p.dresidual = call.dresidual, p.dresidual_strides = call.dresidual_strides, p.residual_scale = call.residual_scale;
  p.h = call.h, p.rank = call.dcore != nullptr ? c.rank : 0;
  p.sums = p.rank + (call.dbias != nullptr ? 1 : 0);
  p.sums_pitch = p.sums | 1;  // odd, so that rows fall into different banks
  p.partial = wants_sums ? static_cast<float*>(call.partial) : nullptr;
  p.affine_type = problem.affine_type, p.saved_type = problem.saved_type;
  p.dx_vector = whole_octets(g.own) && in_vectors(call.dx, call.dx_strides, problem.type);
  p.bits_words = g.channels.d % 32 == 0 && reinterpret_cast<uintptr_t>(call.bits) % 4 == 0;
  p.dresidual_vector = call.residual_scale == nullptr && g.channels.d % (16 / bytes_of(problem.type)) == 0 &&
                       in_vectors(call.dresidual, call.dresidual_strides, problem.type);
  p.along_positions = call.dx_strides.c != 1;
  const char* error = with_kernel(problem, source_access(g, problem.type, call.bits != nullptr), Launch{p, blocks, stream});
  if (error != nullptr || !wants_sums) return error;
  const int32_t tiles = static_cast<int32_t>(row_tiles(g, p.star_phase));
  return sum_partials(p.partial, tiles, c.outputs, p.rank, call.dcore, problem.core_type, problem.scale, call.dbias,
                      problem.type, call.affine_scale, problem.affine_type, stream);
}

}  // namespace lora_edge
