#include "pack.h"

#include <algorithm>

#include "../packing.h"
#include "memory.h"
#include "threads.h"

namespace lora_edge::cpu {
namespace {

Reach backward_reach(const Conv& c, const PackedLayout& layout, int h, int w) {
  const Taps &taps_h = layout.taps_h[h], &taps_w = layout.taps_w[w];
  const int rows_h = std::max(0, (c.in_h - h + c.stride_h - 1) / c.stride_h);
  const int rows_w = std::max(0, (c.in_w - w + c.stride_w - 1) / c.stride_w);
  return {rows_h, rows_w, 1, 1, taps_h.origin, taps_w.origin, taps_h.advance, taps_w.advance, taps_h.count, taps_w.count};
}

// `tap_of(t)` is the kernel's tap for the product's tap t.
template <class TapOf>
void pack_depthwise(const Problem& p, const Composed& kernel, int taps, const TapOf& tap_of, float* packed) {
  const Conv& c = p.conv;
  float* row = kept<float, Keep::composed>(static_cast<size_t>(c.kernel_h) * c.kernel_w);
  for (int o = 0; o < c.outputs; ++o) {
    kernel.row(o, row);
    for (int t = 0; t < taps; ++t) packed[t * c.outputs + o] = row[tap_of(t)];
  }
}

int same_tap(int tap) { return tap; }

// to (channels, to_step) = the term's sum of rows of `from` (channels, tap, pitch); `tap_of` gives the row of a product's tap.
template <class TapOf>
void combine(const Term& term, float* to, const float* from, const TapOf& tap_of, int pitch, int count, int channels,
             int from_step, int to_step) {
  int rows[9];
  for (int k = 0; k < term.count; ++k) rows[k] = tap_of(term.taps[k]);
  kernels_here().combine_taps({from, rows, term.factors, to, term.count, pitch, count, channels, from_step, to_step});
}

constexpr int kChannels = 8;  // channels whose taps are packed at a time, from the L1 cache

}  // namespace

std::vector<Phase> phases_of(const Conv& c, int samples) {
  const PackedLayout layout = packed_layout(c, Packing::backward, 4);
  std::vector<Phase> phases;
  int64_t base = 0;
  for (int h = 0; h < c.stride_h; ++h)
    for (int w = 0; w < c.stride_w; ++w) {
      const Reach reach = backward_reach(c, layout, h, w);
      if (reach.rows() == 0) continue;
      const Taps &taps_h = layout.taps_h[h], &taps_w = layout.taps_w[w];
      std::vector<int> taps;
      for (int i = 0; i < taps_h.count; ++i)
        for (int j = 0; j < taps_w.count; ++j) {
          taps.push_back((taps_h.first + taps_h.step * i) * c.kernel_w + taps_w.first + taps_w.step * j);
        }
      const Source dy{c.out_h, c.out_w, c.outputs, dense_outputs(c)};
      phases.push_back({h, w, Product(reach, dy, c.channels, samples, is_depthwise(c)), taps, base});
      base += phases.back().product.packed_floats();
    }
  return phases;
}

// Packs a vector of outputs at a time, so that lines are written whole.
void pack_forward(const Problem& p, const ForwardCall& call, const Product& product, int threads) {
  const Conv& c = p.conv;
  const Composed kernel(p, call);
  const int taps = c.kernel_h * c.kernel_w, lanes = kernels_here().lanes;
  if (is_depthwise(c)) return pack_depthwise(p, kernel, taps, same_tap, floats(call.packed));
  const int64_t row = up(c.channels * taps, 16) + 16;  // not a power of two, whose rows would share a few cache sets
  parallel_for(threads, (c.outputs + lanes - 1) / lanes, [&](int block) {
    const int first = block * lanes, count = std::min(lanes, c.outputs - first);
    float* rows = kept<float, Keep::composed>(static_cast<size_t>(row * lanes));
    std::fill(rows + count * row, rows + lanes * row, 0.0f);
    for (int o = 0; o < count; ++o) kernel.row(first + o, rows + o * row);
    struct Stream {
      const Term* term;
      float* to;
    };
    std::vector<Stream> streams;
    for (int group = 0; group < product.groups(); ++group) {
      const std::vector<Term>& terms = product.terms(group);
      for (size_t t = 0; t < terms.size(); ++t) {
        streams.push_back({&terms[t], product.packed_at(floats(call.packed), group, static_cast<int>(t), 0, first)});
      }
    }
    const int step = width_at(first, c.outputs);
    float* by_tap = kept<float, Keep::taps>(static_cast<size_t>(up(kChannels * taps, lanes)) * lanes);
    for (int i = 0; i < c.channels; i += kChannels) {
      const int channels = std::min(kChannels, c.channels - i);
      kernels_here().transpose({rows + int64_t{i} * taps, by_tap, row, channels * taps});
      for (Stream& stream : streams) {
        combine(*stream.term, stream.to, by_tap, same_tap, lanes, lanes, channels, taps * lanes, step);
        stream.to += int64_t{channels} * step;
      }
    }
  });
}

void pack_backward(const Problem& p, const BackwardCall& call, const std::vector<Phase>& phases, int threads) {
  const Conv& c = p.conv;
  const Composed kernel(p, call);
  const int taps = c.kernel_h * c.kernel_w, lanes = kernels_here().lanes;
  auto tap_of = [](const Phase& phase) { return [&phase](int tap) { return phase.kernel_taps[static_cast<size_t>(tap)]; }; };
  if (is_depthwise(c)) {
    for (const Phase& phase : phases) {
      pack_depthwise(p, kernel, phase.product.reach.taps(), tap_of(phase), floats(call.packed) + phase.base);
    }
    return;
  }
  const int64_t row = int64_t{up(c.channels, lanes)} * taps, apart = int64_t{up(taps, lanes)} * lanes;
  parallel_for(threads, (c.outputs + kChannels - 1) / kChannels, [&](int block) {
    const int output = block * kChannels, count = std::min(kChannels, c.outputs - output);
    float* rows = kept<float, Keep::composed>(static_cast<size_t>(row * kChannels + lanes));
    for (int o = 0; o < count; ++o) {
      kernel.row(output + o, rows + o * row);
      std::fill(rows + o * row + int64_t{c.channels} * taps, rows + (o + 1) * row, 0.0f);
    }
    float* by_tap = kept<float, Keep::taps>(static_cast<size_t>(apart * kChannels));
    for (int first = 0; first < c.channels; first += lanes) {
      for (int o = 0; o < count; ++o) {
        kernels_here().transpose({rows + o * row + int64_t{first} * taps, by_tap + o * apart, taps, taps});
      }
      for (const Phase& phase : phases) {
        for (int group = 0; group < phase.product.groups(); ++group) {
          const std::vector<Term>& terms = phase.product.terms(group);
          for (size_t t = 0; t < terms.size(); ++t) {
            float* to = phase.product.packed_at(floats(call.packed) + phase.base, group, static_cast<int>(t), output, first);
            combine(terms[t], to, by_tap, tap_of(phase), lanes, lanes, count, static_cast<int>(apart),
                    width_at(first, c.channels));
          }
        }
      }
    }
  });
}

}  // namespace lora_edge::cpu
