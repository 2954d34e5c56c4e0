// Forward of a block. Channels are contiguous in every map. A convolution is a product (product.h), a depthwise one a sum of
// rows; few.h handles few positions. The batch is cut into units (cut.h). For each unit come
//   h, then for each panel of outputs the product, followed by residual, activation, bits and y
// Floor: the multiply-adds at oneDNN's rate for channels-last convolutions, less what filtering saves; one read of x, one write
// of y.
#include <algorithm>
#include <vector>

#include "block.h"
#include "few.h"
#include "pack.h"
#include "threads.h"
#include "tiles.h"

namespace lora_edge::cpu {
namespace {

// h of a unit. With one tap: a few dot products per row. With several: all taps at once, as columns of one product over the
// unit's input rows, then summed per position. (As extra outputs, h would fill a whole vector of columns per tap.)
struct Suffix {
  const Conv& conv;
  std::vector<float> packed;
  std::vector<int32_t> inputs;     // for each position and tap the input row, -1 outside; with one tap its offset
  std::vector<Product> every_row;  // one, if there are several taps

  Suffix(const Problem& p, const ForwardCall& call, const Reach& reach, const Source& source, int samples) : conv(p.conv) {
    const int taps = reach.taps(), rank = conv.rank, channels = conv.channels;
    const float* suffix = floats(call.suffix);
    if (taps == 1) {
      packed.assign(suffix, suffix + int64_t{rank} * channels);
      inputs = offsets_of(reach, samples, source);
      return;
    }
    const Reach every{conv.in_h, conv.in_w, 1, 1, 0, 0, 0, 0, 1, 1};
    every_row.emplace_back(every, source, taps * rank, samples);
    packed.assign(static_cast<size_t>(every_row[0].packed_floats()), 0.0f);
    for (int q = 0; q < rank; ++q)
      for (int i = 0; i < channels; ++i)
        for (int t = 0; t < taps; ++t) {
          *every_row[0].packed_at(packed.data(), 0, 0, i, t * rank + q) = suffix[(int64_t{q} * channels + i) * taps + t];
        }
    const Strides counted{int64_t{conv.in_h} * conv.in_w, 1, conv.in_w, 1};
    inputs = offsets_of(reach, samples, {conv.in_h, conv.in_w, channels, counted});
  }

  void run(const float* x, int samples, float* h) const {
    const int rows = samples * conv.out_h * conv.out_w, rank = conv.rank;
    if (every_row.empty()) {
      return kernels_here().dot_rows({x, zeros(conv.channels), packed.data(), inputs.data(), h, rows, conv.channels, rank});
    }
    const int lines = samples * conv.in_h, taps = conv.kernel_h * conv.kernel_w, panel = kernels_here().panel;
    float* z = kept<float, Keep::suffix>(static_cast<size_t>(every_row[0].sums_floats(lines)));
    std::fill(h, h + int64_t{rows} * rank, 0.0f);
    for (int first = 0; first < taps * rank; first += panel) {
      every_row[0].run(x, packed.data(), first, 0, lines, z);
      const int end = std::min(first + panel, taps * rank);
      for (int row = 0; row < rows; ++row) {
        float* sums = h + int64_t{row} * rank;
        for (int tap = first / rank; tap * rank < end; ++tap) {
          const int from = inputs[static_cast<size_t>(row) * taps + tap], column = tap * rank;
          if (from < 0) continue;
          const float* one = z + int64_t{from} * panel - first;
          for (int c = std::max(first, column); c < std::min(end, column + rank); ++c) sums[c - column] += one[c];
        }
      }
    }
  }
};

// The shift of each output of y: bias and affine shifts, with the scale already in the kernel.
std::vector<float> shift_of(const Conv& c, const ForwardCall& call) {
  std::vector<float> shift(static_cast<size_t>(c.outputs), 0.0f);
  for (int o = 0; o < c.outputs; ++o) {
    const float a = call.affine_scale == nullptr ? 1.0f : floats(call.affine_scale)[o];
    if (call.bias != nullptr) shift[o] += a * floats(call.bias)[o];
    if (call.affine_shift != nullptr) shift[o] += floats(call.affine_shift)[o];
    if (call.residual_shift != nullptr) shift[o] += floats(call.residual_shift)[o];
  }
  return shift;
}

}  // namespace

void block_forward(const Problem& p, const ForwardCall& call, int threads) {
  const Conv& c = p.conv;
  if (c.batch == 0) return;
  const std::vector<float> shift = shift_of(c, call);
  if (has_few_positions(c)) return few_forward(p, call, shift.data(), threads);
  const Cut cut(c.batch, c.out_h, c.out_w, threads);
  const Reach reach = forward_reach(c);
  const Source source{c.in_h, c.in_w, c.channels, call.x_strides};
  const Product product(reach, source, c.outputs, cut.samples, is_depthwise(c));
  // If y overwrites x, x must be read completely first: y waits in scratch, per unit, or as a whole if threads share units.
  const bool overwrites = call.y == call.x;
  std::vector<float> waiting(overwrites && cut.parts > 1 ? static_cast<size_t>(c.batch * call.y_strides.n) : 0);
  float* all_of_y = waiting.empty() ? floats(call.y) : waiting.data();
  const std::vector<int32_t> y_at = places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.y_strides);
  const std::vector<int32_t> residual_at = places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.residual_strides);
  std::vector<Suffix> suffix;  // one or none
  if (call.h != nullptr) suffix.emplace_back(p, call, reach, source, cut.samples);
  pack_forward(p, call, product, threads);
  const int octets = (c.outputs + 7) / 8, rows = reach.rows();
  parallel_for(threads, cut.units * cut.parts, [&](int i) {
    const int unit = i / cut.parts, part = i % cut.parts, samples = cut.samples_of(unit, c.batch);
    const int64_t sample = int64_t{unit} * cut.samples;
    const float* x = floats(call.x) + sample * call.x_strides.n;
    if (part == 0 && call.h != nullptr) suffix[0].run(x, samples, floats(call.h) + sample * rows * c.rank);
    float* y = all_of_y + sample * call.y_strides.n;
    const size_t y_floats = static_cast<size_t>(samples * call.y_strides.n);
    if (overwrites && waiting.empty()) y = kept<float, Keep::masked>(y_floats);
    const float* residual = plus(floats(call.residual), sample * call.residual_strides.n);
    uint8_t* bits = plus(static_cast<uint8_t*>(call.bits), sample * rows * octets);
    for_each_tile(cut, part, samples, product, x, floats(call.packed), c.outputs, [&](FinishRows& f, int64_t row, int first) {
      set_epilogue(f, p, call, shift.data(), residual, plus(bits, row * octets), first);
      f.y = y + first, f.y_at = y_at.data() + row, f.residual_at = residual_at.data() + row;
      kernels_here().finish_rows(f);
    });
    if (overwrites && waiting.empty()) std::copy_n(y, y_floats, floats(call.y) + sample * call.y_strides.n);
  });
  if (!waiting.empty()) std::copy(waiting.begin(), waiting.end(), floats(call.y));
}

}  // namespace lora_edge::cpu
