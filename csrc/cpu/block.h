// tt_block on the CPU, forward and backward: what the CUDA engine's launchers do (csrc/plan.h), for float32 in host memory.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lora_edge::cpu {

// Why this engine does not take the problem, or null.
const char* refusal(const Problem&);

struct Scratch {
  int64_t packed_forward, packed_backward;  // bytes
};
Scratch scratch(const Problem&);

// In every map the channels are neighbours; h is float32. `suffix` is contracted.
void block_forward(const Problem&, const ForwardCall&, int threads);
void block_backward(const Problem&, const BackwardCall&, int threads);

}  // namespace lora_edge::cpu
