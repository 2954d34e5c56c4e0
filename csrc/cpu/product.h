// One convolution as matrix products: rows are positions, columns the panels of a packed kernel. A depthwise convolution is a
// sum of rows, for all columns at once.
//
// direct      the rows are read in place; a table has the offset of each row's source for each tap ("indirect convolution":
//             Dukhan, The Indirect Convolution Algorithm, 2019). Only the table depends on stride, dilation and padding.
// filtered    if neighbouring taps read neighbouring positions, n outputs of three taps need n + 2 products instead of 3 n, and
//             of two taps n + 1 (Winograd's minimal filtering F(n, 3), here along the width); n is 2 or 4. For two outputs
//               y0 = m0 + m1 + m2    m0 = (x0 - x2) g0    m1 = (x1 + x2) (g0 + g1 + g2) / 2
//               y1 = m1 - m2 - m3    m3 = (x1 - x3) g2    m2 = (x2 - x1) (g0 - g1 + g2) / 2
//             from the polynomials' values at 0, 1, -1 and infinity; four outputs also use 1/2 and -2. A longer kernel is a sum
//             of such pieces, which share m0 .. m3 or m5: eight taps need 5.5 products per output, or 4.25. Three rows of taps
//             over an even number of lines are filtered along the height too: two lines need four products of a line instead
//             of six.
// Relative error against float64: 0.2e-6 direct, 0.3e-6 with two outputs, also along both axes, 0.5e-6 with four (sums are
// short whatever the fan-in, see kChunk); four along both axes would give 0.7e-6.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"
#include "kernels_of.h"

namespace lora_edge::cpu {

// The taps that a product runs over, in each axis: source position u * step + origin - j * advance for tap j < taps.
struct Reach {
  int rows_h, rows_w;  // positions u
  int step_h, step_w, origin_h, origin_w;
  int advance_h, advance_w, taps_h, taps_w;

  int rows() const { return rows_h * rows_w; }
  int taps() const { return taps_h * taps_w; }
};

Reach forward_reach(const Conv&);

// The map that is read: its size in positions, its channels, and strides in elements with contiguous channels.
struct Source {
  int height, width, channels;
  Strides strides;
};

// One piece of a packed operand: a sum of factor * tap over some taps of the kernel.
struct Term {
  int taps[9];
  float factors[9];
  int count;
};

// Places of a transformed line, one per tile: the first is at position `first` of a piece's reach, the others one tile apart.
struct Run {
  int first, count, base;  // base: number of places in the runs before
};

// Terms of k that are summed in registers before the sum is added to the total, which keeps rounding small. Products shared by
// n outputs use an n-th of it, because their errors weigh more.
constexpr int kChunk = 256;

// The product of some rows with one panel over all of k; sets `tap` .. `adds` of the argument itself.
void multiply(GemmRows, int chunk);

// Floats per row of the panel that holds `column`.
int width_at(int column, int columns);

// For `samples` samples, the offset of each row's source for each tap; -1 outside.
std::vector<int32_t> offsets_of(const Reach&, int samples, const Source&);

class Product {
 public:
  // `samples`: the most samples per `run`. Depthwise: as many columns as the source has channels.
  Product(const Reach&, const Source&, int columns, int samples, bool is_depthwise = false);

  int64_t packed_floats() const;
  // Columns per `run`.
  int width() const;
  int groups() const { return static_cast<int>(terms_.size()); }
  // Lines that are processed together: `line` and `line_end` are multiples of it.
  int together() const { return tall_ ? 2 : 1; }
  const std::vector<Term>& terms(int group) const { return terms_[group]; }
  // Where a column of a term and channel is packed.
  float* packed_at(float* packed, int group, int term, int channel, int column) const;

  // Prepares what the lines (sample, u_h) in [line, line_end) read; the same thread calls it before `run`. Source lines up to
  // `done` are kept from earlier strips of the same samples; it is advanced.
  const float* prepare(const float* source, int line, int line_end, int& done) const;
  // Writes the columns from `column` on, for the lines in [line, line_end), to sums (rows, width).
  void run(const float* prepared, const float* packed, int column, int line, int line_end, float* sums) const;
  // Floats of the maps that `prepare` makes for `samples` samples; they must fit the 32-bit offsets.
  int64_t farthest(int samples) const {
    if (!filtered_) return 0;
    return (tall_ ? int64_t{2} * reach.rows_h : source_.height) * samples * line_floats();
  }
  // Floats that `sums` must have for `lines` lines.
  int64_t sums_floats(int lines) const;

  const Reach reach;

 private:
  void filter(int samples);
  int source_line(int line, bool last) const;
  void transform(const float* source, const float* other, float sign, float* to) const;
  const float* prepare_lines(const float* source, int line, int line_end, int& done) const;
  const float* prepare_pairs(const float* source, int line, int line_end) const;
  void run_group(int group, const float* source, const float* packed, int column, int row, int rows, float* sums) const;
  int64_t group_floats(int group) const;
  int64_t line_floats() const { return int64_t{outputs_ + 2} * places_ * source_.channels; }  // of a transformed line

  Source source_;
  int columns_;
  bool depthwise_, filtered_, tall_;  // filtered along the width; along the height as well
  int outputs_ = 1, tiles_ = 0;       // filtered: outputs of a tile along the width, tiles of a line
  std::vector<Run> runs_;             // of a transformed line
  int places_ = 0;                    // in all runs together
  std::vector<std::vector<Term>> terms_;       // by group
  std::vector<std::vector<int32_t>> offsets_;  // (row, term) by group
};

}  // namespace lora_edge::cpu
