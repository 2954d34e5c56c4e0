// The activation at a block's end, as both forward kernels apply it.
#pragma once

#include "../problem.h"
#include "gpu.cuh"

namespace lora_edge {

struct Bounds {
  Activation activation;
  float low, high;  // for Activation::clamp
};

// Returns y for one z; `slope`: whether the slope there is 1. NaN stays NaN and passes its gradient on.
DEVICE float activate(const Bounds& p, float z, bool& slope) {
  if (p.activation == Activation::relu) {
    slope = !(z <= 0.0f);
    return slope ? z : 0.0f;
  }
  slope = !(z <= p.low) && !(z >= p.high);
  return slope ? z : z <= p.low ? p.low : p.high;
}

}  // namespace lora_edge
