// tt_block of depthwise convolutions (I/g = 1): there is little arithmetic, so the design reads each map once.
//
//   forward    y[o] = act(a * (sum_t w[o, t] x[c, t] + bias) + b + ra * residual + rb), c = o / m, m = O/g
//              h[c, q] = sum_t S[q, t] x[c, t]
//   backward   dz = bits * dy
//              dx[c] = sum over o of c, t: a w[o, t] dz[o] where (position + pad - t * dilation) % stride == 0
//              dB[o, q] = scale * a * sum dz[o] h[c, q]      dbias[o] = a * sum dz[o]      dresidual = ra * dz
//
// Tiles: a block of 128 threads has up to 8 octets of channels, whose kernels it keeps in shared memory, and 2 positions per
// thread. Each octet belongs to one thread: 16-byte accesses where channels are contiguous, and a whole byte of bits. Lanes run
// along the octets in channels-last maps, along the positions in others. Each thread reads the taps of its own positions; the
// L1 turns a block's reads into one read of the map.
// Backward is one launch: with tile i of dx goes the i-th of as many equal parts of dy, which is summed and masked there. So
// each dy is summed once, wherever padding and stride put dx, and the gather finds it in the L1 or L2. A thread's sums are kept
// in shared memory, which saves registers for the gather; at the end a block adds those of its threads, and sum_partials those
// of the blocks. A second output per channel (m > 1) and columns of h beyond two need another pass over the block's part of dy.
// Floor: the bytes of x, residual, y, h and bits, in backward of dy, bits, h, dx and dresidual, over the bandwidth. The
// operations, 2 N L O K, are 18 per element of 8 bytes with a 3x3 kernel in float32: below the ridge.
#include "depthwise.cuh"

#include "activation.cuh"
#include "elements.cuh"
#include "sum_partials.cuh"
#include "tt_fuse.cuh"

namespace lora_edge {
namespace {

constexpr int kThreads = 128;
constexpr int kOctet = 8;
constexpr int kMostOctets = 8;         // per block
constexpr int kForwardEach = 2;        // positions per thread
constexpr int kBackwardEach = 2;
constexpr int kSumsAtOnce = 2;         // columns of h summed per pass
constexpr int kColumns = kSumsAtOnce + 1;
constexpr int kSumPitch = kThreads + 8;  // puts the sums that a warp adds at once into different banks
constexpr int kMostParts = 512;        // blocks that share the sums of a channel
constexpr int kFewestPositions = kBackwardEach * kThreads / kMostOctets;  // per tile
constexpr int kConstants = 3;          // per output, after its taps
constexpr int kTableFloats = 8192;     // the largest table for more than one octet
constexpr int kFar = -(1 << 29);       // stands for a position that does not exist; no map reaches it

// The threads of a block: octets run fastest, then positions.
struct Lanes {
  Divider octets;     // lanes along the octets
  Divider tiles;      // tiles of octets
  int32_t positions;  // lanes along the positions

  DEVICE int position_lane() const { return octets.quotient(thread_index()); }
  DEVICE int octet_lane() const { return thread_index() - position_lane() * octets.d; }
};

// Numbers the positions of a map.
struct Grid {
  Divider w, h;
  int32_t positions;
};

struct Place {
  int sample, h, w;

  DEVICE Place(const Grid& grid, int position) {
    const int line = grid.w.quotient(position);
    sample = grid.h.quotient(line);
    h = line - sample * grid.h.d, w = position - line * grid.w.d;
  }
};

DEVICE int64_t offset_of(const Strides& s, const Place& at) { return at.sample * s.n + at.h * s.h + at.w * s.w; }

// Rows of values for the block's octets in shared memory. The halves of octets are stored apart, so that neighbouring lanes
// read neighbouring 16 bytes.
struct OctetTable {
  int32_t at, rows, lanes;

  DEVICE Shared<float> floats() const { return shared_array<float>(at, rows * lanes * kOctet); }
  DEVICE int place(int row, int channel) const {
    return ((row * 2 + channel % kOctet / 4) * lanes + channel / kOctet) * 4 + channel % 4;
  }
  DEVICE void store(int row, int channel, float v) const { floats().store(place(row, channel), v); }
  DEVICE void load(float (&to)[kOctet], int row, int octet) const {
    UNROLL
    for (int half = 0; half < 2; ++half) unpack<float>(to + half * 4, floats().load16(place(row, octet * kOctet + half * 4)));
  }
};

// Eight neighbours of `count` channels; -1 for those that do not exist (if `whole`, all exist).
template <bool whole>
struct Octet {
  int first, channel[kOctet];

