// A convolution with few positions over the whole batch. There the kernel is larger than the maps, so it is read once, in its
// own memory order, and the maps are packed instead.
//   forward    y^T (O, P) = W' x^T: columns are positions; x^T (I K, P) is packed, also for h
//   backward   dz W' (P, I K): rows are positions; the columns of W' of some input channels at a time stay in the cache. Each
//              tap's result is then added to the input position that the tap reads.
// Floor: one read of W, or the multiply-adds, which are not filtered.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lora_edge::cpu {

bool has_few_positions(const Conv&);

int64_t few_packed_floats(const Conv&);  // for forward

// `shift` (O) is added to the sums.
void few_forward(const Problem&, const ForwardCall&, const float* shift, int threads);

// dx from the masked dy (P, O).
void few_input_gradient(const Problem&, const BackwardCall&, const float* dz, int threads);

}  // namespace lora_edge::cpu
