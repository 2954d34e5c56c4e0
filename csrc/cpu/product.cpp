#include "product.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "memory.h"

namespace lora_edge::cpu {
namespace {

// For each product of a tile of `outputs` outputs, the factors of its sum of taps (Tile in kernels.h has the rest). A piece of
// two taps has no third tap and no last product.
struct Filter {
  int outputs;
  float factors[6][3];
};

constexpr Filter kTwo{2, {{1.0f, 0.0f, 0.0f}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0.0f, 0.0f, 1.0f}}};
constexpr Filter kFour{4, {{1.0f, 0.0f, 0.0f},
                           {1 / 3.0f, 1 / 3.0f, 1 / 3.0f},
                           {-1 / 3.0f, 1 / 3.0f, -1 / 3.0f},
                           {-16 / 15.0f, -8 / 15.0f, -4 / 15.0f},
                           {1 / 15.0f, -2 / 15.0f, 4 / 15.0f},
                           {0.0f, 0.0f, 1.0f}}};

// Taps of an axis that are filtered together.
struct Piece {
  int at, size;
};

// Pieces of three taps, and of two where a single tap would remain.
std::vector<Piece> pieces_of(int taps) {
  std::vector<Piece> pieces;
  for (int at = 0; at < taps; at += pieces.back().size) pieces.push_back({at, taps - at == 2 || taps - at == 4 ? 2 : 3});
  return pieces;
}

// Products of a line in tiles of `outputs` outputs.
int products_of(const Reach& r, int outputs) {
  int products = 0;
  for (const Piece piece : pieces_of(r.taps_w)) products += outputs + piece.size - 1;
  return products * ((r.rows_w + outputs - 1) / outputs);
}

// The filter with fewer products, which is faster; but two outputs if the height is filtered too, because the errors multiply
// and with four outputs reach 1e-6 where a clamp leaves a small y of large sums.
const Filter& filter_of(const Reach& r, bool tall) {
  return !tall && products_of(r, 4) < products_of(r, 2) ? kFour : kTwo;
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

void multiply(GemmRows g, int chunk) {
  const int step = std::max(1, chunk / g.channels), parts = (g.channels + chunk - 1) / chunk;
  const int part = (g.channels + parts - 1) / parts;
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
    : reach(r), source_(source), columns_(columns), depthwise_(is_depthwise),
      filtered_(!is_depthwise && r.step_w == 1 && (r.advance_w == 1 || r.advance_w == -1) && r.taps_w > 1 && r.rows_w > 1),
      tall_(filtered_ && r.step_h == 1 && (r.advance_h == 1 || r.advance_h == -1) && r.taps_h == 3 && r.rows_h % 2 == 0) {
  if (filtered_) {
    filter(samples);
    return;
  }
  terms_.resize(1);
  for (int t = 0; t < r.taps(); ++t) terms_[0].push_back({{t}, {1.0f}, 1});
  offsets_.push_back(offsets_of(r, samples, source));
}

// Groups are the products of a tile: number a * (outputs + 2) + b is product a along the height and b along the width. A
// transformed line is (product along the width, place, channel); the lines are those of the source or, if tall, (pair, a).
void Product::filter(int samples) {
  const Reach& r = reach;
  const Filter& filter = filter_of(r, tall_);
  outputs_ = filter.outputs, tiles_ = (r.rows_w + outputs_ - 1) / outputs_;
  // taps in the order of the positions that they read
  auto tap = [&](int i, int j) {
    return (r.advance_h < 0 ? i : r.taps_h - 1 - i) * r.taps_w + (r.advance_w < 0 ? j : r.taps_w - 1 - j);
  };
  const int lowest_h = r.advance_h < 0 ? r.origin_h : r.origin_h - (r.taps_h - 1) * r.advance_h;
  const std::vector<Piece> pieces = pieces_of(r.taps_w);
  std::vector<int> run_of(static_cast<size_t>(outputs_), -1);
  for (const auto [at, size] : pieces) {
    int& run = run_of[static_cast<size_t>(at % outputs_)];
    if (run < 0) run = static_cast<int>(runs_.size()), runs_.push_back({at, 0, 0});
    runs_[static_cast<size_t>(run)].count = tiles_ + (at - runs_[static_cast<size_t>(run)].first) / outputs_;
  }
  for (Run& run : runs_) run.base = places_, places_ += run.count;
  const int products = outputs_ + 2, heights = tall_ ? 1 : r.taps_h;
  const int lines = tall_ ? samples * r.rows_h / 2 : samples * r.rows_h;
  struct Read {
    int height, place;
  };
  for (int a = 0; a < (tall_ ? 4 : 1); ++a)
    for (int b = 0; b < products; ++b) {
      std::vector<Term> terms;
      std::vector<Read> reads;
      for (int i = 0; i < heights; ++i)
        for (const auto [at, size] : pieces) {
          if (b == products - 1 && size == 2) continue;
          Term term{};
          for (int row = i; row < (tall_ ? 3 : i + 1); ++row)
            for (int j = 0; j < size; ++j) {
              const float factor = (tall_ ? kTwo.factors[a][row] : 1.0f) * filter.factors[b][j];
              if (factor == 0.0f) continue;
              term.taps[term.count] = tap(row, at + j);
              term.factors[term.count++] = factor;
            }
          terms.push_back(term);
          const Run& run = runs_[static_cast<size_t>(run_of[static_cast<size_t>(at % outputs_)])];
          reads.push_back({i, run.base + (at - run.first) / outputs_});
        }
      std::vector<int32_t> offsets;
      offsets.reserve(static_cast<size_t>(lines) * tiles_ * reads.size());
      for (int line = 0; line < lines; ++line)
        for (int tile = 0; tile < tiles_; ++tile)
          for (const Read& read : reads) {
            int from = line * 4 + a;
            if (!tall_) {
              const int h = line % r.rows_h * r.step_h + lowest_h + read.height * std::abs(r.advance_h);
              from = h < 0 || h >= source_.height ? -1 : line / r.rows_h * source_.height + h;
            }
            const int64_t at = from * line_floats() + int64_t{b * places_ + read.place + tile} * source_.channels;
            offsets.push_back(from < 0 ? -1 : static_cast<int32_t>(at));
          }
      terms_.push_back(std::move(terms)), offsets_.push_back(std::move(offsets));
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

// The first or last line of the source that a line reads, numbered over the samples.
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

// Transforms the line source + sign * other, either of which may be null, for its products along the width.
void Product::transform(const float* source, const float* other, float sign, float* to) const {
  const int first = reach.advance_w < 0 ? reach.origin_w : reach.origin_w - (reach.taps_w - 1);
  for (const Run& run : runs_) {
    kernels_here().filter_line({source, other, sign, to + int64_t{run.base} * source_.channels, source_.strides.w,
                                int64_t{places_} * source_.channels, outputs_, source_.width, source_.channels,
                                first + run.first, run.count});
  }
}

const float* Product::prepare_lines(const float* source, int line, int line_end, int& done) const {
  const int lines = (line_end - 1) / reach.rows_h * source_.height + source_.height;
  float* to = kept<float, Keep::transformed>(static_cast<size_t>(lines * line_floats()));
  const Strides& s = source_.strides;
  const int end = source_line(line_end - 1, true) + 1;
  for (int i = std::max(done, source_line(line, false)); i < end; ++i) {
    transform(source + i / source_.height * s.n + i % source_.height * s.h, nullptr, 0.0f, to + i * line_floats());
  }
  done = std::max(done, end);
  return to;
}

// Starts afresh for each strip, so that the maps stay in the cache; pairs have nothing in common.
const float* Product::prepare_pairs(const float* source, int line, int line_end) const {
  float* const maps = kept<float, Keep::transformed>(static_cast<size_t>((line_end - line) * 2 * line_floats()));
  float* to = maps;
  const Strides& s = source_.strides;
  const int lowest = reach.advance_h < 0 ? reach.origin_h : reach.origin_h - 2;
  // x0 - x2, x1 + x2, x2 - x1 and x1 - x3 of the four lines that a pair reads
  constexpr struct { int one, other; float sign; } kinds[4] = {{0, 2, -1.0f}, {1, 2, 1.0f}, {2, 1, -1.0f}, {1, 3, -1.0f}};
  for (; line < line_end; line += 2) {
    const int n = line / reach.rows_h, h = line % reach.rows_h + lowest;
    auto at = [&](int i) { return h + i < 0 || h + i >= source_.height ? nullptr : source + n * s.n + (h + i) * s.h; };
    for (const auto [one, other, sign] : kinds) {
      transform(at(one), at(other), sign, to);
      to += line_floats();
    }
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
  multiply(g, kChunk / outputs_);
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
  // lines are combined one at a time, or in pairs
  const int first = line / together(), count = line_end / together() - first, panel = kernels_here().panel;
  const int64_t apart = int64_t{up(count * tiles_, kTileRows)} * panel;
  float* m = kept<float, Keep::filtered>(static_cast<size_t>(groups() * apart));
  for (int group = 0; group < groups(); ++group) {
    run_group(group, prepared, packed, column, tall_ ? 0 : first * tiles_, count * tiles_, m + group * apart);
  }
  for (int i = 0; i < count; ++i) {
    kernels_here().combine_line({m + int64_t{i} * tiles_ * panel, apart, sums + int64_t{i} * together() * reach.rows_w * panel,
                                 outputs_, reach.rows_w, tall_});
  }
}

}  // namespace lora_edge::cpu
