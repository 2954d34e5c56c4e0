// The composed kernel in the order in which product.h reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "composed.h"
#include "product.h"

namespace lora_edge::cpu {

// The masked dy of some samples: dense, channels as neighbours.
inline Strides dense_outputs(const Conv& c) {
  return {int64_t{c.out_h} * c.out_w * c.outputs, 1, int64_t{c.out_w} * c.outputs, c.outputs};
}

// One phase of dx: which of its positions, and the product over dy that gives them.
struct Phase {
  int h, w;
  Product product;
  std::vector<int> kernel_taps;  // of each tap of the product
  int64_t base;                  // floats of `packed` before it
};

// `samples`: the most that a product is given at once.
std::vector<Phase> phases_of(const Conv&, int samples);

// (tap, channel) of a depthwise convolution; else columns are outputs.
void pack_forward(const Problem&, const ForwardCall&, const Product&, int threads);
// (tap, channel) of a depthwise convolution; else columns are inputs, channels outputs.
void pack_backward(const Problem&, const BackwardCall&, const std::vector<Phase>&, int threads);

}  // namespace lora_edge::cpu
