// The second stage of every sum over positions or columns: adds partial sums, one per tile, in the order of the tiles.
#pragma once

#include "../plan.h"

namespace lora_edge {

// partial (tiles, rows, columns) float32, columns = rank + (dbias != null).
//   dcore[row, q] = scale * row_factor[row] * sum over tiles of partial[tile, row, q], q < rank
//   dbias[row]    =         row_factor[row] * sum over tiles of partial[tile, row, rank]
// Null row_factor: 1. Null dbias: not computed. Null dcore: rank is 0.
const char* sum_partials(const float* partial, int32_t tiles, int32_t rows, int32_t rank, void* dcore, Type core_type,
                         float scale, void* dbias, Type bias_type, const void* row_factor, Type factor_type, Stream stream);

}  // namespace lora_edge
