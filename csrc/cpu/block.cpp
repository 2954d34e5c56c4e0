// What the CPU engine takes, and the scratch that it needs; forward.cpp and backward.cpp are its two passes.
#include "block.h"

#include <algorithm>

#include "../packing.h"
#include "few.h"
#include "pack.h"

namespace lora_edge::cpu {

const char* refusal(const Problem& p) {
  const Conv& c = p.conv;
  for (const Type type : {p.type, p.weight_type, p.core_type, p.suffix_type, p.affine_type}) {
    if (type != Type::f32) return "16-bit tensors; the CPU engine takes float32";
  }
  if (c.groups > 1 && (c.groups != c.channels || c.outputs != c.channels || c.channels % 8 != 0)) {
    return "groups; the CPU engine takes one group, or depthwise kernels of a multiple of 8 channels";
  }
  if (c.groups > 1 && c.rank > 0) return "an adapted depthwise kernel; the CPU engine takes frozen ones";
  if (std::max(c.stride_h, c.stride_w) > kMostStride) return "a stride over 4; the CPU engine takes up to 4";
  return nullptr;
}

Scratch scratch(const Problem& p) {
  const Conv& c = p.conv;
  if (has_few_positions(c)) return {few_packed_floats(c) * 4, 0};
  const Product forward(forward_reach(c), {c.in_h, c.in_w, c.channels, {}}, c.outputs, 0, is_depthwise(c));
  int64_t backward = 0;
  for (const Phase& phase : phases_of(c, 0)) backward += phase.product.packed_floats();
  return {forward.packed_floats() * 4, backward * 4};
}

}  // namespace lora_edge::cpu
