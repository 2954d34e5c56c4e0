#include "product.h"

#include <algorithm>

#include "memory.h"

namespace lora_edge::cpu {
namespace {

constexpr int kChunk = 256;  // of k that is summed in registers: what follows is added to it, which keeps rounding small
constexpr int kKind[4] = {0, 1, 2, 0};   // m0 .. m3 read differences by two, sums, differences by one, differences by two,
constexpr int kShift[4] = {0, 1, 1, 1};  // from this place of the piece

// Taps of an axis that are filtered together.
struct Piece {
  int at, size;
};

// Pieces of three, and of two where a single tap would be left.
std::vector<Piece> pieces_of(int taps) {
  std::vector<Piece> pieces;
  for (int at = 0; at < taps; at += pieces.back().size) pieces.push_back({at, taps - at == 2 || taps - at == 4 ? 2 : 3});
  return pieces;
}

}  // namespace

Reach forward_reach(const Conv& c) {
  return {c.out_h, c.out_w, c.stride_h, c.stride_w, -c.pad_h, -c.pad_w, -c.dilation_h, -c.dilation_w, c.kernel_h, c.kernel_w};
}

std::vector<int32_t> offsets_of(const Reach& r, int samples, const Source& source) {
  const Strides& s = source.strides;
  std::vector<int32_t> table(static_cast<size_t>(samples * r.rows()) * r.taps(), -1);
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

void multiply(GemmRows g) {
  const int step = std::max(1, kChunk / g.channels), part = std::min(kChunk, g.channels);
  g.adds = false;
  for (g.tap = 0; g.tap < g.taps; g.tap = g.tap_end) {
    g.tap_end = std::min(g.tap + step, g.taps);
    for (g.channel = 0; g.channel < g.channels; g.channel = g.channel_end) {
      g.channel_end = std::min(g.channel + part, g.channels);
      kernels_here().gemm_rows(g);
      g.adds = true;
    }
  }
}

int width_at(int column, int columns) {
  const Kernels& k = kernels_here();
  return std::min(k.panel, up(columns - column / k.panel * k.panel, k.lanes));
}

Product::Product(const Reach& r, const Source& source, int columns, int samples, bool is_depthwise)
    : reach(r), source_(source), columns_(columns), pairs_((r.rows_w + 1) / 2), first_(0), places_(0), depthwise_(is_depthwise),
      filtered_(!is_depthwise && r.step_w == 1 && (r.advance_w == 1 || r.advance_w == -1) && r.taps_w > 1 && r.rows_w > 1),
      tall_(filtered_ && r.step_h == 1 && (r.advance_h == 1 || r.advance_h == -1) && r.taps_h == 3 && r.rows_h % 2 == 0) {
  if (filtered_) {
    filter_width(samples);
    if (tall_) filter_height(samples);
    return;
  }
  for (int t = 0; t < r.taps(); ++t) terms_[0].push_back({{t}, {1.0f}, 1});
  offsets_[0] = offsets_of(r, samples, source);
}

// Groups are m0 .. m3.
void Product::filter_width(int samples) {
  const Reach& r = reach;
  const std::vector<Piece> pieces = pieces_of(r.taps_w);  // of the taps in the order of the positions that they meet
  auto tap = [&](int i, int j) { return i * r.taps_w + (r.advance_w < 0 ? j : r.taps_w - 1 - j); };
  first_ = r.advance_w < 0 ? r.origin_w : r.origin_w - (r.taps_w - 1);
  places_ = 2 * (pairs_ - 1) + pieces.back().at + 2;
  const int64_t line = int64_t{places_} * source_.channels;
  apart_ = int64_t{samples} * source_.height * line;
  for (int group = 0; group < 4; ++group) {
    std::vector<int> starts, heights;
    for (int i = 0; i < r.taps_h; ++i)
      for (const auto [at, size] : pieces) {
        const int t0 = tap(i, at), t1 = tap(i, at + 1), t2 = size == 3 ? tap(i, at + 2) : 0;
        if (group == 3 && size == 2) continue;
        if (group == 0) terms_[0].push_back({{t0}, {1.0f}, 1});
        if (group == 1) terms_[1].push_back({{t0, t1, t2}, {0.5f, 0.5f, 0.5f}, size});
        if (group == 2) terms_[2].push_back({{t0, t1, t2}, {0.5f, -0.5f, 0.5f}, size});
        if (group == 3) terms_[3].push_back({{t2}, {1.0f}, 1});
        starts.push_back(at), heights.push_back(i);
      }
    const size_t terms = starts.size();
    offsets_[group].assign(static_cast<size_t>(samples * r.rows_h * pairs_) * terms, -1);
    size_t at = 0;
    for (int n = 0; n < samples; ++n)
      for (int u = 0; u < r.rows_h; ++u)
        for (int v = 0; v < pairs_; ++v)
          for (size_t t = 0; t < terms; ++t, ++at) {
            const int h = u * r.step_h + r.origin_h - heights[t] * r.advance_h;
            if (h < 0 || h >= source_.height) continue;
            const int64_t place = 2 * v + starts[t] + kShift[group];
            offsets_[group][at] = static_cast<int32_t>(kKind[group] * apart_ + (int64_t{n} * source_.height + h) * line +
                                                       place * source_.channels);
          }
  }
}

// Group 4 a + b is m_a along the height of m_b along the width, whose terms stand by rows of taps. The maps are then
// transformed by pairs of lines: (pair, a, kind along the width, place, channel).
void Product::filter_height(int samples) {
  const Reach& r = reach;
  const int64_t line = int64_t{places_} * source_.channels;
  const int pairs_of_lines = samples * r.rows_h / 2;
  std::vector<Term> flat[4];
  std::vector<int32_t> starts[4];  // of each term of a row: what it reads for the first pair
  for (int b = 0; b < 4; ++b) {
    flat[b].swap(terms_[b]);
    for (const auto [at, size] : pieces_of(r.taps_w)) {
      if (b == 3 && size == 2) continue;
      starts[b].push_back(static_cast<int32_t>(kKind[b] * line + int64_t{at + kShift[b]} * source_.channels));
    }
  }
  constexpr float factors[4][3] = {{1.0f, 0.0f, 0.0f}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0.0f, 0.0f, 1.0f}};
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b) {
      std::vector<Term>& terms = terms_[4 * a + b];
      terms.clear();
      const size_t count = flat[b].size() / 3;
      for (size_t t = 0; t < count; ++t) {
        Term whole{};
        for (int row = 0; row < 3; ++row) {
          const int i = r.advance_h < 0 ? row : 2 - row;  // in the order of the lines that they meet
          const Term& one = flat[b][i * count + t];
          for (int k = 0; k < one.count && factors[a][row] != 0.0f; ++k) {
            whole.taps[whole.count] = one.taps[k];
            whole.factors[whole.count++] = factors[a][row] * one.factors[k];
          }
        }
        terms.push_back(whole);
      }
      std::vector<int32_t>& offsets = offsets_[4 * a + b];
      offsets.assign(static_cast<size_t>(pairs_of_lines * pairs_) * count, -1);
      size_t at = 0;
      for (int pair = 0; pair < pairs_of_lines; ++pair)
        for (int v = 0; v < pairs_; ++v)
          for (size_t t = 0; t < count; ++t, ++at) {
            offsets[at] = static_cast<int32_t>((int64_t{pair} * 4 + a) * 3 * line + 2 * v * source_.channels) + starts[b][t];
          }
    }
}

