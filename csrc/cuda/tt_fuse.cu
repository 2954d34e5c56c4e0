// tt_fuse: W' = W + scale * core * suffix, and dcore = scale * dW' * suffix^T. Arithmetic is float32, with one cast at the end.
//
//   weight (O, C), C = I/g * Kh * Kw      core (O, r1)      suffix (r1, C), or frozen cores that are contracted on the way:
//   tail[a, kh, kw] = sum_b G3[a, kh, b] G4[b, kw]          suffix[q, i, k] = sum_a G2[q, i, a] tail[a, k]
//
// Tiles: a block of 128 threads contracts the suffix for its columns once, in shared memory, and runs over its rows; the
// weights of the first rows are loaded meanwhile. A thread has 16 bytes of 4 rows in flight if rows are aligned, otherwise
// single elements.
//   plain      up to 128 accesses along a row x 4 to 16 rows per row of threads; directly from registers to memory
//   packed     4,096 elements, which go through shared memory so that the packed layout is also written in runs: of channels in
//              the forward layout, of outputs in the backward layout
//   gradient   up to 512 columns x 8 to 32 rows, two rows per warp, 16 columns of each per lane
// Floor: 2 * bytes(W) / bandwidth; for the gradient bytes(dW') / bandwidth. r1 multiply-adds per element are far below any
// ridge for r1 up to 16.
#include "tt_fuse.cuh"

#include "elements.cuh"
#include "sum_partials.cuh"

namespace lora_edge {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsEach = 4;           // rows in flight per thread
constexpr int kSuffixFloats = 8192;    // most floats of the suffix per block, except for single channels of huge kernels
constexpr int kFactorFloats = 4096;    // most factors per block
constexpr int kPackedFloats = 4096;    // elements per packed tile
constexpr int kLaneColumns = 16;       // gradient: columns of a row in flight per lane
constexpr int kPairsAtOnce = 2 * kThreads / 32;
constexpr int kPlentyOfBlocks = 64;    // with fewer blocks, tiles have their smallest height

// How rows and columns are divided among the blocks.
struct Tiling {
  Divider across;          // column tiles
  int32_t columns, width;  // columns of the matrix, of a tile
  int32_t rows, height;
};

struct Tile {
  int index, column, width, row, height;  // index along the columns

  DEVICE explicit Tile(const Tiling& t) {
    const int down = t.across.quotient(block_index());
    index = block_index() - down * t.across.d;
    column = index * t.width, row = down * t.height;
    width = t.columns - column < t.width ? t.columns - column : t.width;
    height = t.rows - row < t.height ? t.rows - row : t.height;
  }
};

struct Suffix {
  const void *whole, *core2, *core3, *core4;
  Type type;
  int32_t rank, cores, channels, kernel_h, bond2, bond3;
  int32_t pitch;    // floats from row to row in shared memory, where the suffix comes first
  int32_t tail_at;  // bytes
  Divider taps, kernel_w;

  DEVICE Shared<float> tile() const { return shared_array<float>(0, rank * pitch); }
};

// Contracts the cores after G2 to tail (r2, Kh * Kw).
DEVICE void contract_tail(const Suffix& s, Shared<float> tail) {
  for (int i = thread_index(); i < s.bond2 * s.taps.d; i += kThreads) {
    if (s.cores == 2) {
      tail.store(i, load_as_float(s.core3, s.type, i));
      continue;
    }
    const int a = s.taps.quotient(i), tap = i - a * s.taps.d;
    const int h = s.kernel_w.quotient(tap), w = tap - h * s.kernel_w.d;
    float sum = 0.0f;
    for (int b = 0; b < s.bond3; ++b) {
      sum += load_as_float(s.core3, s.type, (a * s.kernel_h + h) * s.bond3 + b) *
             load_as_float(s.core4, s.type, b * s.kernel_w.d + w);
    }
    tail.store(i, sum);
  }
}

// Stages the suffix for a tile's columns. Its readers need a barrier after it.
DEVICE void stage_suffix(const Suffix& s, const Tile& tile) {
  const Shared<float> to = s.tile();
  if (s.whole != nullptr) {
    const int64_t columns = static_cast<int64_t>(s.channels) * s.taps.d;
    for (int c = thread_index(); c < tile.width; c += kThreads) {
      for (int q = 0; q < s.rank; ++q) to.store(q * s.pitch + c, load_as_float(s.whole, s.type, q * columns + tile.column + c));
    }
    return;
  }
  const Shared<float> tail = shared_array<float>(s.tail_at, s.bond2 * s.taps.d);
  contract_tail(s, tail);
  sync_block();
  for (int c = thread_index(); c < tile.width; c += kThreads) {
    const int channel = s.taps.quotient(tile.column + c), tap = tile.column + c - channel * s.taps.d;
    for (int q = 0; q < s.rank; ++q) {
      const int64_t row = (static_cast<int64_t>(q) * s.channels + channel) * s.bond2;
      float sum = 0.0f;
      for (int a = 0; a < s.bond2; ++a) sum += load_as_float(s.core2, s.type, row + a) * tail.load(a * s.taps.d + tap);
      to.store(q * s.pitch + c, sum);
    }
  }
}

struct Composition {
  Tiling tiling;
  Suffix suffix;
  const void *weight, *core, *row_scale;
  Type core_type, row_scale_type;
  float scale;
  int32_t outputs;                // rows below it are W', the others the suffix
  Divider lanes;                  // threads along a row
  int32_t row_lanes;              // rows that the block's threads cover at once
  int32_t factor_rows, factors_at;
  Divider factors;                // r1 + 1

