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

template <int vectors>
inline void gemm_tile(const GemmRows& g, const int32_t* offsets, float* sums) {
  V acc[kTileRows][vectors] = {};
  for (int tap = g.tap; tap < g.tap_end; ++tap) {
    const float* a[kTileRows];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const int32_t at = offsets[r * g.taps + tap];
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
    switch (g.vectors) {
      case 1: gemm_tile<1>(g, offsets, sums); break;
      case 2: gemm_tile<2>(g, offsets, sums); break;
      case 3: gemm_tile<3>(g, offsets, sums); break;
      default: gemm_tile<kVectors>(g, offsets, sums); break;
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

inline V8 load_some(const float* from, int count) {
  if (count == 8) return load8(from);
  V8 v = {};
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

inline void store_some(float* to, V8 v, int count) {
  if (count == 8) return store8(to, v);
  for (int i = 0; i < count; ++i) to[i] = v[i];
}

void filter_line(const FilterLine& f) {
  for (int t = 0; t < f.places; ++t) {
    const float* x[3];
    for (int i = 0; i < 3; ++i) {
      const int p = f.first + t + i;
      x[i] = p < 0 || p >= f.width ? f.zeros : f.source + p * f.stride;
    }
    const int64_t to = static_cast<int64_t>(t) * f.channels;
    octets_of(f.channels, [&](int c, int count) {
      const V8 x0 = load_some(x[0] + c, count), x1 = load_some(x[1] + c, count), x2 = load_some(x[2] + c, count);
      store_some(f.by_two + to + c, x0 - x2, count);
      store_some(f.sum + to + c, x0 + x1, count);
      store_some(f.by_one + to + c, x1 - x0, count);
    });
  }
}

void combine_line(const CombineLine& c) {
  for (int row = 0; row < c.rows; row += 2) {
    const int64_t from = static_cast<int64_t>(row / 2) * kPanel, to = static_cast<int64_t>(row) * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) {
      const V m1 = *reinterpret_cast<const V*>(c.m1 + from + i), m2 = *reinterpret_cast<const V*>(c.m2 + from + i);
      *reinterpret_cast<V*>(c.sums + to + i) = *reinterpret_cast<const V*>(c.m0 + from + i) + (m1 + m2);
      if (row + 1 < c.rows) {
        *reinterpret_cast<V*>(c.sums + to + kPanel + i) = (m1 - m2) - *reinterpret_cast<const V*>(c.m3 + from + i);
      }
    }
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

const Kernels kernels = {kLanes,    kPanel,         gemm_rows, filter_line, combine_line, finish_rows,
                         mask_rows, depthwise_rows, dot_rows,  compose_row, gather_row};