  DEVICE Octet(int octet, int count) : first(octet * kOctet) {
    UNROLL
    for (int j = 0; j < kOctet; ++j) channel[j] = whole || inside(first + j < count) ? first + j : -1;
  }
  DEVICE bool exists(int j) const { return whole || channel[j] >= 0; }
};

template <class T, bool vectors>
DEVICE void load_octet(float (&to)[kOctet], const void* map, int64_t at, int64_t stride, const Octet<vectors>& octet, bool ok) {
  const T* base = static_cast<const T*>(map);
  if constexpr (vectors) {
    load_floats<T, kOctet>(to, base, at + octet.first, ok);
  } else {
    UNROLL
    for (int j = 0; j < kOctet; ++j) to[j] = to_float(load_global(base, at + octet.channel[j] * stride, ok && octet.exists(j)));
  }
}

template <class T, bool vectors>
DEVICE void store_octet(void* map, int64_t at, int64_t stride, const Octet<vectors>& octet, const float (&from)[kOctet]) {
  T* base = static_cast<T*>(map);
  if constexpr (vectors) {
    store_floats<T, kOctet>(base, at + octet.first, from);
  } else {
    UNROLL
    for (int j = 0; j < kOctet; ++j) {
      store_global(base, at + octet.channel[j] * stride, from_float<T>(from[j]), octet.exists(j));
    }
  }
}

struct Forward {
  Lanes lanes;
  Grid out;
  Divider multiplier, taps;
  int32_t outputs, groups, octets, rank;  // rank: 0 if there is no h
  int32_t in_h, in_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  OctetTable table;  // the taps, then scale, shift and the residual's scale
  int32_t suffix_at;
  const float* packed;
  const void* x;
  Strides x_strides;
  const void *bias, *affine_scale, *affine_shift, *residual, *residual_scale, *residual_shift;
  Strides residual_strides;
  void* y;
  Strides y_strides;
  void* h;
  uint8_t* bits;
  Type type, affine_type, saved_type;
  Bounds bounds;

