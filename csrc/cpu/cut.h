// How the drivers cut a batch: into units of a few samples, some hundred rows that stay in a core's cache, and strips of lines.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../problem.h"

namespace lora_edge::cpu {

constexpr int kUnitRows = 240;

// The offset of each position (n, first + u * step) of a map.
inline std::vector<int32_t> places_of(int samples, int rows_h, int rows_w, int first_h, int first_w, int step_h, int step_w,
                               const Strides& s) {
  std::vector<int32_t> table;
  table.reserve(static_cast<size_t>(samples) * rows_h * rows_w);
  for (int n = 0; n < samples; ++n)
    for (int u = 0; u < rows_h; ++u)
      for (int v = 0; v < rows_w; ++v) {
        table.push_back(static_cast<int32_t>(n * s.n + (first_h + u * step_h) * s.h + (first_w + v * step_w) * s.w));
      }
  return table;
}

// Rows per unit. Fewer for maps of one line: their kernels are small enough to be read twice as often from the L2 cache, which
// they then share with the transformed maps.
inline int unit_rows(int rows_h) { return rows_h == 1 ? kUnitRows / 2 : kUnitRows; }

// Units of `samples` samples, each in `parts` that threads share: ranges of lines (rows of positions), or of panels if there
// are fewer lines than parts. Lines are processed in strips, which stay in the cache from the product to the finished map.
struct Cut {
  int samples, units, parts;

  Cut(int batch, int rows_h, int rows_w, int threads) {
    samples = std::clamp(unit_rows(rows_h) / std::max(1, rows_h * rows_w), 1, batch);
    units = (batch + samples - 1) / samples;
    parts = units >= threads ? 1 : (threads + units - 1) / units;
  }
  int samples_of(int unit, int batch) const { return std::min(samples, batch - unit * samples); }
};

// Calls work(line, line_end, panel, panel_end) for each strip of a part of `lines` lines of `width` rows. Lines are processed
// in sets of `together`.
template <class Work>
void for_each_strip(const Cut& cut, int part, int lines, int width, int together, int panels, const Work& work) {
  const int sets = lines / together, step = std::max(1, kUnitRows / std::max(1, width * together));
  const bool by_sets = sets >= cut.parts;
  auto from = [&](int of, int i) { return i * of / cut.parts; };
  const int panel = by_sets ? 0 : from(panels, part), panel_end = by_sets ? panels : from(panels, part + 1);
  const int end = by_sets ? from(sets, part + 1) : sets;
  if (panel == panel_end) return;
  for (int set = by_sets ? from(sets, part) : 0; set < end; set += step) {
    work(set * together, std::min(set + step, end) * together, panel, panel_end);
  }
}

}  // namespace lora_edge::cpu
