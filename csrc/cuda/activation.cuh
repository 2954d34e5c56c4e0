// The activation at a block's end, as both forward kernels apply it.
#pragma once

#include "gpu.cuh"
#include "../problem.h"

namespace lora_edge {

struct Bounds {
  Activation activation;
  float low, high;  // of Activation::clamp
};

// y of one z, and whether the slope is 1 there; a NaN stays one and passes its gradient on.
DEVICE float activate(const Bounds& p, float z, bool& slope) {
  if (p.activation == Activation::relu) {
    slope = !(z <= 0.0f);
    return slope ? z : 0.0f;
  }
  slope = !(z <= p.low) && !(z >= p.high);
  return slope ? z : z <= p.low ? p.low : p.high;
}

}  // namespace lora_edge