  DEVICE Shared<float> suffix() const { return shared_array<float>(suffix_at, rank * taps.d); }
};

DEVICE float optional(const void* values, Type type, int i, float otherwise) {
  return values == nullptr ? otherwise : load_as_float(values, type, i);
}

// Stages the kernels of the block's outputs and the constants of z = sum * scale + shift + residual * residual_scale.
DEVICE void stage(const Forward& p, int first_output) {
  const int outputs = p.lanes.octets.d * kOctet, taps = p.taps.d;
  for (int i = thread_index(); i < outputs * taps; i += kThreads) {
    const int local = p.taps.quotient(i), tap = i - local * taps;
    const bool ok = inside(first_output + local < p.outputs);
    p.table.store(tap, local, load_global(p.packed, static_cast<int64_t>(first_output) * taps + i, ok));
  }
  for (int i = thread_index(); i < p.rank * taps; i += kThreads) {
    p.suffix().store(i, load_global(p.packed, static_cast<int64_t>(p.outputs) * taps + i));
  }
  for (int i = thread_index(); i < outputs; i += kThreads) {
    const int o = inside(first_output + i < p.outputs) ? first_output + i : 0;
    const float scale = optional(p.affine_scale, p.affine_type, o, 1.0f);
    p.table.store(taps, i, scale);
    p.table.store(taps + 1, i, scale * optional(p.bias, p.type, o, 0.0f) + optional(p.affine_shift, p.affine_type, o, 0.0f) +
                                   optional(p.residual_shift, p.affine_type, o, 0.0f));
    p.table.store(taps + 2, i, optional(p.residual_scale, p.affine_type, o, 1.0f));
  }
}

// Where in x the taps of a thread's output positions begin.
struct Windows {
  int64_t sample[kForwardEach];
  int h[kForwardEach], w[kForwardEach];
};

template <class T, bool vectors, class Weights>
DEVICE void convolve(float (&sum)[kForwardEach][kOctet], const Forward& p, const Windows& windows, const Octet<vectors>& octet,
                     const Weights& weights) {
  UNROLL
  for (int k = 0; k < kForwardEach; ++k) {
    UNROLL
    for (int j = 0; j < kOctet; ++j) sum[k][j] = 0.0f;
  }
  UNROLL_BY(1)
  for (int tap_h = 0; tap_h < p.kernel_h; ++tap_h) {
    UNROLL_BY(1)
    for (int tap_w = 0; tap_w < p.kernel_w; ++tap_w) {
      float weight[kOctet];
      weights(weight, tap_h * p.kernel_w + tap_w);
      UNROLL
      for (int k = 0; k < kForwardEach; ++k) {
        const int h = windows.h[k] + tap_h * p.dilation_h, w = windows.w[k] + tap_w * p.dilation_w;
        const bool ok = inside(static_cast<uint32_t>(h) < static_cast<uint32_t>(p.in_h)) &&
                        inside(static_cast<uint32_t>(w) < static_cast<uint32_t>(p.in_w));
        float x[kOctet];
        load_octet<T, vectors>(x, p.x, windows.sample[k] + h * p.x_strides.h + w * p.x_strides.w, p.x_strides.c, octet, ok);
        UNROLL
        for (int j = 0; j < kOctet; ++j) sum[k][j] += weight[j] * x[j];
      }
    }
  }
}

template <class T, bool vectors>
DEVICE void finish(const Forward& p, float (&z)[kOctet], const Octet<vectors>& octet, int position) {
  const Place at(p.out, position);
  const int lane = p.lanes.octet_lane();
  float factor[kOctet], shift[kOctet];
  p.table.load(factor, p.taps.d, lane);
  p.table.load(shift, p.taps.d + 1, lane);
  UNROLL
  for (int j = 0; j < kOctet; ++j) z[j] = z[j] * factor[j] + shift[j];
  if (p.residual != nullptr) {
    float residual[kOctet];
    load_octet<T, vectors>(residual, p.residual, offset_of(p.residual_strides, at), p.residual_strides.c, octet, true);
    p.table.load(factor, p.taps.d + 2, lane);
    UNROLL
    for (int j = 0; j < kOctet; ++j) z[j] += residual[j] * factor[j];
  }
  if (p.bounds.activation != Activation::none) {
    uint32_t bits = 0;
    UNROLL
    for (int j = 0; j < kOctet; ++j) {
      bool slope;
      z[j] = activate(p.bounds, z[j], slope);
      bits |= static_cast<uint32_t>(slope && octet.exists(j)) << j;
    }
    if (p.bits != nullptr) {
      store_global(p.bits, static_cast<int64_t>(position) * p.octets + octet.first / kOctet, static_cast<uint8_t>(bits));
    }
  }
  store_octet<T, vectors>(p.y, offset_of(p.y_strides, at), p.y_strides.c, octet, z);
}

template <class T, bool vectors>
KERNEL(kThreads, 4) void depthwise_conv(const GRID_CONSTANT Forward p) {
  const int tile = p.lanes.tiles.quotient(block_index());
  const int first_octet = (block_index() - tile * p.lanes.tiles.d) * p.lanes.octets.d;
  stage(p, first_octet * kOctet);
  sync_block();
  const Octet<vectors> outputs(first_octet + p.lanes.octet_lane(), p.outputs);
  if (!inside(outputs.first < p.outputs)) return;
  Octet<vectors> inputs = outputs;
  UNROLL
  for (int j = 0; j < kOctet; ++j) inputs.channel[j] = outputs.exists(j) ? p.multiplier.quotient(outputs.channel[j]) : -1;
  Windows windows;
  const int first = tile * kForwardEach * p.lanes.positions + p.lanes.position_lane();
  UNROLL
  for (int k = 0; k < kForwardEach; ++k) {
    const int position = first + k * p.lanes.positions;
    const Place at(p.out, position);
    windows.sample[k] = at.sample * p.x_strides.n;
    windows.h[k] = inside(position < p.out.positions) ? at.h * p.stride_h - p.pad_h : kFar;
    windows.w[k] = at.w * p.stride_w - p.pad_w;
  }
  float sum[kForwardEach][kOctet];
  convolve<T, vectors>(sum, p, windows, inputs,
                       [&](float(&weight)[kOctet], int tap) { p.table.load(weight, tap, p.lanes.octet_lane()); });
  UNROLL
  for (int k = 0; k < kForwardEach; ++k) {
    const int position = first + k * p.lanes.positions;
    if (inside(position < p.out.positions)) finish<T, vectors>(p, sum[k], outputs, position);
  }
  UNROLL_BY(1)
  for (int q = 0; q < p.rank; ++q) {
    convolve<T, vectors>(sum, p, windows, inputs, [&](float(&weight)[kOctet], int tap) {
      const float s = p.suffix().load(q * p.taps.d + tap);
      UNROLL
      for (int j = 0; j < kOctet; ++j) weight[j] = s;
    });
    UNROLL
    for (int k = 0; k < kForwardEach; ++k) {
      const int position = first + k * p.lanes.positions;
      if (!inside(position < p.out.positions)) continue;
      UNROLL
      for (int j = 0; j < kOctet; ++j) {  // all outputs of a channel have the same value; the first one writes it
        const bool writes = outputs.exists(j) && inputs.channel[j] * p.multiplier.d == outputs.channel[j];
        const int64_t cell = static_cast<int64_t>(position) * p.groups + inputs.channel[j];
        store_float(p.h, p.saved_type, cell * p.rank + q, sum[k][j], writes);
      }
    }
  }
}

struct Backward {
  Lanes lanes;
  Grid in, out;
  Divider multiplier, taps;
  int32_t parts, tiles, out_tile;          // blocks along the positions, tiles in total, positions of dy per tile
  int32_t channels, outputs, octets, rank, columns;  // octets of outputs; rank 0 if there is no dcore; columns of the sums
  int32_t kernel_h, kernel_w, pad_h, pad_w, dilation_h, dilation_w;
  Divider stride_h, stride_w;
  OctetTable table;                        // row tap * m + i: the kernels of output i of each channel
  int32_t sums_at;
  const float* packed;
  const void *dy, *h, *residual_scale;
  const uint8_t* bits;
  Strides dy_strides, dx_strides, dresidual_strides;
  void *dx, *dresidual;
  float* partial;                          // (parts, O, columns), or null
  Type type, affine_type, saved_type;

