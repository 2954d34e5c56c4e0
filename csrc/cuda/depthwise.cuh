// tt_block of depthwise convolutions: I/g = 1, any O/g. Computes what ForwardCall and BackwardCall in problem.h describe;
// `packed` has the plain layout of packing.h in float32, `partial` has depthwise_partial_bytes.
#pragma once

#include "../plan.h"
#include "../problem.h"

namespace lora_edge {

const char* depthwise_forward(const Problem& problem, const ForwardCall& call, Stream stream);
const char* depthwise_backward(const Problem& problem, const BackwardCall& call, Stream stream);

int64_t depthwise_partial_bytes(const Problem& problem);

// The most shared memory that a thread block uses. 8 warps fit an SM up to kMostDepthwiseShared.
int64_t depthwise_shared_bytes(const Problem& problem);
constexpr int64_t kMostDepthwiseShared = 80 * 1024;

}  // namespace lora_edge
