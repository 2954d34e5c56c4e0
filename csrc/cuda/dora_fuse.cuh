// The weight of DoRA, each row of W + scale * core * suffix brought to a given norm, and its gradients.
#pragma once

#include "../plan.h"
#include "../problem.h"

namespace lora_edge {

constexpr int32_t kMostDoraRank = 64;

const char* dora_forward(const Problem& problem, const DoraCall& call, Stream stream);
const char* dora_backward(const Problem& problem, const DoraBackwardCall& call, Stream stream);

}  // namespace lora_edge
