// mma.sync of a warp, with the fragment layouts of the PTX manual.
#pragma once

#include "scheduler.h"

namespace lora_edge::emulator {

// d += a b for the operands (MmaOperands) of 32 lanes. Products are exact, sums float32; tf32 operands lose their low 13 bits.
void multiply(Kind kind, void* const (&lanes)[32]);

}  // namespace lora_edge::emulator
