// What the CPU engine supports, and the scratch that it needs; forward.cpp and backward.cpp are its two passes.
#include "block.h"

#include <algorithm>

#include "../packing.h"
#include "cut.h"
#include "few.h"
#include "pack.h"

namespace lora_edge::cpu {
namespace {

constexpr int64_t kMostTaps = 1 << 14;       // per kernel
constexpr int64_t kMostColumns = 1 << 22;    // per row of a kernel or a suffix; few.cpp composes 24 rows at once
constexpr int64_t kMostPositions = 1 << 28;  // per sample
constexpr int64_t kMostOffsets = 1 << 28;    // per table, 4 bytes each

}  // namespace

const char* refusal(const Problem& p) {
  const Conv& c = p.conv;
  for (const Type type : {p.type, p.weight_type, p.core_type, p.suffix_type, p.affine_type}) {
    if (type != Type::f32) return "16-bit tensors; the CPU engine supports float32";
  }
  if (c.groups > 1 && (c.groups != c.channels || c.outputs != c.channels || c.channels % 8 != 0)) {
    return "groups; the CPU engine supports one group, or depthwise kernels with a multiple of 8 channels";
  }
  if (c.groups > 1 && c.rank > 0) return "an adapted depthwise kernel; the CPU engine supports frozen ones";
  if (std::max(c.stride_h, c.stride_w) > kMostStride) return "a stride over 4; the CPU engine supports up to 4";
  const int64_t taps = int64_t{c.kernel_h} * c.kernel_w, columns = c.channels / c.groups * taps;
  if (taps > kMostTaps) return "a kernel of more than 16,384 taps; the CPU engine supports up to 16,384";
  if (columns > kMostColumns || c.rank * taps > kMostColumns) {
    return "more than 4,194,304 columns of a kernel or a suffix; the CPU engine supports up to 4,194,304";
  }
  const int64_t in = int64_t{c.in_h} * c.in_w, out = int64_t{c.out_h} * c.out_w;
  if (std::max(in, out) > kMostPositions) return "more than 2**28 positions per sample; the CPU engine supports up to 2**28";
  if (c.batch == 0 || has_few_positions(c)) return nullptr;
  const int samples = Cut(c.batch, c.out_h, c.out_w, 1).samples;
  if (samples * std::max(in, out) * taps > kMostOffsets) {
    return "more than 2**28 positions times taps per sample; the CPU engine supports up to 2**28";
  }
  const Product forward(forward_reach(c), {c.in_h, c.in_w, c.channels, {}}, c.outputs, 0, is_depthwise(c));
  int64_t farthest = forward.farthest(samples);
  for (const Phase& phase : phases_of(c, 0)) farthest = std::max(farthest, phase.product.farthest(samples));
  return farthest > INT32_MAX ? "transformed maps of 2**31 elements or more; the CPU engine supports fewer" : nullptr;
}

Scratch scratch(const Problem& p) {
  const Conv& c = p.conv;
  if (c.batch == 0) return {0, 0};
  if (has_few_positions(c)) return {few_packed_floats(c) * 4, 0};
  const Product forward(forward_reach(c), {c.in_h, c.in_w, c.channels, {}}, c.outputs, 0, is_depthwise(c));
  int64_t backward = 0;
  for (const Phase& phase : phases_of(c, 0)) backward += phase.product.packed_floats();
  return {forward.packed_floats() * 4, backward * 4};
}

}  // namespace lora_edge::cpu
