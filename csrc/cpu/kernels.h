// The inner loops of the CPU engine, in GCC's vector types. isa.cpp includes this file once per instruction set, each time in a
// separate namespace with its own kLanes and kVectors, so there is no include guard.
// Floor: a tile of gemm_rows does 6 x kVectors fused multiply-adds per k on kVectors + 6 loads; the others move memory.

typedef float V __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IV __attribute__((vector_size(kLanes * 4)));
typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int kPanel = kLanes * kVectors;

inline V8 load8(const float* p) { return *reinterpret_cast<const V8*>(p); }
inline void store8(float* p, V8 v) { *reinterpret_cast<V8*>(p) = v; }

// A row of activations is processed in vectors W and the rest in octets, so that each vector has whole bytes of bits.
constexpr int kWide = kLanes > 8 ? kLanes : 8;
typedef float W __attribute__((vector_size(kWide * 4), aligned(4), may_alias));

template <class Vector>
using IntOf = decltype(Vector{} < Vector{});

// Conversions between bytes of bits and a lane mask.
template <class Int>
inline Int mask_of(const uint8_t* bytes) {
  constexpr int lanes = sizeof(Int) / 4;
  Int each;
  for (int i = 0; i < lanes; ++i) each[i] = 1 << i;
  int32_t bits = 0;
  __builtin_memcpy(&bits, bytes, lanes / 8);
  return ((bits - Int{}) & each) != 0;
}
template <class Int>
inline uint32_t bits_of(Int mask) {
#if defined(__x86_64__)
  if constexpr (sizeof(Int) == 64) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (kHasAvx && sizeof(Int) == 32) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < static_cast<int>(sizeof(Int) / 4); ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
}

// One tile; if it has fewer than kTileRows rows, the last one is repeated.
template <int vectors>
inline void gemm_tile(const GemmRows& g, const int32_t* offsets, int rows, float* sums) {
  V acc[kTileRows][vectors] = {};
  for (int tap = g.tap; tap < g.tap_end; ++tap) {
    const float* a[kTileRows];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const int32_t at = offsets[(r < rows ? r : rows - 1) * g.taps + tap];
      a[r] = (at < 0 ? g.zeros : g.source + at) + g.channel;
    }
    const float* w = g.packed + (static_cast<int64_t>(tap) * g.channels + g.channel) * vectors * kLanes;
    for (int i = 0; i < g.channel_end - g.channel; ++i, w += vectors * kLanes) {
      V b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = *reinterpret_cast<const V*>(w + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const V x = a[r][i] - V{};  // broadcast; `+ V{}` would cost an addition because of the sign of zero
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) acc[r][v] += x * b[v];
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V* to = reinterpret_cast<V*>(sums + r * kPanel + v * kLanes);
      *to = g.adds ? *to + acc[r][v] : acc[r][v];
    }
  }
}

void gemm_rows(const GemmRows& g) {
  for (int row = 0; row < g.rows; row += kTileRows) {
    const int32_t* offsets = g.offsets + static_cast<int64_t>(row) * g.taps;
    float* sums = g.sums + static_cast<int64_t>(row) * kPanel;
    const int left = g.rows - row;
    switch (g.vectors) {
      case 1: gemm_tile<1>(g, offsets, left, sums); break;
      case 2: gemm_tile<2>(g, offsets, left, sums); break;
      case 3: gemm_tile<3>(g, offsets, left, sums); break;
      default: gemm_tile<kVectors>(g, offsets, left, sums); break;
    }
  }
}

// Calls step(a vector of the type to use, first, count) for all channels; the last octet may be shorter.
template <class Step>
inline void vectors_of(int channels, const Step& step) {
  int c = 0;
  for (; c + kWide <= channels; c += kWide) step(W{}, c, std::integral_constant<int, kWide>{});
  for (; c + 8 <= channels; c += 8) step(V8{}, c, std::integral_constant<int, 8>{});
  if (c < channels) step(V8{}, c, channels - c);
}

