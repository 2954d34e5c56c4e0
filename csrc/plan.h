// The launchers behind one problem: what the module and the host runner call. Implemented in plan.cu.
#pragma once

#include <cstdint>

#include "problem.h"

namespace lora_edge {

using Stream = void*;  // a cudaStream_t; ignored by the host layer

// Each launcher returns null, or a text that says why the launch failed. Sizes have been accepted by `refusal` before.
const char* tt_fuse_forward(const Problem&, const FuseCall&, Stream);
const char* tt_fuse_backward(const Problem&, const FuseBackwardCall&, Stream);
const char* tt_block_forward(const Problem&, const ForwardCall&, Stream);
const char* tt_block_backward(const Problem&, const BackwardCall&, Stream);

// Why the kernels do not take this problem, as "stride (5, 1): the kernels take up to 4", or null. `op` is "tt_fuse" or
// "tt_block".
const char* refusal(const Problem&, const char* op);

struct Scratch {  // bytes; all but fuse_partial are 0 where a block is refused
  int64_t packed_forward, packed_backward, partial, fuse_partial;
  int64_t h, bits;
};
Scratch scratch(const Problem&);

}  // namespace lora_edge
