// The interface of the inner loops, which the drivers call for this processor's instruction set. kernels.h implements them.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lora_edge::cpu {

constexpr int kTileRows = 6;  // rows per tile of gemm_rows, which writes its sums in whole tiles

// sums[row][column] (+)= sum over taps and channels of source[offsets[row][tap] + channel] * packed[tap][channel][column].
// A negative offset is a row of zeros.
struct GemmRows {
  const float *source, *zeros, *packed;
  const int32_t* offsets;
  float* sums;  // (rows, panel)
  int rows, taps, channels, vectors;
  int tap, tap_end, channel, channel_end;  // the part of k to sum over
  bool adds;
};

// Transforms a line for tiles of `outputs` (2 or 4) outputs along the width: tile t reads the outputs + 2 positions from
// first + outputs * t on, zeros outside of the line, and writes one row of channels to each of outputs + 2 maps, `apart` floats
// apart. The line is source + sign * other, either of which may be null; `stride`: from one position's channels to the next.
struct FilterLine {
  const float *source, *other;
  float sign;
  float* to;
  int64_t stride, apart;
  int outputs, width, channels, first, tiles;
};

// Computes `rows` outputs of a line from the products of its tiles, `apart` floats apart; or, if `tall`, two lines by two
// outputs from sixteen products: a along the height and b along the width is number 4 a + b. In rows of a panel.
struct Combine {
  const float* m;
  int64_t apart;
  float* sums;
  int outputs, rows;
  bool tall;
};

// to[i] = sum over k of factors[k] * from[taps[k]][i], i < count, from (tap, pitch); for `channels` channels, a step apart.
struct CombineTaps {
  const float* from;
  const int* taps;
  const float* factors;
  float* to;
  int terms, pitch, count, channels, from_step, to_step;
};

// to (columns, lanes) = from (lanes, columns), rows `pitch` floats apart. Columns are rounded up to a multiple of the lanes.
struct Transpose {
  const float* from;
  float* to;
  int64_t pitch;
  int columns;
};

// y = act(sums + shift + residual_scale * residual), and bits set where the slope is 1, for `columns` channels of each row.
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

// sums[row][c] = sum over taps of source[offsets[row][tap] + c] * packed[tap][c]; `channels` is a multiple of 8.
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

// out = a * (weight + scale * sum over q of core[q] * suffix[q]) for `count` elements of one output; suffix rows are `apart`.
struct ComposeRow {
  const float *weight, *core, *suffix;
  float* out;
  int64_t count, apart;
  int rank;
  float scale, a;
};

// to[i] = from[index[i]], or 0 where the index is negative.
struct GatherRow {
  const float* from;
  const int32_t* index;
  float* to;
  int count;
};

struct Kernels {
  int lanes, panel;  // floats per vector; most columns of gemm_rows
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
