// dora_fuse: W'[o] = gain[o] * V[o] with V = W + scale * core * suffix, gain = magnitude / max(norm, 1e-12), norm = |V[o]|,
// and its gradients, the norm a constant. Arithmetic is float32, with one cast at the end.
//
//   weight (O, C), C = I/g * Kh * Kw      core (O, r)      suffix (r, C)      magnitude (O)      norms (O) float32
//   P = dW' * suffix^T (O, r)             dcore = scale * gain * P            dsuffix = scale * (gain * core)^T * dW'
//   dmagnitude[o] = (sum of dW'[o] * W[o] + scale * sum_q core[o, q] P[o, q]) / max(norm[o], 1e-12)
//
// The norm is that of V itself. Torch's engine finds it from the factors because there V would be a second weight in memory;
// here V is in registers, the square of an element costs one multiply-add, and nothing cancels.
//
// Tiles: 256 threads.
//   forward       4 whole rows. A thread has 16 bytes of each row if rows are aligned and the suffix is float32, otherwise
//                 single elements. V stays in shared memory from the norm to the product if 4 rows fit 64 KB (4,096
//                 columns), otherwise it is computed twice, and the weight comes from L2 the second time.
//   row sums      4 whole rows of dW' and W, 8 ranks at a time in registers
//   suffix        32 columns x 16 ranks over all rows of dW', every eighth row per warp
// Floor: 2 * bytes(W) / bandwidth; for the gradients 3 * bytes(W) / bandwidth, as dW' is read twice. The suffix is read from L2
// once per 4 rows, r / 4 times the bytes of a float32 weight. The r multiply-adds per element are below any ridge for r up
// to 16.
#include "dora_fuse.cuh"

#include "elements.cuh"

namespace lora_edge {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;               // per block
constexpr int kKeptBytes = 64 * 1024;  // most shared memory for V; two blocks fit an SM
constexpr int kRanks = 8;              // row sums: ranks at a time
constexpr int kSums = kRanks + 1;      // and dW' * W
constexpr int kColumns = 32;           // suffix: columns per block
constexpr int kSuffixRanks = 16;       // suffix: ranks per block
constexpr int kTableRows = 64;         // suffix: rows whose factors are staged at a time
constexpr float kLeastNorm = 1e-12f;   // LEAST_NORM of lora_edge/ops/reference.py

DEVICE float divisor(float norm) { return norm < kLeastNorm ? kLeastNorm : norm; }  // a NaN stays one

struct Operands {
  const void *weight, *core, *suffix, *magnitude;
  Type core_type, suffix_type, magnitude_type;
  float scale;
  int32_t outputs, columns, rank;

  DEVICE float core_at(int row, int q, bool ok) const {
    return load_as_float(core, core_type, static_cast<int64_t>(row) * rank + q, ok);
  }
  DEVICE float gain(int row, float norm, bool ok) const {
    return load_as_float(magnitude, magnitude_type, row, ok) / divisor(norm);
  }
  template <int vector>
  DEVICE void load_suffix(float (&to)[vector], int q, int column, bool ok = true) const {
    const int64_t at = static_cast<int64_t>(q) * columns + column;
    if constexpr (vector == 1) {
      to[0] = load_as_float(suffix, suffix_type, at, ok);
    } else {
      load_floats<float, vector>(to, static_cast<const float*>(suffix), at, ok);
    }
  }
};

// Loads one access of each row; rows beyond the last are zeros.
template <class T, int vector>
DEVICE void load_rows(float (&to)[kRows][vector], const void* from, const Operands& p, int row, int column) {
  UNROLL
  for (int k = 0; k < kRows; ++k) {
    const int64_t at = static_cast<int64_t>(row + k) * p.columns + column;
    load_floats<T, vector>(to[k], static_cast<const T*>(from), at, inside(row + k < p.outputs));
  }
}

DEVICE float warp_sum(float v) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

struct Forward {
  Operands of;
  void* out;
  float* norms;
  int32_t pitch;  // floats from row to row of V in shared memory; 0: V does not fit
  int32_t sums_at, kept_at;

