// Adds partial sums (tiles, rows, columns) over the tiles, deterministically, and scales them; see sum_partials.cuh.
//
// Tiles: a block of 8 warps computes 32 neighbouring sums; lanes run along them, and warp w adds the tiles w, w + 8, ...
// Floor: 4 * tiles * rows * columns bytes / bandwidth.
#include "sum_partials.cuh"

#include "elements.cuh"

namespace lora_edge {
namespace {

constexpr int kSums = 32;
constexpr int kWarps = 8;

struct SumPartials {
  const float* partial;
  void *dcore, *dbias;
  const void* row_factor;
  Type core_type, bias_type, factor_type;
  float scale;
  int32_t tiles, rank, sums;  // sums = rows * columns
  Divider columns;
};

KERNEL(kWarps * kSums, 4) void sum_tiles(const GRID_CONSTANT SumPartials p) {
  const Shared<float> of_warps = shared_array<float>(0, kWarps * kSums);
  const int i = block_index() * kSums + lane_index();
  const bool ok = inside(i < p.sums);
  float sum = 0.0f;
  for (int tile = warp_index(); tile < p.tiles; tile += kWarps) {
    sum += load_global(p.partial, static_cast<int64_t>(tile) * p.sums + i, ok);
  }
  of_warps.store(thread_index(), sum);
  sync_block();
  if (!inside(warp_index() == 0) || !ok) return;
  UNROLL
  for (int warp = 1; warp < kWarps; ++warp) sum += of_warps.load(warp * kSums + lane_index());
  const int row = p.columns.quotient(i), column = i - row * p.columns.d;
  if (p.row_factor != nullptr) sum *= load_as_float(p.row_factor, p.factor_type, row);
  if (column < p.rank) {
    store_float(p.dcore, p.core_type, static_cast<int64_t>(row) * p.rank + column, p.scale * sum);
  } else {
    store_float(p.dbias, p.bias_type, row, sum);
  }
}

}  // namespace

const char* sum_partials(const float* partial, int32_t tiles, int32_t rows, int32_t rank, void* dcore, Type core_type,
                         float scale, void* dbias, Type bias_type, const void* row_factor, Type factor_type, Stream stream) {
  const int32_t columns = rank + (dbias != nullptr ? 1 : 0);
  if (columns == 0) return nullptr;
  SumPartials p{};
  p.partial = partial, p.dcore = dcore, p.dbias = dbias, p.row_factor = row_factor;
  p.core_type = core_type, p.bias_type = bias_type, p.factor_type = factor_type, p.scale = scale;
  p.tiles = tiles, p.rank = rank, p.sums = rows * columns, p.columns = Divider(columns);
  return launch(sum_tiles, quotient_up(p.sums, kSums), kWarps * kSums, kWarps * kSums * 4, stream, p);
}

}  // namespace lora_edge