  DEVICE Shared<float> factor_table() const { return shared_array<float>(factors_at, factor_rows * factors.d); }
};

// Stages for each row the factors of the suffix's rows, then that of the weight. A row of the suffix is W' of a unit core.
DEVICE void stage_factors(const Composition& p, const Tile& tile) {
  const Shared<float> table = p.factor_table();
  const int rank = p.suffix.rank;
  for (int i = thread_index(); i < p.factor_rows * p.factors.d; i += kThreads) {
    const int r = p.factors.quotient(i), q = i - r * p.factors.d, row = tile.row + r;
    const bool own = inside(row < p.outputs);
    float factor = 1.0f;
    if (own && p.row_scale != nullptr) factor = load_as_float(p.row_scale, p.row_scale_type, row);
    if (q < rank) {
      const float core = own ? load_as_float(p.core, p.core_type, static_cast<int64_t>(row) * rank + q) : 0.0f;
      factor = own ? factor * p.scale * core : q == row - p.outputs ? 1.0f : 0.0f;
    }
    table.store(i, factor);
  }
}

// Calls write(row in the tile, column in the tile, float (&)[vector]) for every element of the tile.
template <class W, int vector, class Write>
DEVICE void compose(const Composition& p, const Tile& tile, const Write& write) {
  const W* weight = static_cast<const W*>(p.weight);
  const Shared<float> suffix = p.suffix.tile(), table = p.factor_table();
  const int row_lane = p.lanes.quotient(thread_index());
  const int first_column = (thread_index() - row_lane * p.lanes.d) * vector;
  const bool mine = inside(row_lane < p.row_lanes) && inside(first_column < tile.width);
  int column = first_column, first = row_lane;
  float value[kRowsEach][vector];
  const auto load_rows = [&]() {
    UNROLL
    for (int k = 0; k < kRowsEach; ++k) {
      const int r = first + k * p.row_lanes;
      const bool ok = mine && r < tile.height && inside(tile.row + r < p.outputs);  // the next tile's rows would only cost time
      const int64_t row = static_cast<int64_t>(tile.row + r) * p.tiling.columns;
      load_floats<W, vector>(value[k], weight, row + tile.column + column, ok);
    }
  };
  load_rows();
  stage_factors(p, tile);
  stage_suffix(p.suffix, tile);
  sync_block();
  if (!mine) return;
  while (true) {
    const int at = first * p.factors.d, step = p.row_lanes * p.factors.d;
    UNROLL
    for (int k = 0; k < kRowsEach; ++k) {
      const float factor = table.load(at + k * step + p.suffix.rank);
      UNROLL
      for (int j = 0; j < vector; ++j) value[k][j] *= factor;
    }
    UNROLL_BY(1)
    for (int q = 0; q < p.suffix.rank; ++q) {
      float s[vector];
      load_floats<vector>(s, suffix, q * p.suffix.pitch + column);
      UNROLL
      for (int k = 0; k < kRowsEach; ++k) {
        const float factor = table.load(at + k * step + q);
        UNROLL
        for (int j = 0; j < vector; ++j) value[k][j] += factor * s[j];
      }
    }
    UNROLL
    for (int k = 0; k < kRowsEach; ++k) {
      const int r = first + k * p.row_lanes;
      if (inside(r < tile.height)) write(r, column, value[k]);
    }
    first += p.row_lanes * kRowsEach;
    if (first >= tile.height) first = row_lane, column += p.lanes.d * vector;
    if (column >= tile.width) return;
    load_rows();
  }
}

struct Plain {
  Composition composition;
  void* out;
};

template <class W, class Out, int vector>
KERNEL(kThreads, 4) void fuse_plain(const GRID_CONSTANT Plain p) {
  const Tile tile(p.composition.tiling);
  Out* out = static_cast<Out*>(p.out);
  compose<W, vector>(p.composition, tile, [&](int r, int column, const float(&value)[vector]) {
    const int64_t row = tile.row + r;
    store_floats<Out, vector>(out, row * p.composition.tiling.columns + tile.column + column, value);
  });
}

struct Packed {
  Composition composition;
  PackedLayout layout;
  void* out;
  bool backward, rounded, vectors_in, vectors_out;
  Divider outputs;    // per group
  Divider runs;       // accesses along a run of the tile: its channels in forward, its rows in backward
  int32_t dilation_h, dilation_w, pad_h, pad_w;
  int32_t tile_pitch, tile_floats, tile_at, columns_at;