  DEVICE Shared<float> factors() const { return shared_array<float>(0, of.rank * kRows); }  // (r, 4): scale * core
  DEVICE Shared<float> sums() const { return shared_array<float>(sums_at, kWarps * kRows); }
  DEVICE Shared<float> kept() const { return shared_array<float>(kept_at, kRows * pitch); }
};

template <class W, int vector>
DEVICE void compose(float (&v)[kRows][vector], const Forward& p, int row, int column) {
  const Shared<float> factors = p.factors();
  load_rows<W, vector>(v, p.of.weight, p.of, row, column);
  for (int q = 0; q < p.of.rank; ++q) {
    float a[vector], factor[kRows];
    p.of.load_suffix<vector>(a, q, column);
    load_floats<kRows>(factor, factors, q * kRows);
    UNROLL
    for (int k = 0; k < kRows; ++k) {
      UNROLL
      for (int j = 0; j < vector; ++j) v[k][j] += factor[k] * a[j];
    }
  }
}

template <class W, int vector>
KERNEL(kThreads, 2) void dora_rows(const GRID_CONSTANT Forward p) {
  const Operands& of = p.of;
  const Shared<float> factors = p.factors(), sums = p.sums(), kept = p.kept();
  const int row = block_index() * kRows;
  for (int i = thread_index(); i < of.rank * kRows; i += kThreads) {
    const int q = i / kRows, k = i - q * kRows;
    factors.store(i, of.scale * of.core_at(row + k, q, inside(row + k < of.outputs)));
  }
  sync_block();
  float square[kRows] = {};
  for (int column = thread_index() * vector; inside(column < of.columns); column += kThreads * vector) {
    float v[kRows][vector];
    compose<W, vector>(v, p, row, column);
    UNROLL
    for (int k = 0; k < kRows; ++k) {
      UNROLL
      for (int j = 0; j < vector; ++j) square[k] += v[k][j] * v[k][j];
      if (p.pitch > 0) store_floats<vector>(kept, k * p.pitch + column, v[k]);
    }
  }
  UNROLL
  for (int k = 0; k < kRows; ++k) {
    square[k] = warp_sum(square[k]);
    if (inside(lane_index() == 0)) sums.store(warp_index() * kRows + k, square[k]);
  }
  sync_block();
  float gain[kRows];
  UNROLL
  for (int k = 0; k < kRows; ++k) {
    const bool ok = inside(row + k < of.outputs);
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums.load(warp * kRows + k);
    const float norm = square_root(sum);
    gain[k] = of.gain(row + k, norm, ok);
    if (inside(thread_index() == 0)) store_global(p.norms, row + k, norm, ok);
  }
  for (int column = thread_index() * vector; inside(column < of.columns); column += kThreads * vector) {
    float v[kRows][vector];
    if (p.pitch == 0) compose<W, vector>(v, p, row, column);
    UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (p.pitch > 0) load_floats<vector>(v[k], kept, k * p.pitch + column);
      UNROLL
      for (int j = 0; j < vector; ++j) v[k][j] *= gain[k];
      const int64_t at = static_cast<int64_t>(row + k) * of.columns + column;
      store_floats<W, vector>(static_cast<W*>(p.out), at, v[k], inside(row + k < of.outputs));
    }
  }
}

struct Backward {
  Operands of;
  const void* dout;
  const float* norms;
  void *dcore, *dsuffix, *dmagnitude;  // null: not computed
};

constexpr int kRowSumsBytes = (kWarps + 1) * kRows * kSums * 4;

