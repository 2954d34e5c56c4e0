#include "product.h"

#include <algorithm>

#include "kernels_of.h"
#include "memory.h"

namespace lora_edge::cpu {
namespace {

constexpr int kChunk = 256;  // of k that is summed in registers: what follows is added to it, which keeps rounding small

}  // namespace

Reach forward_reach(const Conv& c) {
  return {c.out_h, c.out_w, c.stride_h, c.stride_w, -c.pad_h, -c.pad_w, -c.dilation_h, -c.dilation_w, c.kernel_h, c.kernel_w};
}

std::vector<int32_t> offsets_of(const Reach& r, int samples, const Source& source) {
  const Strides& s = source.strides;
  std::vector<int32_t> table(static_cast<size_t>(samples * r.rows() + kTileRows) * r.taps(), -1);
  size_t at = 0;
  for (int n = 0; n < samples; ++n)
    for (int u = 0; u < r.rows_h; ++u)
      for (int v = 0; v < r.rows_w; ++v)
        for (int i = 0; i < r.taps_h; ++i)
          for (int j = 0; j < r.taps_w; ++j, ++at) {
            const int h = u * r.step_h + r.origin_h - i * r.advance_h, w = v * r.step_w + r.origin_w - j * r.advance_w;
            const bool inside = h >= 0 && h < source.height && w >= 0 && w < source.width;
            if (inside) table[at] = static_cast<int32_t>(n * s.n + h * s.h + w * s.w);
          }
  return table;
}

Product::Product(const Reach& r, const Source& source, int columns, int samples)
    : reach(r), source_(source), columns_(columns), pairs_((r.rows_w + 1) / 2), first_(0), places_(0),
      filtered_(r.step_w == 1 && (r.advance_w == 1 || r.advance_w == -1) && r.taps_w > 1 && r.rows_w > 1) {
  if (!filtered_) {
    for (int t = 0; t < r.taps(); ++t) terms_[0].push_back({{t, 0, 0}, {1.0f, 0.0f, 0.0f}, 1});
    offsets_[0] = offsets_of(r, samples, source);
    return;
  }
  // Taps in the order of the positions that they meet, in pieces of three, and of two where a single one would be left.
  std::vector<int> begins;
  for (int left = r.taps_w, at = 0; left > 0;) {
    const int size = left == 2 || left == 4 ? 2 : 3;
    begins.push_back(at);
    at += size, left -= size;
  }
  begins.push_back(r.taps_w);
  auto tap = [&](int i, int j) { return i * r.taps_w + (r.advance_w < 0 ? j : r.taps_w - 1 - j); };
  first_ = r.advance_w < 0 ? r.origin_w : r.origin_w - (r.taps_w - 1);
  places_ = 2 * (pairs_ - 1) + begins[begins.size() - 2] + 2;
  constexpr int kind[4] = {0, 1, 2, 0}, shift[4] = {0, 1, 1, 1};  // of differences by two, sums, differences by one
  const int64_t line = int64_t{places_} * source.channels;
  apart_ = int64_t{samples} * source.height * line;
  for (int group = 0; group < 4; ++group) {
    std::vector<int> starts, heights;
    for (int i = 0; i < r.taps_h; ++i)
      for (size_t b = 0; b + 1 < begins.size(); ++b) {
        const int at = begins[b], size = begins[b + 1] - at;
        const int t0 = tap(i, at), t1 = tap(i, at + 1), t2 = size == 3 ? tap(i, at + 2) : 0;
        if (group == 3 && size == 2) continue;
        if (group == 0) terms_[0].push_back({{t0, 0, 0}, {1.0f, 0.0f, 0.0f}, 1});
        if (group == 1) terms_[1].push_back({{t0, t1, t2}, {0.5f, 0.5f, 0.5f}, size});
        if (group == 2) terms_[2].push_back({{t0, t1, t2}, {0.5f, -0.5f, 0.5f}, size});
        if (group == 3) terms_[3].push_back({{t2, 0, 0}, {1.0f, 0.0f, 0.0f}, 1});
        starts.push_back(at), heights.push_back(i);
      }
    const size_t terms = starts.size();
    offsets_[group].assign(static_cast<size_t>(samples * r.rows_h * pairs_ + kTileRows) * terms, -1);
    size_t at = 0;
    for (int n = 0; n < samples; ++n)
      for (int u = 0; u < r.rows_h; ++u)
        for (int v = 0; v < pairs_; ++v)
          for (size_t t = 0; t < terms; ++t, ++at) {
            const int h = u * r.step_h + r.origin_h - heights[t] * r.advance_h;
            if (h < 0 || h >= source.height) continue;
            const int64_t place = 2 * v + starts[t] + shift[group];
            offsets_[group][at] =
                static_cast<int32_t>(kind[group] * apart_ + (int64_t{n} * source.height + h) * line + place * source.channels);
          }
  }
}

int Product::width_of(int column) const {
  const Kernels& k = kernels_here();
  return std::min(k.panel, up(columns_ - column / k.panel * k.panel, k.lanes));
}

int64_t Product::group_floats(int group) const {
  return static_cast<int64_t>(terms_[group].size()) * source_.channels * up(columns_, kernels_here().lanes);
}

int64_t Product::packed_floats() const {
  int64_t floats = 0;
  for (int group = 0; group < groups(); ++group) floats += group_floats(group);
  return floats;
}

float* Product::packed_at(float* packed, int group, int term, int channel, int column) const {
  for (int before = 0; before < group; ++before) packed += group_floats(before);
  const int panel = column / kernels_here().panel * kernels_here().panel;
  const int64_t terms = static_cast<int64_t>(terms_[group].size());
  const int64_t row = int64_t{term} * source_.channels + channel;
  return packed + terms * source_.channels * panel + row * width_of(column) + column - panel;
}

// The first or the last line of the source, counted over samples, that a line reads.
int Product::source_line(int line, bool last) const {
  const int n = line / reach.rows_h, from = line % reach.rows_h * reach.step_h + reach.origin_h;
  const int to = from - (reach.taps_h - 1) * reach.advance_h;
  const int h = last ? std::max(from, to) : std::min(from, to);
  return n * source_.height + std::clamp(h, 0, source_.height - 1);
}

const float* Product::prepare(const float* source, int line, int line_end, int& done) const {
  if (!filtered_) return source;
  float* to = kept<float, Keep::transformed>(static_cast<size_t>(3 * apart_));
  const Strides& s = source_.strides;
  const int end = source_line(line_end - 1, true) + 1;
  for (int i = std::max(done, source_line(line, false)); i < end; ++i) {
    float* at = to + int64_t{i} * places_ * source_.channels;
    const float* from = source + i / source_.height * s.n + i % source_.height * s.h;
    kernels_here().filter_line({from, zeros(source_.channels), at, at + apart_, at + 2 * apart_, s.w, source_.width,
                                source_.channels, first_, places_});
  }
  done = std::max(done, end);
  return to;
}

void Product::run_group(int group, const float* source, const float* packed, int column, int row, int rows, float* sums) const {
  const int terms = static_cast<int>(terms_[group].size()), channels = source_.channels;
  GemmRows g{};
  g.source = source, g.zeros = zeros(channels), g.sums = sums;
  g.packed = packed_at(const_cast<float*>(packed), group, 0, 0, column);
  g.offsets = offsets_[group].data() + int64_t{row} * terms;
  g.rows = rows, g.taps = terms, g.channels = channels, g.vectors = width_of(column) / kernels_here().lanes;
  if (terms == 0) return void(std::fill(sums, sums + int64_t{up(rows, kTileRows)} * kernels_here().panel, 0.0f));
  const int step = std::max(1, kChunk / channels), part = std::min(kChunk, channels);
  for (g.tap = 0; g.tap < terms; g.tap = g.tap_end) {
    g.tap_end = std::min(g.tap + step, terms);
    for (g.channel = 0; g.channel < channels; g.channel = g.channel_end) {
      g.channel_end = std::min(g.channel + part, channels);
      kernels_here().gemm_rows(g);
      g.adds = true;
    }
  }
}

int64_t Product::sums_floats(int lines) const { return int64_t{up(lines * reach.rows_w, kTileRows)} * kernels_here().panel; }

void Product::run(const float* prepared, const float* packed, int column, int line, int line_end, float* sums) const {
  if (!filtered_) {
    return run_group(0, prepared, packed, column, line * reach.rows_w, (line_end - line) * reach.rows_w, sums);
  }
  const int lines = line_end - line, panel = kernels_here().panel;
  const int64_t apart = int64_t{up(lines * pairs_, kTileRows)} * panel;
  float* m = kept<float, Keep::filtered>(static_cast<size_t>(4 * apart));
  for (int group = 0; group < 4; ++group) {
    run_group(group, prepared, packed, column, line * pairs_, lines * pairs_, m + group * apart);
  }
  for (int i = 0; i < lines; ++i) {
    const float* from = m + int64_t{i} * pairs_ * panel;
    kernels_here().combine_line(
        {from, from + apart, from + 2 * apart, from + 3 * apart, sums + int64_t{i} * reach.rows_w * panel, reach.rows_w});
  }
}

}  // namespace lora_edge::cpu