// As a template argument a vector type loses its attribute aligned(4); memcpy restores unaligned access.
template <class Vector = V8>
inline Vector load_some(const float* from, int count) {
  Vector v = {};
  if (count * sizeof(float) == sizeof(Vector)) {
    __builtin_memcpy(&v, from, sizeof(Vector));
    return v;
  }
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <class Vector>
inline void store_some(float* to, Vector v, int count) {
  if (count * sizeof(float) == sizeof(Vector)) {
    __builtin_memcpy(to, &v, sizeof(Vector));
  } else {
    for (int i = 0; i < count; ++i) to[i] = v[i];
  }
}

inline const V& vector_at(const float* p) { return *reinterpret_cast<const V*>(p); }
inline V& vector_at(float* p) { return *reinterpret_cast<V*>(p); }

// The two steps of filtering around the products (product.h): t = B^T x for the positions that a tile reads, and y = A^T m.
template <int outputs>
struct Tile;

template <>
struct Tile<2> {
  template <class Vector>
  static void transform(const Vector* x, Vector* t) {
    t[0] = x[0] - x[2];
    t[1] = x[1] + x[2];
    t[2] = x[2] - x[1];
    t[3] = x[1] - x[3];
  }
  static void combine(const V* m, V* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
};

template <>
struct Tile<4> {
  template <class Vector>
  static void transform(const Vector* x, Vector* t) {
    const Vector odd = x[3] - x[1], even = x[4] - x[2];
    t[0] = (x[0] - x[2]) + (even + 1.5f * odd);
    t[1] = (even + odd) + 1.5f * (x[3] + x[2]);
    t[2] = (even - odd) + 1.5f * (x[3] - x[2]);
    t[3] = even + 2.0f * odd;
    t[4] = even - 0.5f * odd;
    t[5] = (x[5] - x[3]) + (1.5f * even - odd);
  }
  static void combine(const V* m, V* y) {
    const V sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = (m[0] + sum) + (m[3] + m[4]);
    y[1] = difference + (0.5f * m[3] - 2.0f * m[4]);
    y[2] = sum + (0.25f * m[3] + 4.0f * m[4]);
    y[3] = (difference + m[5]) + (0.125f * m[3] - 8.0f * m[4]);
  }
};

// `Count`: int, or a constant for a whole vector.
template <int outputs, class Vector, class Count>
inline void filter_line_at(const FilterLine& f, int c, Count count) {
  auto at = [&](int p) {
    if (p < 0 || p >= f.width) return Vector{};
    const Vector x = f.source == nullptr ? Vector{} : load_some<Vector>(f.source + p * f.stride + c, count);
    return f.other == nullptr ? x : x + f.sign * load_some<Vector>(f.other + p * f.stride + c, count);
  };
  Vector x[outputs + 2], t[outputs + 2];
  x[outputs] = at(f.first), x[outputs + 1] = at(f.first + 1);
  float* to = f.to + c;
  for (int tile = 0, p = f.first + 2; tile < f.tiles; ++tile, p += outputs, to += f.channels) {
    x[0] = x[outputs], x[1] = x[outputs + 1];  // neighbouring tiles share two positions
#pragma GCC unroll 4
    for (int i = 0; i < outputs; ++i) x[i + 2] = at(p + i);
    Tile<outputs>::transform(x, t);
#pragma GCC unroll 6
    for (int i = 0; i < outputs + 2; ++i) store_some(to + i * f.apart, t[i], count);
  }
}

template <int outputs>
inline void filter_tiles(const FilterLine& f) {
  int c = 0;
  for (; c + kLanes <= f.channels; c += kLanes) filter_line_at<outputs, V>(f, c, std::integral_constant<int, kLanes>{});
  for (; c < f.channels; c += 8) filter_line_at<outputs, V8>(f, c, f.channels - c < 8 ? f.channels - c : 8);
}

void filter_line(const FilterLine& f) { f.outputs == 2 ? filter_tiles<2>(f) : filter_tiles<4>(f); }

template <int outputs, bool tall>
inline void combine_tiles(const Combine& c) {
  constexpr int products = outputs + 2, lines = tall ? 2 : 1;
  for (int row = 0; row < c.rows; row += outputs) {
    const float* from = c.m + static_cast<int64_t>(row / outputs) * kPanel;
    float* to = c.sums + static_cast<int64_t>(row) * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) {
      V m[lines][products], y[outputs];
#pragma GCC unroll 6
      for (int b = 0; b < products; ++b) {
        if constexpr (tall) {
          V column[4], pair[2];
#pragma GCC unroll 4
          for (int a = 0; a < 4; ++a) column[a] = vector_at(from + (a * products + b) * c.apart + i);
          Tile<2>::combine(column, pair);
          m[0][b] = pair[0], m[1][b] = pair[1];
        } else {
          m[0][b] = vector_at(from + b * c.apart + i);
        }
      }
#pragma GCC unroll 2
      for (int line = 0; line < lines; ++line) {
        Tile<outputs>::combine(m[line], y);
        float* at = to + static_cast<int64_t>(line) * c.rows * kPanel + i;
#pragma GCC unroll 4
        for (int k = 0; k < outputs; ++k) {
          if (row + k < c.rows) vector_at(at + k * kPanel) = y[k];
        }
      }
    }
  }
}

void combine_line(const Combine& c) {
  c.tall ? combine_tiles<2, true>(c) : c.outputs == 2 ? combine_tiles<2, false>(c) : combine_tiles<4, false>(c);
}

void combine_taps(const CombineTaps& c) {
  for (int i = 0; i < c.count; i += kLanes) {
    V factors[9];
    const float* from[9];
    for (int k = 0; k < c.terms; ++k) factors[k] = V{} + c.factors[k], from[k] = c.from + c.taps[k] * c.pitch + i;
    float* to = c.to + i;
    for (int channel = 0; channel < c.channels; ++channel, to += c.to_step) {
      V sum = factors[0] * vector_at(from[0]);
      from[0] += c.from_step;
      for (int k = 1; k < c.terms; ++k, from[k - 1] += c.from_step) sum += factors[k] * vector_at(from[k]);
      vector_at(to) = sum;
    }
  }
}

#if defined(__clang__)
#define LORA_EDGE_SHUFFLE(a, b, mask) shuffled(a, b, mask)
inline V shuffled(V a, V b, IV mask) {
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = mask[i] < kLanes ? a[mask[i]] : b[mask[i] - kLanes];
  return v;
}
#else
#define LORA_EDGE_SHUFFLE(a, b, mask) __builtin_shuffle(a, b, mask)
#endif

// Transposes a square of vectors at a time by interleaving rows i and i + kLanes / 2, log2(kLanes) times.
void transpose(const Transpose& t) {
  IV low, high;
  for (int i = 0; i < kLanes; ++i) low[i] = i / 2 + i % 2 * kLanes, high[i] = low[i] + kLanes / 2;
  for (int column = 0; column < t.columns; column += kLanes) {
    V a[kLanes], b[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) a[i] = vector_at(t.from + i * t.pitch + column);
#pragma GCC unroll 4
    for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < kLanes / 2; ++i) {
        b[2 * i] = LORA_EDGE_SHUFFLE(a[i], a[i + kLanes / 2], low);
        b[2 * i + 1] = LORA_EDGE_SHUFFLE(a[i], a[i + kLanes / 2], high);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) vector_at(t.to + static_cast<int64_t>(column + i) * kLanes) = a[i];
  }
}

