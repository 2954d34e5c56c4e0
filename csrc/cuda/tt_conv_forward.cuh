// The forward kernels of tt_conv and tt_block. See tt_conv_forward.cu.
#pragma once

#include "../plan.h"
#include "../problem.h"

namespace lora_edge {

// `call.packed` must hold the composed kernel as Packing::forward.
const char* conv_forward(const Problem&, const ForwardCall&, Stream);

}  // namespace lora_edge
