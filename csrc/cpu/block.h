// tt_block on the CPU, forward and backward: the same as the CUDA engine's launchers (csrc/plan.h), for float32 in host memory.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lora_edge::cpu {

// Why this engine does not support the problem, or null.
const char* refusal(const Problem&);

struct Scratch {
  int64_t packed_forward, packed_backward;  // bytes
};
Scratch scratch(const Problem&);

// Channels are contiguous in every map, h is float32, and `suffix` is contracted.
void block_forward(const Problem&, const ForwardCall&, int threads);
void block_backward(const Problem&, const BackwardCall&, int threads);

}  // namespace lora_edge::cpu
