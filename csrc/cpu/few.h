// A convolution at few positions, all of the batch together: there the kernel is larger than the maps, so it is read once, as
// it lies in memory, and the maps are packed instead.
//   forward    y^T (O, P) = W' x^T: columns are positions; x^T (I K, P) is packed, for h too
//   backward   dz W' (P, I K): rows are positions; some input channels' columns of W' at a time stay in the cache. Each tap's
//              result is then added to the position that it came from.
// Floor: one read of W, or the multiply-adds, which are not filtered.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lora_edge::cpu {

bool has_few_positions(const Conv&);

int64_t few_packed_floats(const Conv&);  // of forward

// `shift` (O): what is added to the sums.
void few_forward(const Problem&, const ForwardCall&, const float* shift, int threads);

// dx, of the masked dy (P, O).
void few_input_gradient(const Problem&, const BackwardCall&, const float* dz, int threads);

}  // namespace lora_edge::cpu
