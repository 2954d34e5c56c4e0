// mma.sync of a warp, with the fragment layouts of the PTX manual.
#pragma once

#include "machine.h"

namespace lora_edge::host {

// d += a b for the 32 lanes' operands (MmaOperands). Products are exact, sums float32; tf32 operands lose their low 13 bits.
void multiply(Kind kind, void* const (&lanes)[32]);

}  // namespace lora_edge::host
