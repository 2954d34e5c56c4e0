// The composed kernel a * (W + s B S) that a pass multiplies with, computed row by row and never stored whole.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "kernels_of.h"

namespace lora_edge::cpu {

inline bool is_depthwise(const Conv& c) { return c.groups > 1; }

inline const float* floats(const void* p) { return static_cast<const float*>(p); }
inline float* floats(void* p) { return static_cast<float*>(p); }

// p + n, or null if p is null.
template <class T>
T* plus(T* p, int64_t n) {
  return p == nullptr ? nullptr : p + n;
}

struct Composed {
  const float *weight, *core, *suffix, *a;  // all but weight may be null
  int rank;
  int64_t columns;  // (I/g) Kh Kw of a row
  float scale;

  template <class Call>
  Composed(const Problem& p, const Call& call)
      : weight(floats(call.weight)), core(floats(call.core)), suffix(floats(call.suffix)), a(floats(call.affine_scale)),
        rank(core == nullptr ? 0 : p.conv.rank),
        columns(int64_t{p.conv.channels} / p.conv.groups * p.conv.kernel_h * p.conv.kernel_w), scale(p.scale) {}

  // Writes columns [first, first + count) of row o to `out`.
  void row(int o, int64_t first, int64_t count, float* out) const {
    kernels_here().compose_row({weight + o * columns + first, core == nullptr ? nullptr : core + int64_t{o} * rank,
                                suffix == nullptr ? nullptr : suffix + first, out, count, columns, rank, scale,
                                a == nullptr ? 1.0f : a[o]});
  }
  void row(int o, float* out) const { row(o, 0, columns, out); }
};

}  // namespace lora_edge::cpu