int Product::width() const { return depthwise_ ? columns_ : kernels_here().panel; }

int64_t Product::group_floats(int group) const {
  if (depthwise_) return int64_t{reach.taps()} * columns_;
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
  return packed + terms * source_.channels * panel + row * width_at(column, columns_) + column - panel;
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
  return tall_ ? prepare_pairs(source, line, line_end) : prepare_lines(source, line, line_end, done);
}

const float* Product::prepare_lines(const float* source, int line, int line_end, int& done) const {
  float* to = kept<float, Keep::transformed>(static_cast<size_t>(3 * apart_));
  const Strides& s = source_.strides;
  const int end = source_line(line_end - 1, true) + 1;
  for (int i = std::max(done, source_line(line, false)); i < end; ++i) {
    float* at = to + int64_t{i} * places_ * source_.channels;
    const float* from = source + i / source_.height * s.n + i % source_.height * s.h;
    kernels_here().filter_line({from, at, at + apart_, at + 2 * apart_, s.w, source_.width,
                                source_.channels, first_, places_});
  }
  done = std::max(done, end);
  return to;
}

// From the beginning for each strip: pairs have nothing in common, and so the maps stay in the cache.
const float* Product::prepare_pairs(const float* source, int line, int line_end) const {
  const int64_t pair_floats = int64_t{12} * places_ * source_.channels;
  float* const maps = kept<float, Keep::transformed>(static_cast<size_t>((line_end - line) / 2 * pair_floats));
  float* to = maps;
  const Strides& s = source_.strides;
  const int lowest = reach.advance_h < 0 ? reach.origin_h : reach.origin_h - 2;
  for (; line < line_end; line += 2, to += pair_floats) {
    const int n = line / reach.rows_h, h = line % reach.rows_h + lowest;
    FilterPair f{};
    for (int i = 0; i < 4; ++i) {
      if (h + i >= 0 && h + i < source_.height) f.lines[i] = source + n * s.n + (h + i) * s.h;
    }
    f.to = to, f.stride = s.w;
    f.width = source_.width, f.channels = source_.channels, f.first = first_, f.places = places_;
    kernels_here().filter_pair(f);
  }
  return maps;
}