template <class W, int vector>
KERNEL(kThreads, 2) void dora_row_sums(const GRID_CONSTANT Backward p) {
  const Operands& of = p.of;
  const Shared<float> sums = shared_array<float>(0, kWarps * kRows * kSums);
  const Shared<float> terms = shared_array<float>(kWarps * kRows * kSums * 4, kRows * kSums);  // of dmagnitude
  const int row = block_index() * kRows, t = thread_index();
  float inner = 0.0f;  // of row t
  for (int first = 0; first == 0 || first < of.rank; first += kRanks) {
    float sum[kRows][kSums] = {};
    for (int column = t * vector; inside(column < of.columns); column += kThreads * vector) {
      float d[kRows][vector];
      load_rows<W, vector>(d, p.dout, of, row, column);
      if (first == 0) {
        float w[kRows][vector];
        load_rows<W, vector>(w, of.weight, of, row, column);
        UNROLL
        for (int k = 0; k < kRows; ++k) {
          UNROLL
          for (int j = 0; j < vector; ++j) sum[k][kRanks] += d[k][j] * w[k][j];
        }
      }
      UNROLL
      for (int q = 0; q < kRanks; ++q) {
        float a[vector];
        of.load_suffix<vector>(a, first + q, column, inside(first + q < of.rank));
        UNROLL
        for (int k = 0; k < kRows; ++k) {
          UNROLL
          for (int j = 0; j < vector; ++j) sum[k][q] += d[k][j] * a[j];
        }
      }
    }
    UNROLL
    for (int k = 0; k < kRows; ++k) {
      UNROLL
      for (int q = 0; q < kSums; ++q) {
        const float total = warp_sum(sum[k][q]);
        if (inside(lane_index() == 0)) sums.store((warp_index() * kRows + k) * kSums + q, total);
      }
    }
    sync_block();
    if (inside(t < kRows * kSums)) {
      const int k = t / kSums, q = t - k * kSums;
      const bool ok = inside(row + k < of.outputs), ranked = ok && q < kRanks && inside(first + q < of.rank);
      float total = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) total += sums.load(warp * kRows * kSums + t);
      if (p.dcore != nullptr) {
        const float gain = of.gain(row + k, load_global(p.norms, row + k, ok), ok);
        const int64_t at = static_cast<int64_t>(row + k) * of.rank + first + q;
        store_float(p.dcore, of.core_type, at, of.scale * gain * total, ranked);
      }
      terms.store(t, q < kRanks ? of.scale * of.core_at(row + k, first + q, ranked) * total : total);
    }
    sync_block();
    if (inside(t < kRows)) {
      for (int q = 0; q < kSums; ++q) inner += terms.load(t * kSums + q);
    }
  }
  if (p.dmagnitude == nullptr || !inside(t < kRows)) return;
  const bool ok = inside(row + t < of.outputs);
  store_float(p.dmagnitude, of.magnitude_type, row + t, inner / divisor(load_global(p.norms, row + t, ok)), ok);
}

constexpr int kSuffixBytes = (kTableRows * kSuffixRanks + kWarps * kSuffixRanks * kColumns) * 4;

template <class W>
KERNEL(kThreads, 2) void dora_suffix_grad(const GRID_CONSTANT Backward p) {
  const Operands& of = p.of;
  const Shared<float> table = shared_array<float>(0, kTableRows * kSuffixRanks);  // scale * gain * core
  const Shared<float> sums = shared_array<float>(kTableRows * kSuffixRanks * 4, kWarps * kSuffixRanks * kColumns);
  const int parts = (of.rank + kSuffixRanks - 1) / kSuffixRanks, tile = block_index() / parts;
  const int first = (block_index() - tile * parts) * kSuffixRanks, column = tile * kColumns + lane_index();
  const bool mine = inside(column < of.columns);
  const W* dout = static_cast<const W*>(p.dout);
  float sum[kSuffixRanks] = {};
  for (int start = 0; start < of.outputs; start += kTableRows) {
    for (int i = thread_index(); i < kTableRows * kSuffixRanks; i += kThreads) {
      const int r = i / kSuffixRanks, q = i - r * kSuffixRanks, row = start + r;
      const bool ok = inside(row < of.outputs), ranked = ok && inside(first + q < of.rank);
      const float gain = of.gain(row, load_global(p.norms, row, ok), ok);
      table.store(i, of.scale * gain * of.core_at(row, first + q, ranked));
    }
    sync_block();
    for (int r = warp_index(); r < kTableRows; r += kWarps) {
      const bool ok = mine && inside(start + r < of.outputs);
      const float d = to_float(load_global(dout, static_cast<int64_t>(start + r) * of.columns + column, ok));
      float factor[kSuffixRanks];
      load_floats<kSuffixRanks>(factor, table, r * kSuffixRanks);
      UNROLL
      for (int q = 0; q < kSuffixRanks; ++q) sum[q] += factor[q] * d;
    }
    sync_block();
  }
  UNROLL
  for (int q = 0; q < kSuffixRanks; ++q) sums.store((warp_index() * kSuffixRanks + q) * kColumns + lane_index(), sum[q]);
  sync_block();
  for (int q = warp_index(); q < kSuffixRanks; q += kWarps) {
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += sums.load((warp * kSuffixRanks + q) * kColumns + lane_index());
    const int64_t at = static_cast<int64_t>(first + q) * of.columns + column;
    store_float(p.dsuffix, of.suffix_type, at, total, mine && inside(first + q < of.rank));
  }
}

