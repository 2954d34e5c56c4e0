// The inner loops as the drivers call them, for the instruction set that this machine has. kernels.h implements them.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lora_edge::cpu {

constexpr int kTileRows = 6;  // rows that gemm_rows does at a time; it writes its sums in whole tiles

// sums[row][column] (+)= sum over taps and channels of source[offsets[row][tap] + channel] * packed[tap][channel][column].
// A negative offset is a row of zeros.
struct GemmRows {
  const float *source, *zeros, *packed;
  const int32_t* offsets;
  float* sums;  // (rows, panel)
  int rows, taps, channels, vectors;
  int tap, tap_end, channel, channel_end;  // the part of k
  bool adds;
};

// The transforms of a line for tiles of `outputs` (2 or 4) outputs along the width: tile t reads the outputs + 2 positions from
// first + outputs * t on, zeros outside of the line, and has one row of channels in each of outputs + 2 maps, which lie `apart`.
// The line is source + sign * other, of which either may be null; `stride`: from one position's channels to the next one's.
struct FilterLine {
  const float *source, *other;
  float sign;
  float* to;
  int64_t stride, apart;
  int outputs, width, channels, first, tiles;
};

// `rows` outputs of a line from the products of its tiles, which lie `apart`; or, where `tall`, of two lines by two outputs from
// sixteen: product b along the width and a along the height is number 4 a + b. In rows of a panel.
struct Combine {
  const float* m;
  int64_t apart;
  float* sums;
  int outputs, rows;
  bool tall;
};

// to[i] = sum over k of factors[k] * from[taps[k]][i], i < count, from (tap, pitch); for some channels, each a step further.
struct CombineTaps {
  const float* from;
  const int* taps;
  const float* factors;
  float* to;
  int terms, pitch, count, channels, from_step, to_step;
};

// to (columns, lanes) = from (lanes, columns), rows `pitch` apart. Both are read and written up to a whole number of lanes of
// columns.
struct Transpose {
  const float* from;
  float* to;
  int64_t pitch;
  int columns;
};

// y = act(sums + shift + residual_scale * residual) and the bits where the slope is 1, for `columns` channels of each row.
struct FinishRows {
  const float* sums;
  float* y;
  const float *shift, *residual, *residual_scale;
  const int32_t *y_at, *residual_at;
  uint8_t* bits;
  int rows, pitch, columns, octets;
  Activation activation;
  float low, high;
};

// dz = dy where the bit is set, else 0; dresidual = residual_scale * dz; sums[q] += dz h[q], and sums[rank] += dz.
struct MaskRows {
  const float* dy;
  const int32_t* dy_at;
  const uint8_t* bits;
  const float *h, *residual_scale;
  float *dz, *dresidual, *sums;
  const int32_t* dresidual_at;
  int rows, channels, octets, rank, pitch;  // pitch: floats from one sum to the next, a multiple of 8
  bool keeps_dz, sums_bias;
};

// sums[row][c] = sum over taps of source[offsets[row][tap] + c] * packed[tap][c]; channels are a multiple of 8.
struct DepthwiseRows {
  const float *source, *packed;
  const int32_t* offsets;
  float* sums;
  int rows, taps, channels;
};

// out[row][q] = sum over channels of source[offsets[row] + c] * vectors[q][c].
struct DotRows {
  const float *source, *zeros, *vectors;
  const int32_t* offsets;
  float* out;
  int rows, channels, count;
};

// out = a * (weight + scale * sum over q of core[q] * suffix[q]), `count` elements of one output; `apart` from q to the next.
struct ComposeRow {
  const float *weight, *core, *suffix;
  float* out;
  int64_t count, apart;
  int rank;
  float scale, a;
};

// to[i] = from[index[i]], 0 where the index is negative.
struct GatherRow {
  const float* from;
  const int32_t* index;
  float* to;
  int count;
};

struct Kernels {
  int lanes, panel;  // floats of a vector; columns that gemm_rows does at most
  void (*gemm_rows)(const GemmRows&);
  void (*filter_line)(const FilterLine&);
  void (*combine_line)(const Combine&);
  void (*combine_taps)(const CombineTaps&);
  void (*transpose)(const Transpose&);
  void (*finish_rows)(const FinishRows&);
  void (*mask_rows)(const MaskRows&);
  void (*depthwise_rows)(const DepthwiseRows&);
  void (*dot_rows)(const DotRows&);
  void (*compose_row)(const ComposeRow&);
  void (*gather_row)(const GatherRow&);
};

const Kernels& kernels_here();
const char* instruction_set();

}  // namespace lora_edge::cpu
