// Packs the composed kernel in the order in which product.h reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "composed.h"
#include "product.h"

namespace lora_edge::cpu {

// Strides of the masked dy of some samples: dense, channels contiguous.
inline Strides dense_outputs(const Conv& c) {
  return {int64_t{c.out_h} * c.out_w * c.outputs, 1, int64_t{c.out_w} * c.outputs, c.outputs};
}

// One phase of dx: its first position, and the product over dy that computes it.
struct Phase {
  int h, w;
  Product product;
  std::vector<int> kernel_taps;  // for each tap of the product
  int64_t base;                  // first float in `packed`
};

// `samples`: the most samples in one run of a product.
std::vector<Phase> phases_of(const Conv&, int samples);

// Layout (tap, channel) for a depthwise convolution; otherwise columns are outputs.
void pack_forward(const Problem&, const ForwardCall&, const Product&, int threads);
// Layout (tap, channel) for a depthwise convolution; otherwise columns are inputs and channels outputs.
void pack_backward(const Problem&, const BackwardCall&, const std::vector<Phase>&, int threads);

}  // namespace lora_edge::cpu
