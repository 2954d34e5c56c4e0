// The backward kernels of tt_conv and tt_block. See tt_conv_backward.cu.
#pragma once

#include "../plan.h"
#include "../problem.h"

namespace lora_edge {

// `call.packed` must hold a * W' as Packing::backward if dx is wanted.
const char* conv_backward(const Problem&, const BackwardCall&, Stream);

// Bytes of float32 scratch that the first stage of dcore and dbias needs.
int64_t conv_partial_bytes(const Problem&);

}  // namespace lora_edge