  // Each thread's sums: column i of its output j is at (i * 8 + j) * kSumPitch + thread.
  DEVICE Shared<float> sums() const { return shared_array<float>(sums_at, kColumns * kOctet * kSumPitch); }
};

DEVICE void stage(const Backward& p, int first_channel) {
  const int m = p.multiplier.d, taps = p.taps.d, first_output = first_channel * m;
  for (int i = thread_index(); i < p.lanes.octets.d * kOctet * m * taps; i += kThreads) {
    const int local = p.taps.quotient(i), tap = i - local * taps;
    const int channel = p.multiplier.quotient(local);
    const bool ok = inside(first_output + local < p.outputs);
    const float weight = load_global(p.packed, static_cast<int64_t>(first_output) * taps + i, ok);
    p.table.store(tap * m + local - channel * m, channel, weight);
  }
}

// dz for the outputs channel[j] of an octet at one position of dy.
template <class T, bool vectors>
DEVICE void load_dz(float (&dz)[kOctet], const Backward& p, int64_t at, int64_t position, const Octet<vectors>& octet,
                    bool ok) {
  load_octet<T, vectors>(dz, p.dy, at, p.dy_strides.c, octet, ok);
  if (p.bits == nullptr) return;
  const int64_t bytes = position * p.octets;
  if (vectors || p.multiplier.d == 1) {
    const uint32_t bits = load_global(p.bits, bytes + octet.first / kOctet, ok);
    UNROLL
    for (int j = 0; j < kOctet; ++j) dz[j] = bits >> j & 1 ? dz[j] : 0.0f;
  } else {
    UNROLL
    for (int j = 0; j < kOctet; ++j) {
      const uint32_t bits = load_global(p.bits, bytes + octet.channel[j] / kOctet, ok && octet.exists(j));
      dz[j] = bits >> (octet.channel[j] & 7) & 1 ? dz[j] : 0.0f;
    }
  }
}

// Computes a tile of dx: each position gathers the contributions of its taps.
template <class T, bool vectors>
DEVICE void gather(const Backward& p, int tile, const Octet<vectors>& channels) {
  const int first = tile * kBackwardEach * p.lanes.positions + p.lanes.position_lane();
  float sum[kBackwardEach][kOctet];
  int sample[kBackwardEach], in_h[kBackwardEach], in_w[kBackwardEach];
  UNROLL
  for (int k = 0; k < kBackwardEach; ++k) {
    const int position = first + k * p.lanes.positions;
    const Place at(p.in, position);
    sample[k] = at.sample, in_w[k] = at.w + p.pad_w;
    in_h[k] = inside(position < p.in.positions) ? at.h + p.pad_h : kFar;
    UNROLL
    for (int j = 0; j < kOctet; ++j) sum[k][j] = 0.0f;
  }
  const int m = p.multiplier.d;
  UNROLL_BY(1)
  for (int tap_h = 0; tap_h < p.kernel_h; ++tap_h) {
    UNROLL_BY(1)
    for (int tap_w = 0; tap_w < p.kernel_w; ++tap_w) {
      UNROLL_BY(1)
      for (int i = 0; i < m; ++i) {
        Octet<vectors> outputs = channels;
        UNROLL
        for (int j = 0; j < kOctet; ++j) outputs.channel[j] = channels.exists(j) ? channels.channel[j] * m + i : -1;
        float weight[kOctet];
        p.table.load(weight, (tap_h * p.kernel_w + tap_w) * m + i, p.lanes.octet_lane());
        UNROLL
        for (int k = 0; k < kBackwardEach; ++k) {
          const int reach_h = in_h[k] - tap_h * p.dilation_h, reach_w = in_w[k] - tap_w * p.dilation_w;
          const int h = p.stride_h.quotient(reach_h < 0 ? 0 : reach_h), w = p.stride_w.quotient(reach_w < 0 ? 0 : reach_w);
          const bool ok = inside(h * p.stride_h.d == reach_h) && inside(w * p.stride_w.d == reach_w) &&
                          inside(h < p.out.h.d) && inside(w < p.out.w.d);
          const int64_t position = (static_cast<int64_t>(sample[k]) * p.out.h.d + h) * p.out.w.d + w;
          const int64_t at = sample[k] * p.dy_strides.n + h * p.dy_strides.h + w * p.dy_strides.w;
          float dz[kOctet];
          load_dz<T, vectors>(dz, p, at, position, outputs, ok);
          UNROLL
          for (int j = 0; j < kOctet; ++j) sum[k][j] += weight[j] * dz[j];
        }
      }
    }
  }
  UNROLL
  for (int k = 0; k < kBackwardEach; ++k) {
    const int position = first + k * p.lanes.positions;
    if (!inside(position < p.in.positions)) continue;
    const Place at(p.in, position);
    store_octet<T, vectors>(p.dx, offset_of(p.dx_strides, at), p.dx_strides.c, channels, sum[k]);
  }
}

// Processes a tile of dy: adds dz * h[first ..] and dz to the thread's sums, and writes the residual's gradient if `masked`.
template <class T, bool vectors>
DEVICE void sum_tile(const Backward& p, int tile, const Octet<vectors>& outputs, int first, bool masked) {
  float sum[kColumns][kOctet] = {};
  const int begin = tile * p.out_tile;
  const int end = begin + p.out_tile < p.out.positions ? begin + p.out_tile : p.out.positions;
  for (int position = begin + p.lanes.position_lane(); position < end; position += p.lanes.positions) {
    const Place at(p.out, position);
    float dz[kOctet];
    load_dz<T, vectors>(dz, p, offset_of(p.dy_strides, at), position, outputs, true);
    UNROLL
    for (int j = 0; j < kOctet; ++j) sum[kSumsAtOnce][j] += dz[j];
    UNROLL
    for (int i = 0; i < kSumsAtOnce; ++i) {
      const int q = first + i;
      if (!inside(q < p.rank)) break;
      UNROLL
      for (int j = 0; j < kOctet; ++j) {
        const int channel = vectors ? outputs.first + j : p.multiplier.quotient(outputs.first + j);
        const int64_t cell = static_cast<int64_t>(position) * p.channels + channel;
        sum[i][j] += dz[j] * load_as_float(p.h, p.saved_type, cell * p.rank + q, outputs.exists(j));
      }
    }
    if (!masked) continue;
    UNROLL
    for (int j = 0; j < kOctet; ++j) {
      if (outputs.exists(j)) dz[j] *= optional(p.residual_scale, p.affine_type, outputs.first + j, 1.0f);
    }
    store_octet<T, vectors>(p.dresidual, offset_of(p.dresidual_strides, at), p.dresidual_strides.c, outputs, dz);
  }
  const Shared<float> sums = p.sums();
  UNROLL
  for (int i = 0; i < kColumns * kOctet; ++i) {
    const int slot = i * kSumPitch + thread_index();
    sums.store(slot, sums.load(slot) + sum[i / kOctet][i % kOctet]);
  }
}

// Adds the sums of the block's threads in the order of their positions, and writes the columns from `first` on and the bias's.
DEVICE void write_sums(const Backward& p, int part, int first_output, int first) {
  const Shared<float> sums = p.sums();
  const int octets = p.lanes.octets.d;
  for (int e = thread_index(); e < kColumns * kOctet * octets; e += kThreads) {
    const int slot = p.lanes.octets.quotient(e), lane = e - slot * octets;
    float total = 0.0f;
    for (int position = 0; position < p.lanes.positions; ++position) {
      total += sums.load(slot * kSumPitch + position * octets + lane);
    }
    const bool of_bias = slot / kOctet == kSumsAtOnce;
    const int column = of_bias ? p.rank : first + slot / kOctet;
    const int output = first_output + lane * kOctet + slot % kOctet;
    const bool wanted = of_bias ? first == 0 && p.rank < p.columns : column < p.rank;
    store_global(p.partial, (static_cast<int64_t>(part) * p.outputs + output) * p.columns + column, total,
                 wanted && inside(output < p.outputs));
  }
}

template <class T, bool vectors>
KERNEL(kThreads, 3) void depthwise_grad(const GRID_CONSTANT Backward p) {
  const int part = p.lanes.tiles.quotient(block_index());
  const int first_octet = (block_index() - part * p.lanes.tiles.d) * p.lanes.octets.d;
  const int m = p.multiplier.d;
  if (p.dx != nullptr) stage(p, first_octet * kOctet);
  sync_block();
  const Octet<vectors> channels(first_octet + p.lanes.octet_lane(), p.channels);
  for (int i = 0; i < m; ++i) {
    const int octet = first_octet * m + i * p.lanes.octets.d;
    const Octet<vectors> outputs(octet + p.lanes.octet_lane(), p.outputs);
    for (int first = 0; first == 0 || first < p.rank; first += kSumsAtOnce) {
      const bool once = first == 0;
      UNROLL
      for (int slot = 0; slot < kColumns * kOctet; ++slot) p.sums().store(slot * kSumPitch + thread_index(), 0.0f);
      for (int tile = part; tile < p.tiles; tile += p.parts) {
        if ((p.partial != nullptr || (p.dresidual != nullptr && once)) && inside(outputs.first < p.outputs)) {
          sum_tile<T, vectors>(p, tile, outputs, first, p.dresidual != nullptr && once);
        }
        if (p.dx != nullptr && i == 0 && once && inside(channels.first < p.channels)) gather<T, vectors>(p, tile, channels);
      }
      if (p.partial == nullptr) continue;
      sync_block();
      write_sums(p, part, octet * kOctet, first);
      sync_block();
    }
  }
}

bool whole_octets(const Conv& c) { return c.outputs == c.groups && c.outputs % kOctet == 0; }

bool whole_vectors(const void* map, const Strides& s, Type type) {
  const int32_t whole = 16 / bytes_of(type);
  return map == nullptr || (aligned16(map) && s.c == 1 && s.n % whole == 0 && s.h % whole == 0 && s.w % whole == 0);
}

// Octets per block: 8 or 4 if few lanes stay idle; fewer for few channels and for tables that would be large.
Lanes lanes_of(int32_t channels, bool channels_last, int32_t floats_per_octet) {
  const int32_t octets = static_cast<int32_t>(quotient_up(channels, kOctet));
  int32_t lanes = 1;
  if (channels_last) {
    while (lanes < kMostOctets && lanes < octets) lanes *= 2;
    const auto idle = [octets](int32_t n) { return up_to_multiple(octets, n) - octets; };
    if (lanes == kMostOctets && idle(lanes) * 8 > octets && idle(lanes / 2) < idle(lanes)) lanes /= 2;
    while (lanes > 1 && lanes * floats_per_octet > kTableFloats) lanes /= 2;
  }
  return Lanes{Divider(lanes), Divider(static_cast<int32_t>(quotient_up(octets, lanes))), kThreads / lanes};
}

Grid grid_of(int32_t batch, int32_t h, int32_t w) { return Grid{Divider(w), Divider(h), batch * h * w}; }

Forward forward_of(const Problem& problem, const ForwardCall& call, int32_t& shared_bytes) {
  const Conv& c = problem.conv;
  Forward p{};
  p.multiplier = Divider(c.outputs / c.groups), p.taps = Divider(c.kernel_h * c.kernel_w);
  p.lanes = lanes_of(c.outputs, call.x_strides.c == 1 && call.y_strides.c == 1, (p.taps.d + kConstants) * kOctet);
  p.out = grid_of(c.batch, c.out_h, c.out_w);
  p.outputs = c.outputs, p.groups = c.groups, p.octets = static_cast<int32_t>(quotient_up(c.outputs, kOctet));
  p.rank = call.h != nullptr ? c.rank : 0;
  p.in_h = c.in_h, p.in_w = c.in_w, p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w;
  p.stride_h = c.stride_h, p.stride_w = c.stride_w, p.pad_h = c.pad_h, p.pad_w = c.pad_w;
  p.dilation_h = c.dilation_h, p.dilation_w = c.dilation_w;
  p.packed = static_cast<const float*>(call.packed);
  p.x = call.x, p.x_strides = call.x_strides;
  p.bias = call.bias, p.affine_scale = call.affine_scale, p.affine_shift = call.affine_shift;
  p.residual = call.residual, p.residual_strides = call.residual_strides;
  p.residual_scale = call.residual_scale, p.residual_shift = call.residual_shift;
  p.y = call.y, p.y_strides = call.y_strides, p.h = call.h, p.bits = static_cast<uint8_t*>(call.bits);
  p.type = problem.type, p.affine_type = problem.affine_type, p.saved_type = problem.saved_type;
  p.bounds = Bounds{problem.activation, problem.low, problem.high};
  p.table = OctetTable{0, p.taps.d + kConstants, p.lanes.octets.d};
  p.suffix_at = p.table.rows * p.table.lanes * kOctet * 4;
  shared_bytes = p.suffix_at + p.rank * p.taps.d * 4;
  return p;
}

Backward backward_of(const Problem& problem, const BackwardCall& call, int32_t& shared_bytes) {
  const Conv& c = problem.conv;
  Backward p{};
  const int32_t m = c.outputs / c.groups;
  p.multiplier = Divider(m), p.taps = Divider(c.kernel_h * c.kernel_w);
  p.lanes = lanes_of(c.channels, call.dy_strides.c == 1, p.taps.d * m * kOctet);
  p.in = grid_of(c.batch, c.in_h, c.in_w), p.out = grid_of(c.batch, c.out_h, c.out_w);
  const int32_t tile = kBackwardEach * p.lanes.positions;
  p.tiles = static_cast<int32_t>(quotient_up(call.dx != nullptr ? p.in.positions : p.out.positions, tile));
  p.out_tile = p.tiles > 0 ? static_cast<int32_t>(quotient_up(p.out.positions, p.tiles)) : 0;
  p.channels = c.channels, p.outputs = c.outputs, p.octets = static_cast<int32_t>(quotient_up(c.outputs, kOctet));
  p.rank = call.dcore != nullptr ? c.rank : 0;
  p.columns = p.rank + (call.dbias != nullptr ? 1 : 0);
  p.parts = p.columns > 0 && p.tiles > kMostParts ? kMostParts : p.tiles;
  p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w, p.pad_h = c.pad_h, p.pad_w = c.pad_w;
  p.dilation_h = c.dilation_h, p.dilation_w = c.dilation_w;
  p.stride_h = Divider(c.stride_h), p.stride_w = Divider(c.stride_w);
  p.packed = static_cast<const float*>(call.packed);
  p.dy = call.dy, p.dy_strides = call.dy_strides, p.h = call.h, p.bits = static_cast<const uint8_t*>(call.bits);
  p.residual_scale = call.residual_scale;
  p.dx = call.dx, p.dx_strides = call.dx_strides, p.dresidual = call.dresidual, p.dresidual_strides = call.dresidual_strides;
  p.partial = p.columns > 0 ? static_cast<float*>(call.partial) : nullptr;
  p.type = problem.type, p.affine_type = problem.affine_type, p.saved_type = problem.saved_type;
  p.table = OctetTable{0, p.taps.d * m, p.lanes.octets.d};
  p.sums_at = p.table.rows * p.table.lanes * kOctet * 4;
  shared_bytes = p.sums_at + kColumns * kOctet * kSumPitch * 4;
  return p;
}

}  // namespace

const char* depthwise_forward(const Problem& problem, const ForwardCall& call, Stream stream) {
  const Conv& c = problem.conv;
  Fuse fuse = fuse_of(call, Packing::plain, call.packed, Type::f32);
  fuse.suffix_rows = call.h != nullptr;
  const char* error = fuse_forward(problem, fuse, stream);
  if (error != nullptr) return error;
  int32_t shared_bytes;
  const Forward p = forward_of(problem, call, shared_bytes);
  const int64_t blocks = quotient_up(p.out.positions, kForwardEach * p.lanes.positions) * p.lanes.tiles.d;
  const bool vectors = whole_octets(c) && whole_vectors(call.x, call.x_strides, problem.type) &&
                       whole_vectors(call.y, call.y_strides, problem.type) &&
                       whole_vectors(call.residual, call.residual_strides, problem.type);
  return with_type(problem.type, [&](auto type) {
    using T = decltype(type);
    return launch(vectors ? depthwise_conv<T, true> : depthwise_conv<T, false>, blocks, kThreads, shared_bytes, stream, p);
  });
}

const char* depthwise_backward(const Problem& problem, const BackwardCall& call, Stream stream) {
  const Conv& c = problem.conv;
  const bool sums = (call.dcore != nullptr && c.rank > 0) || call.dbias != nullptr;
  if (call.dx == nullptr && call.dresidual == nullptr && !sums) return nullptr;
  if (call.dx != nullptr) {
    Fuse fuse = fuse_of(call, Packing::plain, call.packed, Type::f32);
    fuse.row_scale = call.affine_scale, fuse.row_scale_type = problem.affine_type;
    const char* error = fuse_forward(problem, fuse, stream);
    if (error != nullptr) return error;
  }
  int32_t shared_bytes;
  const Backward p = backward_of(problem, call, shared_bytes);
  const bool vectors = whole_octets(c) && whole_vectors(call.dy, call.dy_strides, problem.type) &&
                       whole_vectors(call.dx, call.dx_strides, problem.type) &&
                       whole_vectors(call.dresidual, call.dresidual_strides, problem.type);
  const int64_t blocks = int64_t{p.parts} * p.lanes.tiles.d;
  const char* error = with_type(problem.type, [&](auto type) {
    using T = decltype(type);
    return launch(vectors ? depthwise_grad<T, true> : depthwise_grad<T, false>, blocks, kThreads, shared_bytes, stream, p);
  });
  if (error != nullptr) return error;
  return sum_partials(p.partial, p.parts, c.outputs, p.rank, call.dcore, problem.core_type, problem.scale, call.dbias,
                      problem.type, call.affine_scale, problem.affine_type, stream);
}

int64_t depthwise_partial_bytes(const Problem& problem) {
  const Conv& c = problem.conv;
  const int64_t in = int64_t{c.in_h} * c.in_w, out = int64_t{c.out_h} * c.out_w;
  const int64_t tiles = quotient_up(c.batch * (in > out ? in : out), kFewestPositions);
  return (tiles < kMostParts ? tiles : kMostParts) * c.outputs * (c.rank + 1) * 4;
}

int64_t depthwise_shared_bytes(const Problem& problem) {
  ForwardCall forward{};
  forward.x_strides.c = forward.y_strides.c = 1;
  char any;
  forward.h = &any;
  BackwardCall backward{};
  backward.dy_strides.c = 1;
  int32_t of_forward, of_backward;
  forward_of(problem, forward, of_forward);
  backward_of(problem, backward, of_backward);
  return of_forward > of_backward ? of_forward : of_backward;
}

}  // namespace lora_edge