  DEVICE Shared<float> tile() const { return shared_array<float>(tile_at, tile_floats); }
  // For each tap the packed column of its first channel (output), and the number of zeros after its last one.
  DEVICE Shared<int32_t> columns() const { return shared_array<int32_t>(columns_at, 2 * composition.suffix.taps.d); }
  // Skewed so that neither runs along a row, with a step of any number of taps, nor runs along a column have bank conflicts.
  DEVICE int at(int r, int c) const { return r * tile_pitch + r / 32 * 4 + c + c / 32; }
};

DEVICE void stage_columns(const Packed& p) {
  const Suffix& s = p.composition.suffix;
  const PackedLayout& layout = p.layout;
  const Shared<int32_t> to = p.columns();
  for (int tap = thread_index(); tap < s.taps.d; tap += kThreads) {
    int column = tap * s.channels, zeros = tap == s.taps.d - 1 ? layout.pitch - s.taps.d * s.channels : 0;
    if (p.backward) {
      const int tap_h = s.kernel_w.quotient(tap), tap_w = tap - tap_h * s.kernel_w.d;
      const int h = phase_of(tap_h, p.dilation_h, p.pad_h, layout.phases_h);
      const int w = phase_of(tap_w, p.dilation_w, p.pad_w, layout.phases_w);
      const Taps &along_h = layout.taps_h[h], &along_w = layout.taps_w[w];
      const int index = (tap_h - along_h.first) / along_h.step * along_w.count + (tap_w - along_w.first) / along_w.step;
      const int phase = h * layout.phases_w + w, count = along_h.count * along_w.count;
      const int end = phase + 1 < layout.phases_h * layout.phases_w ? layout.base[phase + 1] : layout.pitch;
      column = layout.base[phase] + index * p.outputs.d;
      zeros = index == count - 1 ? end - layout.base[phase] - count * p.outputs.d : 0;
    }
    to.store(2 * tap, column);
    to.store(2 * tap + 1, zeros);
  }
}

template <class Out, int vector>
DEVICE void write_run(const Packed& p, int64_t row, int tap, int in_run, bool last, float (&value)[vector]) {
  Out* out = static_cast<Out*>(p.out);
  const Shared<int32_t> columns = p.columns();
  const int64_t to = row * p.layout.pitch + columns.load(2 * tap) + in_run;
  if (p.rounded) {
    UNROLL
    for (int j = 0; j < vector; ++j) value[j] = float_of(round_tf32(value[j]));
  }
  store_floats<Out, vector>(out, to, value);
  if (!last || vector > 1) return;  // whole vectors need no padding
  const int zeros = columns.load(2 * tap + 1);
  for (int i = 1; i <= zeros; ++i) store_global(out, to + i, from_float<Out>(0.0f));
}

// Writes runs along the channels of one row and tap.
template <class Out, int vector>
DEVICE void write_forward(const Packed& p, const Tile& tile) {
  const Shared<float> from = p.tile();
  const Divider& taps = p.composition.suffix.taps;
  const int channels = taps.quotient(tile.width), first = taps.quotient(tile.column);
  for (int e = thread_index(); e < tile.height * taps.d * p.runs.d; e += kThreads) {
    const int rest = p.runs.quotient(e), channel = (e - rest * p.runs.d) * vector;
    const int r = taps.quotient(rest), tap = rest - r * taps.d;
    if (!inside(channel < channels)) continue;
    float value[vector];
    UNROLL
    for (int j = 0; j < vector; ++j) value[j] = from.load(p.at(r, (channel + j) * taps.d + tap));
    const int at = first + channel;
    write_run<Out, vector>(p, tile.row + r, tap, at, at == p.composition.suffix.channels - 1, value);
  }
}

// Writes runs along the outputs of one input channel and tap.
template <class Out, int vector>
DEVICE void write_backward(const Packed& p, const Tile& tile) {
  const Shared<float> from = p.tile();
  const Divider& taps = p.composition.suffix.taps;
  for (int e = thread_index(); e < tile.width * p.runs.d; e += kThreads) {
    const int c = p.runs.quotient(e), r = (e - c * p.runs.d) * vector;
    if (!inside(r < tile.height)) continue;
    float value[vector];
    UNROLL
    for (int j = 0; j < vector; ++j) value[j] = from.load(p.at(r + j, c));
    const int channel = taps.quotient(tile.column + c), tap = tile.column + c - channel * taps.d;
    const int group = p.outputs.quotient(tile.row + r), output = tile.row + r - group * p.outputs.d;
    const int64_t row = static_cast<int64_t>(group) * p.composition.suffix.channels + channel;
    write_run<Out, vector>(p, row, tap, output, output == p.outputs.d - 1, value);
  }
}

template <class W, int vector>
DEVICE void compose_tile(const Packed& p, const Tile& tile) {
  const Shared<float> to = p.tile();
  compose<W, vector>(p.composition, tile, [&](int r, int column, const float(&value)[vector]) {
    UNROLL
    for (int j = 0; j < vector; ++j) to.store(p.at(r, column + j), value[j]);
  });
}

template <class W, class Out>
KERNEL(kThreads, 4) void fuse_packed(const GRID_CONSTANT Packed p) {
  const Tile tile(p.composition.tiling);
  stage_columns(p);
  p.vectors_in ? compose_tile<W, kWhole<W>>(p, tile) : compose_tile<W, 1>(p, tile);
  sync_block();
  if (p.backward) {
    p.vectors_out ? write_backward<Out, kWhole<Out>>(p, tile) : write_backward<Out, 1>(p, tile);
  } else {
    p.vectors_out ? write_forward<Out, kWhole<Out>>(p, tile) : write_forward<Out, 1>(p, tile);
  }
}

struct CoreGrad {
  Tiling tiling;
  Suffix suffix;
  const void* dout;
  void* dcore;
  float* partial;  // (column tiles, O, r1), or null if one tile has all columns
  Type core_type;
  float scale;
};

template <class W, int vector>
KERNEL(kThreads, 4) void fuse_core_grad(const GRID_CONSTANT CoreGrad p) {
  constexpr int chunks = kLaneColumns / vector;
  const Tile tile(p.tiling);
  const W* dout = static_cast<const W*>(p.dout);
  const Shared<float> suffix = p.suffix.tile();
  const int rank = p.suffix.rank;
  float value[2][chunks][vector];
  const auto load_rows = [&](int first) {
    UNROLL
    for (int k = 0; k < 2; ++k) {
      const bool row_ok = inside(first + k < tile.height);
      const int64_t at = static_cast<int64_t>(tile.row + first + k) * p.tiling.columns + tile.column;
      UNROLL
      for (int i = 0; i < chunks; ++i) {
        const int column = (i * 32 + lane_index()) * vector;
        load_floats<W, vector>(value[k][i], dout, at + column, row_ok && inside(column < tile.width));
      }
    }
  };
  load_rows(2 * warp_index());
  stage_suffix(p.suffix, tile);
  sync_block();
  for (int first = 2 * warp_index(); first < tile.height; first += kPairsAtOnce) {
    if (first != 2 * warp_index()) load_rows(first);
    UNROLL_BY(1)
    for (int q = 0; q < rank; ++q) {
      float sum[2] = {0.0f, 0.0f};
      UNROLL
      for (int i = 0; i < chunks; ++i) {
        const int column = (i * 32 + lane_index()) * vector;
        if (!inside(column < tile.width)) continue;
        float s[vector];
        load_floats<vector>(s, suffix, q * p.suffix.pitch + column);
        UNROLL
        for (int j = 0; j < vector; ++j) {
          sum[0] += value[0][i][j] * s[j];
          sum[1] += value[1][i][j] * s[j];
        }
      }
      UNROLL
      for (int mask = 16; mask > 0; mask /= 2) {
        sum[0] += shuffle_xor(sum[0], mask);
        sum[1] += shuffle_xor(sum[1], mask);
      }
      if (!inside(lane_index() < 2)) continue;
      const bool ok = inside(first + lane_index() < tile.height);
      const int64_t at = static_cast<int64_t>(tile.row + first + lane_index()) * rank + q;
      const float total = lane_index() == 0 ? sum[0] : sum[1];
      if (p.partial == nullptr) {
        store_float(p.dcore, p.core_type, at, p.scale * total, ok);
      } else {
        store_global(p.partial, static_cast<int64_t>(tile.index) * p.tiling.rows * rank + at, total, ok);
      }
    }
  }
}

int32_t columns_of(const Conv& c) { return c.channels / c.groups * c.kernel_h * c.kernel_w; }

template <class Call>
Suffix suffix_of(const Problem& problem, const Call& call, int32_t rank) {
  const Conv& c = problem.conv;
  Suffix s{};
  if (problem.cores == 0) {
    s.whole = call.suffix;
  } else {
    s.core2 = call.core2, s.core3 = call.core3, s.core4 = call.core4;
  }
  s.type = problem.suffix_type, s.rank = rank, s.cores = problem.cores;
  s.channels = c.channels / c.groups, s.kernel_h = c.kernel_h;
  s.bond2 = rank > 0 ? problem.bond2 : 0, s.bond3 = problem.bond3;
  s.taps = Divider(c.kernel_h * c.kernel_w), s.kernel_w = Divider(c.kernel_w);
  return s;
}

// Sets a tile's width: all columns in as few equal tiles as `most` and the room for the suffix allow.
void set_width(Tiling& tiling, int32_t columns, int32_t most, int32_t rank, int32_t unit) {
  const int32_t room = kSuffixFloats / (rank > 0 ? rank : 1) / unit * unit;
  if (room < most) most = room > unit ? room : unit;
  const int32_t tiles = static_cast<int32_t>(quotient_up(columns, most));
  tiling.columns = columns;
  tiling.width = up_to_multiple(static_cast<int32_t>(quotient_up(columns, tiles)), unit);
  tiling.across = Divider(static_cast<int32_t>(quotient_up(columns, tiling.width)));
}

// Sets a tile's height: `unit` rows, or up to four times that if enough blocks remain.
void set_height(Tiling& tiling, int32_t rows, int32_t unit, int32_t most) {
  tiling.rows = rows, tiling.height = unit;
  while (tiling.height < 4 * unit && tiling.height + unit <= most &&
         quotient_up(rows, tiling.height + unit) * tiling.across.d >= kPlentyOfBlocks) {
    tiling.height += unit;
  }
}

int64_t blocks_of(const Tiling& tiling) { return quotient_up(tiling.rows, tiling.height) * tiling.across.d; }

// Allocates shared memory in order, in bytes: first the suffix, then each request.
struct SharedBytes {
  int32_t bytes = 0;
  int32_t take(int64_t words) {
    const int32_t at = bytes;
    bytes += up_to_multiple(static_cast<int32_t>(words), 4) * 4;
    return at;
  }
  void take_suffix(Suffix& s, const Tiling& tiling) {
    s.pitch = up_to_multiple(tiling.width, 4);
    take(int64_t{s.rank} * s.pitch);
    s.tail_at = take(s.whole == nullptr ? int64_t{s.bond2} * s.taps.d : 0);
  }
};

void set_lanes(Composition& p, int32_t vector) {
  const int32_t lanes = static_cast<int32_t>(quotient_up(p.tiling.width, vector));
  p.lanes = Divider(lanes < kThreads ? lanes : kThreads);
  p.row_lanes = kThreads / p.lanes.d;
}

Composition composition_of(const Problem& problem, const Fuse& fuse, int32_t rank) {
  Composition p{};
  p.suffix = suffix_of(problem, fuse, rank);
  p.weight = fuse.weight, p.core = fuse.core, p.row_scale = fuse.row_scale;
  p.core_type = problem.core_type, p.row_scale_type = fuse.row_scale_type;
  p.scale = problem.scale, p.outputs = problem.conv.outputs, p.factors = Divider(rank + 1);
  return p;
}

void take_composition(Composition& p, SharedBytes& shared) {
  shared.take_suffix(p.suffix, p.tiling);
  p.factor_rows = up_to_multiple(p.tiling.height, p.row_lanes * kRowsEach);
  p.factors_at = shared.take(int64_t{p.factor_rows} * p.factors.d);
}

template <class W, class Out, int vector>
const char* launch_plain(const Problem& problem, const Fuse& fuse, int32_t rank, Stream stream) {
  Plain p{composition_of(problem, fuse, rank), fuse.out};
  Composition& composition = p.composition;
  set_width(composition.tiling, columns_of(problem.conv), kThreads * vector, rank, vector);
  set_lanes(composition, vector);
  const int32_t most_row_lanes = kFactorFloats / (rank + 1) / kRowsEach;
  if (composition.row_lanes > most_row_lanes) composition.row_lanes = most_row_lanes;
  const int32_t rows = problem.conv.outputs + (fuse.suffix_rows ? rank : 0);
  set_height(composition.tiling, rows, composition.row_lanes * kRowsEach, kFactorFloats / (rank + 1));
  SharedBytes shared;
  take_composition(composition, shared);
  return launch(fuse_plain<W, Out, vector>, blocks_of(composition.tiling), kThreads, shared.bytes, stream, p);
}

int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

// Sets the size of a packed tile: in the forward layout whole channels, enough for a run of 128 bytes or a row of 512 columns;
// in the backward layout enough rows for a run of 128 bytes.
void set_packed_tile(Tiling& tiling, const Conv& c, bool backward, int32_t rank, int32_t run) {
  const int32_t taps = c.kernel_h * c.kernel_w, channels = c.channels / c.groups, columns = channels * taps;
  tiling.rows = c.outputs;
  if (backward) {
    set_width(tiling, columns, kPackedFloats / run, rank, 8);
    tiling.height = run;
    return;
  }
  const int32_t unit = 8, room = most(least(kPackedFloats, kSuffixFloats / most(rank, 1)) / taps, 1);
  const int32_t wanted = least(up_to_multiple(most(run, 512 / taps), unit), room < unit ? room : room / unit * unit);
  const int32_t tiles = static_cast<int32_t>(quotient_up(channels, wanted));
  const int32_t equal = static_cast<int32_t>(quotient_up(channels, tiles));
  const int32_t each = least(up_to_multiple(equal, unit), wanted);
  tiling.columns = columns;
  tiling.width = least(each, channels) * taps;
  tiling.across = Divider(static_cast<int32_t>(quotient_up(columns, tiling.width)));
  tiling.height = most(kPackedFloats / tiling.width, 1);
}

Packed packed_of(const Problem& problem, const Fuse& fuse, int32_t rank, SharedBytes& shared) {
  const Conv& c = problem.conv;
  const int32_t out_whole = fuse.out_type == Type::f32 ? 4 : 8, in_whole = problem.weight_type == Type::f32 ? 4 : 8;
  Packed p{};
  p.backward = fuse.packing == Packing::backward;
  p.composition = composition_of(problem, fuse, rank);
  p.layout = packed_layout(c, fuse.packing, 16 / out_whole);
  p.out = fuse.out, p.rounded = fuse.round_tf32;
  Tiling& tiling = p.composition.tiling;
  set_packed_tile(tiling, c, p.backward, rank, 8 * out_whole);
  if (!p.backward && fuse.suffix_rows) tiling.rows += rank;
  const int32_t taps = c.kernel_h * c.kernel_w;
  p.outputs = Divider(c.outputs / c.groups);
  p.dilation_h = c.dilation_h, p.dilation_w = c.dilation_w, p.pad_h = c.pad_h, p.pad_w = c.pad_w;
  p.vectors_in = tiling.columns % in_whole == 0 && tiling.width % in_whole == 0 && aligned16(fuse.weight);
  const int32_t in_run = p.backward ? tiling.height : tiling.width / taps;
  p.vectors_out = (p.backward ? p.outputs.d : c.channels / c.groups) % out_whole == 0 && in_run % out_whole == 0;
  p.runs = Divider(static_cast<int32_t>(quotient_up(in_run, p.vectors_out ? out_whole : 1)));
  set_lanes(p.composition, p.vectors_in ? in_whole : 1);
  take_composition(p.composition, shared);
  p.tile_pitch = (tiling.width + tiling.width / 32) | 1;
  p.tile_floats = tiling.height * p.tile_pitch + tiling.height / 32 * 4;
  p.tile_at = shared.take(p.tile_floats);
  p.columns_at = shared.take(2 * taps);
  return p;
}

template <class W>
const char* launch_packed(const Problem& problem, const Fuse& fuse, int32_t rank, Stream stream) {
  SharedBytes shared;
  const Packed p = packed_of(problem, fuse, rank, shared);
  return with_type(fuse.out_type, [&](auto out) {
    return launch(fuse_packed<W, decltype(out)>, blocks_of(p.composition.tiling), kThreads, shared.bytes, stream, p);
  });
}

Tiling core_grad_tiling(const Conv& c) {
  Tiling tiling{};
  set_width(tiling, columns_of(c), 32 * kLaneColumns, c.rank, 8);
  set_height(tiling, c.outputs, kPairsAtOnce, c.outputs);
  return tiling;
}

CoreGrad core_grad_of(const Problem& problem, const FuseBackwardCall& call, SharedBytes& shared) {
  CoreGrad p{};
  p.tiling = core_grad_tiling(problem.conv);
  p.suffix = suffix_of(problem, call, problem.conv.rank);
  p.dout = call.dout, p.dcore = call.dcore, p.core_type = problem.core_type, p.scale = problem.scale;
  p.partial = p.tiling.across.d > 1 ? static_cast<float*>(call.partial) : nullptr;
  shared.take_suffix(p.suffix, p.tiling);
  return p;
}

}  // namespace