template <class Call>
Operands operands_of(const Problem& problem, const Call& call) {
  const Conv& c = problem.conv;
  Operands of{};
  of.weight = call.weight, of.core = call.core, of.suffix = call.suffix, of.magnitude = call.magnitude;
  of.core_type = problem.core_type, of.suffix_type = problem.suffix_type, of.magnitude_type = problem.affine_type;
  of.scale = problem.scale;
  of.outputs = c.outputs, of.columns = c.channels / c.groups * c.kernel_h * c.kernel_w, of.rank = c.rank;
  return of;
}

template <class W>
bool in_vectors(const Operands& of, const void* other) {
  return of.columns % kWhole<W> == 0 && of.suffix_type == Type::f32 && aligned16(of.weight) && aligned16(of.suffix) &&
         aligned16(other);
}

}  // namespace

const char* dora_forward(const Problem& problem, const DoraCall& call, Stream stream) {
  Forward p{};
  p.of = operands_of(problem, call);
  p.out = call.out, p.norms = static_cast<float*>(call.norms);
  p.sums_at = p.of.rank * kRows * 4;
  p.kept_at = p.sums_at + kWarps * kRows * 4;
  const int32_t pitch = up_to_multiple(p.of.columns, 4);
  p.pitch = int64_t{kRows} * pitch * 4 <= kKeptBytes ? pitch : 0;
  return with_type(problem.weight_type, [&](auto weight) {
    using W = decltype(weight);
    const auto kernel = in_vectors<W>(p.of, p.out) ? dora_rows<W, kWhole<W>> : dora_rows<W, 1>;
    return launch(kernel, quotient_up(p.of.outputs, kRows), kThreads, p.kept_at + kRows * p.pitch * 4, stream, p);
  });
}

const char* dora_backward(const Problem& problem, const DoraBackwardCall& call, Stream stream) {
  Backward p{};
  p.of = operands_of(problem, call);
  p.dout = call.dout, p.norms = static_cast<const float*>(call.norms);
  p.dcore = call.dcore, p.dsuffix = call.dsuffix, p.dmagnitude = call.dmagnitude;
  return with_type(problem.weight_type, [&](auto weight) {
    using W = decltype(weight);
    const char* error = nullptr;
    if (p.dcore != nullptr || p.dmagnitude != nullptr) {
      const auto kernel = in_vectors<W>(p.of, p.dout) ? dora_row_sums<W, kWhole<W>> : dora_row_sums<W, 1>;
      error = launch(kernel, quotient_up(p.of.outputs, kRows), kThreads, kRowSumsBytes, stream, p);
    }
    if (error != nullptr || p.dsuffix == nullptr) return error;
    const int64_t blocks = quotient_up(p.of.columns, kColumns) * quotient_up(p.of.rank, kSuffixRanks);
    return launch(dora_suffix_grad<W>, blocks, kThreads, kSuffixBytes, stream, p);
  });
}

}  // namespace lora_edge
