// The inner loops of the CPU engine, in GCC's vector types. isa.cpp includes this once for each instruction set, each time in a
// namespace of its own with kLanes and kVectors; so there is no include guard.
// Floor: a tile of gemm_rows does 6 x kVectors fused multiply-adds a k on kVectors + 6 loads; the others move memory.

typedef float V __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I8 __attribute__((vector_size(32)));

constexpr int kPanel = kLanes * kVectors;

inline I8 as_int(V8 v) { return (I8)v; }  // the same bits
inline V8 as_float(I8 v) { return (V8)v; }
inline V8 load8(const float* p) { return *reinterpret_cast<const V8*>(p); }
inline void store8(float* p, V8 v) { *reinterpret_cast<V8*>(p) = v; }

// A byte of bits and a lane mask, each from the other.
inline I8 mask_of(uint32_t bits) {
  const I8 each = {1, 2, 4, 8, 16, 32, 64, 128};
  const int32_t b = static_cast<int32_t>(bits);
  return (I8{b, b, b, b, b, b, b, b} & each) != 0;
}
inline uint32_t bits_of(I8 mask) {
#if defined(__x86_64__)
  if constexpr (kHasAvx) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
}

// One tile; the last of `rows` rows is done again for those that it lacks.
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
        const V x = a[r][i] - V{};  // in every lane; a sum would cost an addition, for the sign of zero
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

// Calls step(first, count) for each octet of channels; the last may be shorter.
template <class Step>
inline void octets_of(int channels, const Step& step) {
  int c = 0;
  for (; c + 8 <= channels; c += 8) step(c, 8);
  if (c < channels) step(c, channels - c);
}

// As a template's argument a vector type loses its word that addresses need not be aligned; copying says so again.
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

// Differences by two, sums and differences by one of the positions `at(p)`, `store`d by kind and place: each is loaded once.
template <class Vector, class At, class Store>
inline void filter_column(int places, const At& at, const Store& store) {
  Vector x0 = at(0), x1 = at(1);
  for (int t = 0; t < places; ++t) {
    const Vector x2 = at(t + 2);
    store(0, t, x0 - x2);
    store(1, t, x0 + x1);
    store(2, t, x1 - x0);
    x0 = x1, x1 = x2;
  }
}

// `Count`: int, or a constant where it is a whole vector.
template <class Vector, class Count>
inline void filter_line_at(const FilterLine& f, int c, Count count) {
  float* const to[3] = {f.by_two + c, f.sum + c, f.by_one + c};
  auto at = [&](int t) {
    const int p = f.first + t;
    return p < 0 || p >= f.width ? Vector{} : load_some<Vector>(f.source + p * f.stride + c, count);
  };
  filter_column<Vector>(f.places, at, [&](int kind, int t, Vector v) {
    store_some(to[kind] + static_cast<int64_t>(t) * f.channels, v, count);
  });
}

void filter_line(const FilterLine& f) {
  int c = 0;
  for (; c + kLanes <= f.channels; c += kLanes) filter_line_at<V>(f, c, std::integral_constant<int, kLanes>{});
  for (; c < f.channels; c += 8) filter_line_at<V8>(f, c, f.channels - c < 8 ? f.channels - c : 8);
}

// All four of a position at once.
template <class Vector>
struct Four {
  Vector v[4];
  Four operator+(const Four& o) const { return {{v[0] + o.v[0], v[1] + o.v[1], v[2] + o.v[2], v[3] + o.v[3]}}; }
  Four operator-(const Four& o) const { return {{v[0] - o.v[0], v[1] - o.v[1], v[2] - o.v[2], v[3] - o.v[3]}}; }
};

template <class Vector, class Count>
inline void filter_pair_at(const FilterPair& f, int c, Count count) {
  const int64_t line = static_cast<int64_t>(f.places) * f.channels;
  auto at = [&](int t) {
    const int p = f.first + t;
    Vector x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const bool outside = f.lines[i] == nullptr || p < 0 || p >= f.width;
      x[i] = outside ? Vector{} : load_some<Vector>(f.lines[i] + p * f.stride + c, count);
    }
    return Four<Vector>{{x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]}};
  };
  filter_column<Four<Vector>>(f.places, at, [&](int kind, int t, const Four<Vector>& four) {
    float* to = f.to + kind * line + static_cast<int64_t>(t) * f.channels + c;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_some(to + 3 * i * line, four.v[i], count);
  });
}

void filter_pair(const FilterPair& f) {
  int c = 0;
  for (; c + kLanes <= f.channels; c += kLanes) filter_pair_at<V>(f, c, std::integral_constant<int, kLanes>{});
  for (; c < f.channels; c += 8) filter_pair_at<V8>(f, c, f.channels - c < 8 ? f.channels - c : 8);
}

inline const V& vector_at(const float* p) { return *reinterpret_cast<const V*>(p); }
inline V& vector_at(float* p) { return *reinterpret_cast<V*>(p); }

