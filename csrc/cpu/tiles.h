// From sums to finished maps, tile by tile; forward and backward both process a unit this way.
#pragma once

#include <algorithm>

#include "composed.h"
#include "cut.h"
#include "memory.h"
#include "product.h"

namespace lora_edge::cpu {

// Calls finish(f, row, first) for each tile of a part of a unit of `samples` samples: f has the sums of the rows from `row` of
// the unit on and the columns from `first` on.
template <class Finish>
void for_each_tile(const Cut& cut, int part, int samples, const Product& product, const float* source, const float* packed,
                   int columns, const Finish& finish) {
  const int width = product.width(), line_rows = product.reach.rows_w, panels = (columns + width - 1) / width;
  int done = 0;
  for_each_strip(cut, part, samples * product.reach.rows_h, line_rows, product.together(), panels,
                 [&](int line, int line_end, int panel, int panel_end) {
    float* sums = kept<float, Keep::sums>(static_cast<size_t>(product.sums_floats(line_end - line)));
    const float* prepared = product.prepare(source, line, line_end, done);
    for (int first = panel * width; first < std::min(panel_end * width, columns); first += width) {
      product.run(prepared, packed, first, line, line_end, sums);
      FinishRows f{};
      f.sums = sums, f.rows = (line_end - line) * line_rows, f.pitch = width, f.columns = std::min(width, columns - first);
      finish(f, int64_t{line} * line_rows, first);
    }
  });
}

// Sets the forward epilogue for the outputs from `first` on. Adds `shift` (O); `residual` and `bits` point to the first row.
inline void set_epilogue(FinishRows& f, const Problem& p, const ForwardCall& call, const float* shift, const float* residual,
                         uint8_t* bits, int first) {
  f.activation = p.activation, f.low = p.activation == Activation::clamp ? p.low : 0.0f, f.high = p.high;
  f.shift = shift + first;
  f.residual = plus(residual, first), f.residual_scale = plus(floats(call.residual_scale), first);
  f.bits = plus(bits, first / 8), f.octets = (p.conv.outputs + 7) / 8;
}

}  // namespace lora_edge::cpu
