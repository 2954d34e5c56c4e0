// The launchers of the CUDA engine for one problem, which the module and the emulator's runner call. Implemented in plan.cu.
#pragma once

#include <cstdint>

#include "problem.h"

namespace lora_edge {

using Stream = void*;  // a cudaStream_t; ignored by the emulator

// Each launcher returns null, or why the launch failed. `refusal` must have accepted the problem before.
const char* tt_fuse_forward(const Problem&, const FuseCall&, Stream);
const char* tt_fuse_backward(const Problem&, const FuseBackwardCall&, Stream);
const char* dora_fuse_forward(const Problem&, const DoraCall&, Stream);
const char* dora_fuse_backward(const Problem&, const DoraBackwardCall&, Stream);
const char* tt_block_forward(const Problem&, const ForwardCall&, Stream);
const char* tt_block_backward(const Problem&, const BackwardCall&, Stream);

// Why the kernels do not support this problem, such as "stride (5, 1): the kernels support up to 4", or null. `op` is
// "tt_fuse", "dora_fuse" or "tt_block".
const char* refusal(const Problem&, const char* op);

struct Scratch {  // bytes; all but fuse_partial are 0 if tt_block is refused
  int64_t packed_forward, packed_backward, partial, fuse_partial;
  int64_t h, bits;
};
Scratch scratch(const Problem&);

}  // namespace lora_edge
