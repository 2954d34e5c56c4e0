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

// For each place t: by_two[t] = x[p] - x[p + 2], sum[t] = x[p] + x[p + 1], by_one[t] = x[p + 1] - x[p], with p = first + t and
// zeros outside of the line.
struct FilterLine {
  const float* source;
  float *by_two, *sum, *by_one;
  int64_t stride;
  int width, channels, first, places;
};

// The same of four lines' differences by two (first and last), sum and difference by one: `to` (4, 3, places, channels). A null
// line is zeros.
struct FilterPair {
  const float* lines[4];
  float* to;
  int64_t stride;
  int width, channels, first, places;
};

// Outputs 2 u and 2 u + 1 of a line, `rows` of them, from the four products of pair u, which lie `apart`; or of two lines from
// their sixteen. In rows of a panel.
struct Combine {
  const float* m;
  int64_t apart;
  float* sums;
  int rows;
};

// to[i] = sum over k of factors[k] * from[taps[k]][i], from (tap, pitch).
struct CombineTaps {
  const float* from;
  const int* taps;
  const float* factors;
  float* to;
  int terms, pitch, count;
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
  void (*filter_pair)(const FilterPair&);
  void (*combine_line)(const Combine&);
  void (*combine_pair)(const Combine&);
  void (*combine_taps)(const CombineTaps&);
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
