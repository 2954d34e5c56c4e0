// The layout of a composed kernel in `packed`, which tt_fuse writes and the convolution kernels read.
//
// plain     (O + r1, I/g, Kh, Kw) float32, for the depthwise kernels; rows O.. are the suffix
// forward   (O + r1, pitch): column = tap * I/g + channel; the GEMM's k runs over taps, then channels
// backward  (g * I/g, pitch): row = input channel, column = base[phase] + (index of the tap in the phase) * O/g + output.
//           A strided input gradient falls into stride_h * stride_w phases: input position i = phase + stride * u is reached
//           only by the taps with (phase + pad - tap * dilation) % stride == 0, and each phase is a separate GEMM.
// Rows, and the segments of phases, are padded with zeros to 16 bytes.
#pragma once

#include "problem.h"

namespace lora_edge {

constexpr int kMostStride = 4;
constexpr int kMostPhases = kMostStride * kMostStride;

enum class Packing : int32_t { plain, forward, backward };

// The taps of one axis that reach one phase: tap first + step * j, j < count, reads source position u + origin - j * advance.
struct Taps {
  int32_t first, step, count, origin, advance;
};

struct PackedLayout {
  int32_t rows, pitch;  // pitch in elements
  int32_t phases_h, phases_w;
  int32_t base[kMostPhases];  // first column of phase ph * phases_w + pw
  Taps taps_h[kMostStride], taps_w[kMostStride];
};

#if defined(__CUDACC__)
#define LORA_EDGE_BOTH __host__ __device__
#else
#define LORA_EDGE_BOTH
#endif

LORA_EDGE_BOTH inline int32_t modulo(int32_t a, int32_t b) { return (a % b + b) % b; }

// The phase that a tap of one axis reaches.
LORA_EDGE_BOTH inline int32_t phase_of(int32_t tap, int32_t dilation, int32_t pad, int32_t stride) {
  return modulo(tap * dilation - pad, stride);
}

inline int32_t gcd(int32_t a, int32_t b) { return b == 0 ? a : gcd(b, a % b); }

inline Taps taps_of(int32_t phase, int32_t kernel, int32_t dilation, int32_t pad, int32_t stride) {
  const int32_t step = stride / gcd(dilation, stride);
  Taps taps{0, step, 0, 0, dilation * step / stride};
  while (taps.first < step && phase_of(taps.first, dilation, pad, stride) != phase) ++taps.first;
  if (taps.first < step && taps.first < kernel) {
    taps.count = (kernel - taps.first + step - 1) / step;
    taps.origin = (phase + pad - taps.first * dilation) / stride;
  }
  return taps;
}

inline PackedLayout packed_layout(const Conv& c, Packing packing, int32_t element_bytes) {
  const int32_t whole = 16 / element_bytes;
  auto padded = [whole](int32_t n) { return (n + whole - 1) / whole * whole; };
  PackedLayout layout{};
  const int32_t taps = c.kernel_h * c.kernel_w;
  layout.phases_h = layout.phases_w = 1;
  if (packing != Packing::backward) {
    layout.rows = c.outputs + c.rank;
    layout.pitch = packing == Packing::plain ? c.channels / c.groups * taps : padded(c.channels / c.groups * taps);
    return layout;
  }
  layout.rows = c.channels;
  layout.phases_h = c.stride_h, layout.phases_w = c.stride_w;
  for (int32_t h = 0; h < c.stride_h; ++h) layout.taps_h[h] = taps_of(h, c.kernel_h, c.dilation_h, c.pad_h, c.stride_h);
  for (int32_t w = 0; w < c.stride_w; ++w) layout.taps_w[w] = taps_of(w, c.kernel_w, c.dilation_w, c.pad_w, c.stride_w);
  for (int32_t h = 0; h < c.stride_h; ++h)
    for (int32_t w = 0; w < c.stride_w; ++w) {
      layout.base[h * c.stride_w + w] = layout.pitch;
      layout.pitch += padded(layout.taps_h[h].count * layout.taps_w[w].count * (c.outputs / c.groups));
    }
  return layout;
}

}  // namespace lora_edge