const char* fuse_forward(const Problem& problem, const Fuse& fuse, Stream stream) {
  const int32_t rank = fuse.core != nullptr ? problem.conv.rank : 0;
  return with_type(problem.weight_type, [&](auto weight) {
    using W = decltype(weight);
    if (fuse.packing != Packing::plain) return launch_packed<W>(problem, fuse, rank, stream);
    const bool vectors = columns_of(problem.conv) % kWhole<W> == 0 && aligned16(fuse.weight) && aligned16(fuse.out);
    if (fuse.out_type == Type::f32) {
      return vectors ? launch_plain<W, float, kWhole<W>>(problem, fuse, rank, stream)
                     : launch_plain<W, float, 1>(problem, fuse, rank, stream);
    }
    return vectors ? launch_plain<W, W, kWhole<W>>(problem, fuse, rank, stream)
                   : launch_plain<W, W, 1>(problem, fuse, rank, stream);
  });
}

const char* fuse_backward(const Problem& problem, const FuseBackwardCall& call, Stream stream) {
  SharedBytes shared;
  CoreGrad p = core_grad_of(problem, call, shared);
  return with_type(problem.weight_type, [&](auto weight) {
    using W = decltype(weight);
    const bool vectors = p.tiling.columns % kWhole<W> == 0 && aligned16(call.dout);
    const auto kernel = vectors ? fuse_core_grad<W, kWhole<W>> : fuse_core_grad<W, 1>;
    const char* error = launch(kernel, blocks_of(p.tiling), kThreads, shared.bytes, stream, p);
    if (error != nullptr || p.partial == nullptr) return error;
    return sum_partials(p.partial, p.tiling.across.d, p.tiling.rows, p.suffix.rank, call.dcore, problem.core_type,
                        problem.scale, nullptr, Type::f32, nullptr, Type::f32, stream);
  });
}

int64_t fuse_partial_bytes(const Problem& problem) {
  const Conv& c = problem.conv;
  const Tiling tiling = core_grad_tiling(c);
  return tiling.across.d == 1 ? 0 : int64_t{tiling.across.d} * c.outputs * c.rank * 4;
}

int64_t fuse_shared_bytes(const Problem& problem) {
  const Conv& c = problem.conv;
  const int32_t tail = problem.cores == 0 ? 0 : problem.bond2 * c.kernel_h * c.kernel_w;
  int32_t bytes = (kSuffixFloats + kFactorFloats + up_to_multiple(tail, 4)) * 4;  // of the plain layout, at most
  for (const Packing packing : {Packing::forward, Packing::backward}) {
    SharedBytes shared;
    Fuse fuse{};
    fuse.packing = packing, fuse.out_type = problem.type, fuse.suffix_rows = true;
    packed_of(problem, fuse, c.rank, shared);
    bytes = most(bytes, shared.bytes);
  }
  return bytes;
}

}  // namespace lora_edge
