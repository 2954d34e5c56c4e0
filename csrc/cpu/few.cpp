#include "few.h"

#include <algorithm>
#include <vector>

#include "composed.h"
#include "memory.h"
#include "threads.h"
#include "tiles.h"

namespace lora_edge::cpu {
namespace {

constexpr int kFewPositions = 128;     // with more, filtering saves more than packing the kernel costs
constexpr int kOutputsTogether = 24;   // forward: whole tiles of rows and whole bytes of bits
constexpr int kColumnsTogether = 128;  // backward

int taps_of(const Conv& c) { return c.kernel_h * c.kernel_w; }
int positions_of(const Conv& c) { return c.batch * c.out_h * c.out_w; }
int input_positions_of(const Conv& c) { return c.batch * c.in_h * c.in_w; }

// For each tap and output position, the input position, numbered over the batch; -1 outside.
std::vector<int32_t> inputs_of(const Conv& c) {
  const Strides counted{int64_t{c.in_h} * c.in_w, 0, c.in_w, 1};
  const std::vector<int32_t> by_position = offsets_of(forward_reach(c), c.batch, {c.in_h, c.in_w, c.channels, counted});
  const int taps = taps_of(c), positions = positions_of(c);
  std::vector<int32_t> by_tap(static_cast<size_t>(taps) * positions);
  for (int i = 0; i < positions; ++i)
    for (int t = 0; t < taps; ++t) {
      by_tap[static_cast<size_t>(t) * positions + i] = by_position[static_cast<size_t>(i) * taps + t];
    }
  return by_tap;
}

// The product of some rows with one panel over all of k.
void multiply_panel(const float* source, const int32_t* offsets, const float* panel, int width, int rows, int k, float* sums) {
  GemmRows g{};
  g.source = source, g.zeros = zeros(k), g.packed = panel, g.offsets = offsets, g.sums = sums;
  g.rows = rows, g.taps = 1, g.channels = k, g.vectors = width / kernels_here().lanes;
  multiply(g, kChunk);
}

// Offsets of `rows` rows, `apart` elements apart.
std::vector<int32_t> rows_at(int rows, int64_t apart) {
  std::vector<int32_t> table(static_cast<size_t>(rows));
  for (int row = 0; row < rows; ++row) table[static_cast<size_t>(row)] = static_cast<int32_t>(row * apart);
  return table;
}

// Packs x^T (I K, P) in panels of positions.
void pack_maps(const Conv& c, const ForwardCall& call, int threads) {
  const std::vector<int32_t> inputs = inputs_of(c);
  const std::vector<int32_t> x_at = places_of(c.batch, c.in_h, c.in_w, 0, 0, 1, 1, call.x_strides);
  const int taps = taps_of(c), positions = positions_of(c), panel = kernels_here().panel;
  const int64_t k = int64_t{c.channels} * taps;
  parallel_for(threads, c.channels, [&](int channel) {
    float* line = kept<float, Keep::composed>(x_at.size());
    for (size_t i = 0; i < x_at.size(); ++i) line[i] = floats(call.x)[x_at[i] + channel];
    for (int first = 0; first < positions; first += panel) {
      const int width = width_at(first, positions), count = std::min(panel, positions - first);
      float* to = floats(call.packed) + first * k + int64_t{channel} * taps * width;
      for (int t = 0; t < taps; ++t, to += width) {
        kernels_here().gather_row({line, inputs.data() + static_cast<int64_t>(t) * positions + first, to, count});
        std::fill(to + count, to + width, 0.0f);
      }
    }
  });
}

}  // namespace

bool has_few_positions(const Conv& c) {
  return !is_depthwise(c) && positions_of(c) <= kFewPositions && input_positions_of(c) <= 4 * kFewPositions;
}

int64_t few_packed_floats(const Conv& c) {
  return int64_t{c.channels} * taps_of(c) * up(positions_of(c), kernels_here().lanes);
}

void few_forward(const Problem& p, const ForwardCall& call, const float* shift, int threads) {
  const Conv& c = p.conv;
  const Composed kernel(p, call);
  const int positions = positions_of(c), panel = kernels_here().panel;
  const int64_t k = kernel.columns;
  const std::vector<int32_t> y_at = places_of(c.batch, c.out_h, c.out_w, 0, 0, 1, 1, call.y_strides);
  const std::vector<int32_t> residual_at = places_of(c.batch, c.out_h, c.out_w, 0, 0, 1, 1, call.residual_strides);
  const std::vector<int32_t> rows = rows_at(kOutputsTogether, k), suffix_rows = rows_at(c.rank, k);
  pack_maps(c, call, threads);

  // multiplies `count` rows of `source` with every panel and writes the transposed sums to `to`
  auto each_panel = [&](const float* source, const std::vector<int32_t>& offsets, int count, float* to, int pitch) {
    float* sums = kept<float, Keep::sums>(static_cast<size_t>(up(count, kTileRows) * panel));
    for (int first = 0; first < positions; first += panel) {
      const float* maps = floats(call.packed) + first * k;
      multiply_panel(source, offsets.data(), maps, width_at(first, positions), count, static_cast<int>(k), sums);
      for (int i = first; i < std::min(first + panel, positions); ++i)
        for (int row = 0; row < count; ++row) to[int64_t{i} * pitch + row] = sums[row * panel + i - first];
    }
  };
  const int blocks = (c.outputs + kOutputsTogether - 1) / kOutputsTogether;
  parallel_for(threads, blocks + (call.h == nullptr ? 0 : 1), [&](int block) {
    if (block == blocks) return each_panel(floats(call.suffix), suffix_rows, c.rank, floats(call.h), c.rank);
    const int first = block * kOutputsTogether, count = std::min(kOutputsTogether, c.outputs - first);
    float* composed = kept<float, Keep::composed>(static_cast<size_t>(kOutputsTogether * k));
    for (int o = 0; o < count; ++o) kernel.row(first + o, composed + o * k);
    float* done = kept<float, Keep::masked>(static_cast<size_t>(positions) * kOutputsTogether);
    each_panel(composed, rows, count, done, kOutputsTogether);
    FinishRows f{};
    f.sums = done, f.rows = positions, f.pitch = kOutputsTogether, f.columns = count;
    set_epilogue(f, p, call, shift, floats(call.residual), static_cast<uint8_t*>(call.bits), first);
    f.y = floats(call.y) + first, f.y_at = y_at.data(), f.residual_at = residual_at.data();
    kernels_here().finish_rows(f);
  });
}

void few_input_gradient(const Problem& p, const BackwardCall& call, const float* dz, int threads) {
  const Conv& c = p.conv;
  const Composed kernel(p, call);
  const int positions = positions_of(c), taps = taps_of(c), panel = kernels_here().panel, lanes = kernels_here().lanes;
  const std::vector<int32_t> inputs = inputs_of(c), rows = rows_at(positions, c.outputs);
  const std::vector<int32_t> dx_at = places_of(c.batch, c.in_h, c.in_w, 0, 0, 1, 1, call.dx_strides);
  const int together = std::clamp(kColumnsTogether / taps, 1, std::min(kColumnsTogether, c.channels));
  parallel_for(threads, (c.channels + together - 1) / together, [&](int block) {
    const int first = block * together, channels = std::min(together, c.channels - first), columns = channels * taps;
    const size_t pitch = static_cast<size_t>(up(columns, lanes));
    float* packed = kept<float, Keep::composed>(pitch * static_cast<size_t>(c.outputs));
    for (int column = 0; column < columns; column += panel) {
      const int width = width_at(column, columns), count = std::min(panel, columns - column);
      float* to = packed + int64_t{column} * c.outputs;
      for (int o = 0; o < c.outputs; ++o, to += width) {
        kernel.row(o, int64_t{first} * taps + column, count, to);
        std::fill(to + count, to + width, 0.0f);
      }
    }
    float* sums = kept<float, Keep::sums>(static_cast<size_t>(up(positions, kTileRows) * panel));
    float* gathered = kept<float, Keep::masked>(dx_at.size() * static_cast<size_t>(channels));
    std::fill(gathered, gathered + dx_at.size() * static_cast<size_t>(channels), 0.0f);
    for (int column = 0; column < columns; column += panel) {
      const float* columns_of = packed + int64_t{column} * c.outputs;
      multiply_panel(dz, rows.data(), columns_of, width_at(column, columns), positions, c.outputs, sums);
      for (int j = column; j < std::min(column + panel, columns); ++j) {
        const int32_t* to = inputs.data() + static_cast<int64_t>(j % taps) * positions;
        for (int i = 0; i < positions; ++i) {
          if (to[i] >= 0) gathered[int64_t{to[i]} * channels + j / taps] += sums[int64_t{i} * panel + j - column];
        }
      }
    }
    for (size_t i = 0; i < dx_at.size(); ++i) {
      std::copy_n(gathered + i * static_cast<size_t>(channels), channels, floats(call.dx) + dx_at[i] + first);
    }
  });
}

}  // namespace lora_edge::cpu