void finish_rows(const FinishRows& f) {
  for (int row = 0; row < f.rows; ++row) {
    const float* sums = f.sums + static_cast<int64_t>(row) * f.pitch;
    float* y = f.y + f.y_at[row];
    const float* residual = f.residual == nullptr ? nullptr : f.residual + f.residual_at[row];
    uint8_t* bits = f.bits == nullptr ? nullptr : f.bits + static_cast<int64_t>(row) * f.octets;
    vectors_of(f.columns, [&](auto type, int c, auto count) {
      typedef decltype(type) Vector;
      Vector z = load_some<Vector>(sums + c, count);
      if (f.shift != nullptr) z += load_some<Vector>(f.shift + c, count);
      if (residual != nullptr) {
        const Vector r = load_some<Vector>(residual + c, count);
        z += f.residual_scale == nullptr ? r : r * load_some<Vector>(f.residual_scale + c, count);
      }
      if (f.activation != Activation::none) {  // NaN stays NaN and sets its bit
        const Vector low = Vector{} + f.low, high = Vector{} + f.high;
        auto flat = z <= low;
        z = flat ? low : z;
        if (f.activation == Activation::clamp) {
          flat |= z >= high;
          z = z >= high ? high : z;
        }
        if (bits != nullptr) {
          const uint32_t slope = ~bits_of(flat) & ((1u << count) - 1);
          __builtin_memcpy(bits + c / 8, &slope, count > 8 ? 2 : 1);
        }
      }
      store_some(y + c, z, count);
    });
  }
}