void Product::run_group(int group, const float* source, const float* packed, int column, int row, int rows, float* sums) const {
  const int terms = static_cast<int>(terms_[group].size()), channels = source_.channels;
  GemmRows g{};
  g.source = source, g.zeros = zeros(channels), g.sums = sums;
  g.packed = packed_at(const_cast<float*>(packed), group, 0, 0, column);
  g.offsets = offsets_[group].data() + int64_t{row} * terms;
  g.rows = rows, g.taps = terms, g.channels = channels, g.vectors = width_at(column, columns_) / kernels_here().lanes;
  if (terms == 0) return void(std::fill(sums, sums + int64_t{up(rows, kTileRows)} * kernels_here().panel, 0.0f));
  multiply(g);
}

int64_t Product::sums_floats(int lines) const { return int64_t{up(lines * reach.rows_w, kTileRows)} * width(); }

void Product::run(const float* prepared, const float* packed, int column, int line, int line_end, float* sums) const {
  if (depthwise_) {
    const int rows = (line_end - line) * reach.rows_w, taps = reach.taps();
    const int32_t* offsets = offsets_[0].data() + int64_t{line} * reach.rows_w * taps;
    return kernels_here().depthwise_rows({prepared, packed, offsets, sums, rows, taps, columns_});
  }
  if (!filtered_) {
    return run_group(0, prepared, packed, column, line * reach.rows_w, (line_end - line) * reach.rows_w, sums);
  }
  // what is combined at a time: a line, or a pair of lines
  const int first = line / together(), count = line_end / together() - first, panel = kernels_here().panel;
  const int64_t apart = int64_t{up(count * pairs_, kTileRows)} * panel;
  float* m = kept<float, Keep::filtered>(static_cast<size_t>(groups() * apart));
  for (int group = 0; group < groups(); ++group) {
    run_group(group, prepared, packed, column, tall_ ? 0 : first * pairs_, count * pairs_, m + group * apart);
  }
  for (int i = 0; i < count; ++i) {
    const float* from = m + int64_t{i} * pairs_ * panel;
    float* to = sums + int64_t{i} * together() * reach.rows_w * panel;
    tall_ ? kernels_here().combine_pair({from, apart, to, reach.rows_w})
          : kernels_here().combine_line({from, apart, to, reach.rows_w});
  }
}

}  // namespace lora_edge::cpu