void combine_line(const Combine& c) {
  for (int row = 0; row < c.rows; row += 2) {
    const float* from = c.m + static_cast<int64_t>(row / 2) * kPanel;
    float* to = c.sums + static_cast<int64_t>(row) * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) {
      const V m1 = vector_at(from + c.apart + i), m2 = vector_at(from + 2 * c.apart + i);
      vector_at(to + i) = vector_at(from + i) + (m1 + m2);
      if (row + 1 < c.rows) vector_at(to + kPanel + i) = (m1 - m2) - vector_at(from + 3 * c.apart + i);
    }
  }
}

void combine_pair(const Combine& c) {
  const int64_t line = static_cast<int64_t>(c.rows) * kPanel;
  for (int row = 0; row < c.rows; row += 2) {
    const float* from = c.m + static_cast<int64_t>(row / 2) * kPanel;
    float* to = c.sums + static_cast<int64_t>(row) * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) {
      V above[4], below[4];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const float* m = from + b * c.apart + i;
        const V m1 = vector_at(m + 4 * c.apart), m2 = vector_at(m + 8 * c.apart);
        above[b] = vector_at(m) + (m1 + m2);
        below[b] = (m1 - m2) - vector_at(m + 12 * c.apart);
      }
      vector_at(to + i) = above[0] + (above[1] + above[2]);
      vector_at(to + line + i) = below[0] + (below[1] + below[2]);
      if (row + 1 < c.rows) {
        vector_at(to + kPanel + i) = (above[1] - above[2]) - above[3];
        vector_at(to + line + kPanel + i) = (below[1] - below[2]) - below[3];
      }
    }
  }
}

void combine_taps(const CombineTaps& c) {
  for (int i = 0; i < c.count; i += kLanes) {
    V sum = {};
    for (int k = 0; k < c.terms; ++k) sum += c.factors[k] * vector_at(c.from + c.taps[k] * c.pitch + i);
    vector_at(c.to + i) = sum;
  }
}

void finish_rows(const FinishRows& f) {
  const V8 low = V8{} + f.low, high = V8{} + f.high;
  for (int row = 0; row < f.rows; ++row) {
    const float* sums = f.sums + static_cast<int64_t>(row) * f.pitch;
    float* y = f.y + f.y_at[row];
    const float* residual = f.residual == nullptr ? nullptr : f.residual + f.residual_at[row];
    uint8_t* bits = f.bits == nullptr ? nullptr : f.bits + static_cast<int64_t>(row) * f.octets;
    octets_of(f.columns, [&](int c, int count) {
      V8 z = load_some(sums + c, count);
      if (f.shift != nullptr) z += load_some(f.shift + c, count);
      if (residual != nullptr) {
        const V8 r = load_some(residual + c, count);
        z += f.residual_scale == nullptr ? r : r * load_some(f.residual_scale + c, count);
      }
      if (f.activation != Activation::none) {  // a NaN stays one and has its bit set
        const I8 below = z <= low, above = f.activation == Activation::clamp ? z >= high : I8{};
        const I8 slope = ~(below | above);
        z = as_float((slope & as_int(z)) | (below & as_int(low)) | (above & ~below & as_int(high)));
        if (bits != nullptr) bits[c / 8] = static_cast<uint8_t>(bits_of(slope) & ((1u << count) - 1));
      }
      store_some(y + c, z, count);
    });
  }
}

void mask_rows(const MaskRows& m) {
  for (int row = 0; row < m.rows; ++row) {
    const float* dy = m.dy + m.dy_at[row];
    const uint8_t* bits = m.bits == nullptr ? nullptr : m.bits + static_cast<int64_t>(row) * m.octets;
    float* dz = m.dz + static_cast<int64_t>(row) * m.channels;
    float* dresidual = m.dresidual == nullptr ? nullptr : m.dresidual + m.dresidual_at[row];
    const float* h = m.h + static_cast<int64_t>(row) * m.rank;
    octets_of(m.channels, [&](int c, int count) {
      V8 v = load_some(dy + c, count);
      if (bits != nullptr) v = as_float(mask_of(bits[c / 8]) & as_int(v));
      if (m.keeps_dz) store_some(dz + c, v, count);
      if (dresidual != nullptr) {
        store_some(dresidual + c, m.residual_scale == nullptr ? v : v * load_some(m.residual_scale + c, count), count);
      }
      for (int q = 0; q < m.rank; ++q) {
        float* sum = m.sums + static_cast<int64_t>(q) * m.pitch + c;
        store8(sum, load8(sum) + v * h[q]);
      }
      if (m.sums_bias) {
        float* sum = m.sums + static_cast<int64_t>(m.rank) * m.pitch + c;
        store8(sum, load8(sum) + v);
      }
    });
  }
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

const Kernels kernels = {kLanes,       kPanel,      gemm_rows, filter_line,    filter_pair, combine_line, combine_pair,
                         combine_taps, finish_rows, mask_rows, depthwise_rows, dot_rows,    compose_row,  gather_row};