// Several rows at a time: each sum is read and written once for all of them, but still accumulated row by row.
template <int rows>
inline void mask_some(const MaskRows& m, int row) {
  const float *dy[rows], *h = m.h + static_cast<int64_t>(row) * m.rank;
  float *dresidual[rows], *dz = m.dz + static_cast<int64_t>(row) * m.channels;
  for (int r = 0; r < rows; ++r) {
    dy[r] = m.dy + m.dy_at[row + r];
    dresidual[r] = m.dresidual == nullptr ? nullptr : m.dresidual + m.dresidual_at[row + r];
  }
  const uint8_t* bits = m.bits == nullptr ? nullptr : m.bits + static_cast<int64_t>(row) * m.octets;
  vectors_of(m.channels, [&](auto type, int c, auto count) {
    typedef decltype(type) Vector;
    Vector v[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      v[r] = load_some<Vector>(dy[r] + c, count);
      if (bits != nullptr) v[r] = mask_of<IntOf<Vector>>(bits + r * m.octets + c / 8) ? v[r] : Vector{};
      if (m.keeps_dz) store_some(dz + static_cast<int64_t>(r) * m.channels + c, v[r], count);
      if (m.dresidual != nullptr) {
        store_some(dresidual[r] + c, m.residual_scale == nullptr ? v[r] : v[r] * load_some<Vector>(m.residual_scale + c, count),
                   count);
      }
    }
    auto add = [&](int q, const auto& factor) {
      float* at = m.sums + static_cast<int64_t>(q) * m.pitch + c;
      Vector sum = load_some<Vector>(at, sizeof(Vector) / 4);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum += v[r] * factor(r);
      store_some(at, sum, sizeof(Vector) / 4);
    };
    for (int q = 0; q < m.rank; ++q) add(q, [&](int r) { return h[r * m.rank + q]; });
    if (m.sums_bias) add(m.rank, [](int) { return 1.0f; });
  });
}

void mask_rows(const MaskRows& m) {
  int row = 0;
  for (; row + 4 <= m.rows; row += 4) mask_some<4>(m, row);
  for (; row < m.rows; ++row) mask_some<1>(m, row);
}

void depthwise_rows(const DepthwiseRows& d) {
  for (int row = 0; row < d.rows; ++row) {
    const int32_t* offsets = d.offsets + static_cast<int64_t>(row) * d.taps;
    float* sums = d.sums + static_cast<int64_t>(row) * d.channels;
    for (int c = 0; c < d.channels; c += 8) {
      V8 acc = {};
      for (int tap = 0; tap < d.taps; ++tap) {
        const int32_t at = offsets[tap];
        if (at >= 0) acc += load8(d.source + at + c) * load8(d.packed + static_cast<int64_t>(tap) * d.channels + c);
      }
      store8(sums + c, acc);
    }
  }
}

template <int count>
inline void dot_row(const float* x, const float* const* rows, int channels, float* out) {
  V acc[count] = {};
  int i = 0;
  for (; i + kLanes <= channels; i += kLanes) {
    const V v = *reinterpret_cast<const V*>(x + i);
    for (int q = 0; q < count; ++q) acc[q] += v * *reinterpret_cast<const V*>(rows[q] + i);
  }
  for (int q = 0; q < count; ++q) {
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += acc[q][lane];
    for (int k = i; k < channels; ++k) sum += x[k] * rows[q][k];
    out[q] = sum;
  }
}

void dot_rows(const DotRows& d) {
  for (int row = 0; row < d.rows; ++row) {
    const float* x = d.offsets[row] < 0 ? d.zeros : d.source + d.offsets[row];
    float* out = d.out + static_cast<int64_t>(row) * d.count;
    int q = 0;
    for (; q + 4 <= d.count; q += 4) {
      const float* rows[4] = {d.vectors + q * d.channels, d.vectors + (q + 1) * d.channels, d.vectors + (q + 2) * d.channels,
                              d.vectors + (q + 3) * d.channels};
      dot_row<4>(x, rows, d.channels, out + q);
    }
    for (; q + 2 <= d.count; q += 2) {
      const float* rows[2] = {d.vectors + q * d.channels, d.vectors + (q + 1) * d.channels};
      dot_row<2>(x, rows, d.channels, out + q);
    }
    if (q < d.count) {
      const float* rows[1] = {d.vectors + q * d.channels};
      dot_row<1>(x, rows, d.channels, out + q);
    }
  }
}

void compose_row(const ComposeRow& c) {
  for (int64_t i = 0; i < c.count; ++i) c.out[i] = c.a * c.weight[i];
  for (int q = 0; q < c.rank; ++q) {
    const float factor = c.core[q] * c.scale * c.a;
    const float* suffix = c.suffix + q * c.apart;
    for (int64_t i = 0; i < c.count; ++i) c.out[i] += factor * suffix[i];
  }
}

void gather_row(const GatherRow& g) {
  for (int i = 0; i < g.count; ++i) g.to[i] = g.index[i] < 0 ? 0.0f : g.from[g.index[i]];
}

const Kernels kernels = {kLanes,      kPanel,    gemm_rows,      filter_line, combine_line, combine_taps, transpose,
                         finish_rows, mask_rows, depthwise_rows, dot_rows,    compose_row,  gather_row};
