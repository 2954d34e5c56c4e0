// The drivers of the CPU engine. Channels are neighbours in every map; a convolution is a product (product.h), a depthwise
// one a sum of rows. The batch falls into units of a few samples, some hundred rows, which stay in a core's cache:
//   forward    h, then panel by panel of outputs the product, and y, residual, activation and bits as the panel is done
//   backward   dy is masked into a scratch map of the unit, dcore, dbias and dresidual on the way; then dx from there, phase by
//              phase (packing.h)
// Units are added in order: the result does not depend on which thread took which.
// Floor: what ANCHORS calls the channels-last rate, less what filtering saves; one read of x or dy, one write of y or dx.
#include "block.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../packing.h"
#include "kernels_of.h"
#include "memory.h"
#include "product.h"
#include "threads.h"

namespace lora_edge::cpu {
namespace {

constexpr int kUnitRows = 240;

bool is_depthwise(const Conv& c) { return c.groups > 1; }

Reach forward_reach(const Conv& c) {
  return {c.out_h, c.out_w, c.stride_h, c.stride_w, -c.pad_h, -c.pad_w, -c.dilation_h, -c.dilation_w, c.kernel_h, c.kernel_w};
}

Reach backward_reach(const Conv& c, const PackedLayout& layout, int h, int w) {
  const Taps &taps_h = layout.taps_h[h], &taps_w = layout.taps_w[w];
  const int rows_h = std::max(0, (c.in_h - h + c.stride_h - 1) / c.stride_h);
  const int rows_w = std::max(0, (c.in_w - w + c.stride_w - 1) / c.stride_w);
  return {rows_h, rows_w, 1, 1, taps_h.origin, taps_w.origin, taps_h.advance, taps_w.advance, taps_h.count, taps_w.count};
}

// The offset of each position (n, first + u * step) of a map.
std::vector<int32_t> places_of(int samples, int rows_h, int rows_w, int first_h, int first_w, int step_h, int step_w,
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

// How the work is cut: units of `samples` samples, each in `parts` for threads to share: ranges of lines (the rows of a
// height of a map), or of panels where there are fewer lines than parts. Lines are taken in strips, which stay in the cache
// from the product to the finished map.
struct Cut {
  int samples, units, parts;

  Cut(int batch, int rows_a_sample, int threads) {
    samples = std::clamp(kUnitRows / std::max(1, rows_a_sample), 1, batch);
    units = (batch + samples - 1) / samples;
    parts = units >= threads ? 1 : (threads + units - 1) / units;
  }
  int samples_of(int unit, int batch) const { return std::min(samples, batch - unit * samples); }
};

// Calls work(line, line_end, panel, panel_end) for each strip of a part, of `lines` lines of `width` rows in all.
template <class Work>
void for_each_strip(const Cut& cut, int part, int lines, int width, int panels, const Work& work) {
  const int step = std::max(1, kUnitRows / std::max(1, width));
  const bool by_lines = lines >= cut.parts;
  auto from = [&](int of, int i) { return i * of / cut.parts; };
  const int panel = by_lines ? 0 : from(panels, part), panel_end = by_lines ? panels : from(panels, part + 1);
  const int end = by_lines ? from(lines, part + 1) : lines;
  if (panel == panel_end) return;
  for (int line = by_lines ? from(lines, part) : 0; line < end; line += step) {
    work(line, std::min(line + step, end), panel, panel_end);
  }
}

const float* floats(const void* p) { return static_cast<const float*>(p); }
float* floats(void* p) { return static_cast<float*>(p); }

// Row o of a * (W + s B S), (I/g, Kh, Kw), by value.
void compose(const Problem& p, const float* weight, const float* core, const float* suffix, const float* a, int o, float* out) {
  const Conv& c = p.conv;
  const int64_t count = int64_t{c.channels} / c.groups * c.kernel_h * c.kernel_w;
  const float one = 1.0f;
  kernels_here().compose_row({weight + o * count, core == nullptr ? nullptr : core + int64_t{o} * c.rank, suffix, out, count,
                              core == nullptr ? 0 : c.rank, p.scale, a == nullptr ? one : a[o]});
}

// to[i] = the term's sum at element i of `from`, whose elements are `apart`; `taps` gives the place of each tap of the product.
template <class Taps>
void combine(const Term& term, float* to, const float* from, const Taps& taps, int count, int64_t apart) {
  const float *a = from + taps(term.taps[0]), *b = from + taps(term.taps[1]), *c = from + taps(term.taps[2]);
  const float fa = term.factors[0], fb = term.factors[1], fc = term.factors[2];
  if (term.count == 1) {
    for (int i = 0; i < count; ++i) to[i] = fa * a[i * apart];
  } else if (term.count == 2) {
    for (int i = 0; i < count; ++i) to[i] = fa * a[i * apart] + fb * b[i * apart];
  } else {
    for (int i = 0; i < count; ++i) to[i] = fa * a[i * apart] + fb * b[i * apart] + fc * c[i * apart];
  }
}

// The kernel for forward: columns are outputs. Some outputs at a time, whose lines are then written whole.
void pack_forward(const Problem& p, const ForwardCall& call, const Product& product, int threads) {
  const Conv& c = p.conv;
  const int taps = c.kernel_h * c.kernel_w, lanes = kernels_here().lanes;
  const int64_t row = up(c.channels * taps, 16) + 16;  // not a power of two, whose rows would share a few places in the cache
  parallel_for(threads, (c.outputs + lanes - 1) / lanes, [&](int block) {
    const int first = block * lanes, count = std::min(lanes, c.outputs - first);
    float* rows = kept<float, Keep::composed>(static_cast<size_t>(row * lanes));
    std::fill(rows + count * row, rows + lanes * row, 0.0f);
    for (int o = 0; o < count; ++o) {
      float* to = rows + o * row;
      compose(p, floats(call.weight), floats(call.core), floats(call.suffix), floats(call.affine_scale), first + o, to);
    }
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
    const int step = product.width_of(first);
    for (int i = 0; i < c.channels; ++i) {  // all terms of a channel, while its taps are in the first cache
      const float* from = rows + int64_t{i} * taps;
      for (Stream& stream : streams) {
        combine(*stream.term, stream.to, from, [](int tap) { return tap; }, lanes, row);
        stream.to += step;
      }
    }
  });
}

// One phase of dx: which of its positions, and the product over dy that gives them.
struct Phase {
  int h, w;
  Product product;
  std::vector<int> kernel_taps;  // of each tap of the product
  int64_t base;                  // floats of `packed` before it
};

std::vector<Phase> phases_of(const Conv& c, int samples) {
  const PackedLayout layout = packed_layout(c, Packing::backward, 4);
  const int outputs = is_depthwise(c) ? 1 : c.outputs;
  const Strides dense{int64_t{c.out_h} * c.out_w * c.outputs, 1, int64_t{c.out_w} * c.outputs, c.outputs};
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
      phases.push_back({h, w, Product(reach, {c.out_h, c.out_w, outputs, dense}, c.channels, samples), taps, base});
      base += phases.back().product.packed_floats();
    }
  return phases;
}

// The kernel for backward: columns are inputs, channels outputs.
void pack_backward(const Problem& p, const BackwardCall& call, const std::vector<Phase>& phases, int threads) {
  const Conv& c = p.conv;
  const int taps = c.kernel_h * c.kernel_w, panel = kernels_here().panel, whole = up(c.channels, kernels_here().lanes);
  parallel_for(threads, c.outputs, [&](int o) {
    float* row = kept<float, Keep::composed>(static_cast<size_t>(c.channels) * taps);
    compose(p, floats(call.weight), floats(call.core), floats(call.suffix), floats(call.affine_scale), o, row);
    for (const Phase& phase : phases)
      for (int group = 0; group < phase.product.groups(); ++group) {
        const std::vector<Term>& terms = phase.product.terms(group);
        for (size_t t = 0; t < terms.size(); ++t)
          for (int first = 0; first < c.channels; first += panel) {
            float* to = phase.product.packed_at(floats(call.packed) + phase.base, group, static_cast<int>(t), o, first);
            const int count = std::min(panel, c.channels - first);
            std::fill(to + count, to + std::min(panel, whole - first), 0.0f);
            auto tap_of = [&](int tap) { return phase.kernel_taps[static_cast<size_t>(tap)]; };
            combine(terms[t], to, row + int64_t{first} * taps, tap_of, count, taps);
          }
      }
  });
}

// A depthwise kernel, (tap, channel), by the taps of forward or of one phase.
void pack_depthwise(const Problem& p, const void* weight, const void* a, const std::vector<int>& taps, float* packed) {
  const Conv& c = p.conv;
  float* row = kept<float, Keep::composed>(static_cast<size_t>(c.kernel_h) * c.kernel_w);
  for (int o = 0; o < c.outputs; ++o) {
    compose(p, floats(weight), nullptr, nullptr, floats(a), o, row);
    for (size_t t = 0; t < taps.size(); ++t) packed[t * c.outputs + o] = row[taps[t]];
  }
}

// h of a unit: at one tap a few dot products a row; else every tap's at once, as columns of one product over the unit's input
// rows, then added up for each position ("h" as extra outputs would fill a whole vector of columns a tap).
struct Suffix {
  const Conv& conv;
  std::vector<float> packed;
  std::vector<int32_t> inputs;     // for each position and tap the input row, -1 outside; or at one tap its offset
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
      for (int row = 0; row < rows; ++row)
        for (int column = first; column < end; ++column) {
          const int from = inputs[static_cast<size_t>(row) * taps + column / rank];
          if (from >= 0) h[int64_t{row} * rank + column % rank] += z[int64_t{from} * panel + column - first];
        }
    }
  }
};

// y's shift of each output: what is left of bias and affines once the scale is in the kernel.
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

const float* plus(const float* p, int64_t n) { return p == nullptr ? nullptr : p + n; }

}  // namespace

const char* refusal(const Problem& p) {
  const Conv& c = p.conv;
  for (const Type type : {p.type, p.weight_type, p.core_type, p.suffix_type, p.affine_type}) {
    if (type != Type::f32) return "16-bit tensors; the CPU engine takes float32";
  }
  if (c.groups > 1 && (c.groups != c.channels || c.outputs != c.channels || c.channels % 8 != 0)) {
    return "groups; the CPU engine takes one group, or depthwise kernels of a multiple of 8 channels";
  }
  if (c.groups > 1 && c.rank > 0) return "an adapted depthwise kernel; the CPU engine takes frozen ones";
  if (std::max(c.stride_h, c.stride_w) > kMostStride) return "a stride over 4; the CPU engine takes up to 4";
  return nullptr;
}

Scratch scratch(const Problem& p) {
  const Conv& c = p.conv;
  const Product forward(forward_reach(c), {c.in_h, c.in_w, c.channels / c.groups, {}}, c.outputs, 0);
  int64_t backward = 0;
  for (const Phase& phase : phases_of(c, 0)) backward += phase.product.packed_floats();
  return {forward.packed_floats() * 4, backward * 4};
}

void block_forward(const Problem& p, const ForwardCall& call, int threads) {
  const Conv& c = p.conv;
  const Kernels& k = kernels_here();
  const Cut cut(c.batch, c.out_h * c.out_w, threads);
  const Reach reach = forward_reach(c);
  const Source source{c.in_h, c.in_w, c.channels, call.x_strides};
  const Product product(reach, source, c.outputs, is_depthwise(c) ? 0 : cut.samples);
  const std::vector<int32_t> offsets = is_depthwise(c) ? offsets_of(reach, cut.samples, source) : std::vector<int32_t>{};
  const std::vector<int32_t> y_at = places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.y_strides);
  const std::vector<int32_t> residual_at = places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.residual_strides);
  const std::vector<float> shift = shift_of(c, call);
  std::vector<Suffix> suffix;  // one or none
  if (call.h != nullptr) suffix.emplace_back(p, call, reach, source, cut.samples);
  float* packed = floats(call.packed);
  if (is_depthwise(c)) {
    std::vector<int> taps(static_cast<size_t>(reach.taps()));
    std::iota(taps.begin(), taps.end(), 0);
    pack_depthwise(p, call.weight, call.affine_scale, taps, packed);
  } else {
    pack_forward(p, call, product, threads);
  }
  const int octets = (c.outputs + 7) / 8, rows = reach.rows(), width = is_depthwise(c) ? c.outputs : k.panel;
  parallel_for(threads, cut.units * cut.parts, [&](int i) {
    const int unit = i / cut.parts, part = i % cut.parts, samples = cut.samples_of(unit, c.batch);
    const int64_t sample = int64_t{unit} * cut.samples;
    const float* x = floats(call.x) + sample * call.x_strides.n;
    if (part == 0 && call.h != nullptr) suffix[0].run(x, samples, floats(call.h) + sample * rows * c.rank);
    int done = 0;
    const int panels = (c.outputs + width - 1) / width;
    for_each_strip(cut, part, samples * c.out_h, c.out_w, panels, [&](int line, int line_end, int panel, int panel_end) {
      const int64_t first_row = int64_t{line} * c.out_w;
      FinishRows f{};
      f.rows = (line_end - line) * c.out_w, f.pitch = width, f.octets = octets;
      f.activation = p.activation, f.low = p.activation == Activation::clamp ? p.low : 0.0f, f.high = p.high;
      f.y_at = y_at.data() + first_row, f.residual_at = residual_at.data() + first_row;
      float* sums = kept<float, Keep::sums>(static_cast<size_t>(up(f.rows, kTileRows)) * width);
      f.sums = sums;
      const float* prepared = is_depthwise(c) ? x : product.prepare(x, line, line_end, done);
      for (int first = panel * width; first < std::min(panel_end * width, c.outputs); first += width) {
        if (is_depthwise(c)) {
          k.depthwise_rows({x, packed, offsets.data() + first_row * reach.taps(), sums, f.rows, reach.taps(), c.outputs});
        } else {
          product.run(prepared, packed, first, line, line_end, sums);
        }
        f.columns = std::min(width, c.outputs - first);
        f.y = floats(call.y) + sample * call.y_strides.n + first;
        f.shift = shift.data() + first;
        f.residual = call.residual == nullptr ? nullptr : floats(call.residual) + sample * call.residual_strides.n + first;
        f.residual_scale = plus(floats(call.residual_scale), first);
        uint8_t* bits = static_cast<uint8_t*>(call.bits);
        f.bits = bits == nullptr ? nullptr : bits + (sample * rows + first_row) * octets + first / 8;
        k.finish_rows(f);
      }
    });
  });
}

namespace {

// Backward of one call: its tables, and the two steps of each unit.
struct Backward {
  const Problem& p;
  const BackwardCall& call;
  const Conv& c;
  const Cut cut;
  const int rows, octets, rank, pitch, sums_floats;
  const Strides dz_strides;
  const std::vector<int32_t> dy_at, dresidual_at;
  const std::vector<Phase> phases;
  std::vector<std::vector<int32_t>> dx_at, depthwise_offsets;  // by phase
  std::vector<float> sums;                                     // of each unit: dcore by rank, then dbias

  Backward(const Problem& problem, const BackwardCall& given, int threads)
      : p(problem), call(given), c(problem.conv), cut(c.batch, c.out_h * c.out_w, threads), rows(c.out_h * c.out_w),
        octets((c.outputs + 7) / 8), rank(call.dcore == nullptr ? 0 : c.rank), pitch(up(c.outputs, 8)),
        sums_floats((rank + (call.dbias == nullptr ? 0 : 1)) * pitch),
        dz_strides{int64_t{rows} * c.outputs, 1, int64_t{c.out_w} * c.outputs, c.outputs},
        dy_at(places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.dy_strides)),
        dresidual_at(places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.dresidual_strides)),
        phases(call.dx == nullptr ? std::vector<Phase>{} : phases_of(c, is_depthwise(c) ? 0 : cut.samples)),
        sums(static_cast<size_t>(cut.units) * sums_floats, 0.0f) {
    for (const Phase& phase : phases) {
      const Reach& r = phase.product.reach;
      dx_at.push_back(
          places_of(cut.samples, r.rows_h, r.rows_w, phase.h, phase.w, c.stride_h, c.stride_w, call.dx_strides));
      if (is_depthwise(c)) {
        depthwise_offsets.push_back(offsets_of(r, cut.samples, {c.out_h, c.out_w, c.outputs, dz_strides}));
        pack_depthwise(p, call.weight, call.affine_scale, phase.kernel_taps, floats(call.packed) + phase.base);
      }
    }
    if (!is_depthwise(c) && !phases.empty()) pack_backward(p, call, phases, threads);
  }

  size_t unit_floats() const { return phases.empty() ? 0 : static_cast<size_t>(cut.samples) * rows * c.outputs; }

  void mask(int unit, float* dz) {
    const int64_t sample = int64_t{unit} * cut.samples;
    MaskRows m{};
    m.dy = floats(call.dy) + sample * call.dy_strides.n, m.dy_at = dy_at.data();
    m.bits = call.bits == nullptr ? nullptr : static_cast<const uint8_t*>(call.bits) + sample * rows * octets;
    m.h = rank == 0 ? nullptr : floats(call.h) + sample * rows * rank;
    m.residual_scale = floats(call.residual_scale), m.dz = dz, m.keeps_dz = !phases.empty();
    m.dresidual = call.dresidual == nullptr ? nullptr : floats(call.dresidual) + sample * call.dresidual_strides.n;
    m.dresidual_at = dresidual_at.data(), m.sums = sums.data() + int64_t{unit} * sums_floats;
    m.rows = cut.samples_of(unit, c.batch) * rows, m.channels = c.outputs, m.octets = octets;
    m.rank = rank, m.pitch = pitch, m.sums_bias = call.dbias != nullptr;
    kernels_here().mask_rows(m);
  }

  void input_gradient(int unit, int part, const float* dz) const {
    const int64_t sample = int64_t{unit} * cut.samples;
    const int samples = cut.samples_of(unit, c.batch), width = is_depthwise(c) ? c.channels : kernels_here().panel;
    for (size_t i = 0; i < phases.size(); ++i) {
      const Product& product = phases[i].product;
      const Reach& r = product.reach;
      const float* packed = floats(call.packed) + phases[i].base;
      int done = 0;
      const int panels = (c.channels + width - 1) / width;
      for_each_strip(cut, part, samples * r.rows_h, r.rows_w, panels, [&](int line, int line_end, int panel, int panel_end) {
        const int64_t first_row = int64_t{line} * r.rows_w;
        FinishRows f{};
        f.rows = (line_end - line) * r.rows_w, f.pitch = width, f.y_at = dx_at[i].data() + first_row;
        float* tile = kept<float, Keep::sums>(static_cast<size_t>(up(f.rows, kTileRows)) * width);
        f.sums = tile;
        const float* prepared = is_depthwise(c) ? dz : product.prepare(dz, line, line_end, done);
        for (int first = panel * width; first < std::min(panel_end * width, c.channels); first += width) {
          if (is_depthwise(c)) {
            const int32_t* from = depthwise_offsets[i].data() + first_row * r.taps();
            kernels_here().depthwise_rows({dz, packed, from, tile, f.rows, r.taps(), c.channels});
          } else {
            product.run(prepared, packed, first, line, line_end, tile);
          }
          f.columns = std::min(width, c.channels - first);
          f.y = floats(call.dx) + sample * call.dx_strides.n + first;
          kernels_here().finish_rows(f);
        }
      });
    }
  }

  void write_sums() {
    for (int unit = 1; unit < cut.units; ++unit)
      for (int i = 0; i < sums_floats; ++i) sums[i] += sums[static_cast<size_t>(unit) * sums_floats + i];
    for (int o = 0; o < c.outputs; ++o) {
      const float a = call.affine_scale == nullptr ? 1.0f : floats(call.affine_scale)[o];
      for (int q = 0; q < rank; ++q) {
        floats(call.dcore)[int64_t{o} * rank + q] = p.scale * a * sums[static_cast<size_t>(q) * pitch + o];
      }
      if (call.dbias != nullptr) floats(call.dbias)[o] = a * sums[static_cast<size_t>(rank) * pitch + o];
    }
  }
};

}  // namespace

void block_backward(const Problem& p, const BackwardCall& call, int threads) {
  Backward b(p, call, threads);
  if (b.cut.parts == 1) {
    parallel_for(threads, b.cut.units, [&](int unit) {
      float* dz = kept<float, Keep::masked>(b.unit_floats());
      b.mask(unit, dz);
      b.input_gradient(unit, 0, dz);
    });
  } else {  // few samples: several threads share a unit, whose dy is masked first
    std::vector<float> dz(b.unit_floats() * b.cut.units);
    auto of = [&](int unit) { return dz.data() + b.unit_floats() * static_cast<size_t>(unit); };
    parallel_for(threads, b.cut.units, [&](int unit) { b.mask(unit, of(unit)); });
    parallel_for(threads, b.cut.units * b.cut.parts, [&](int i) {
      const int unit = i / b.cut.parts;
      b.input_gradient(unit, i % b.cut.parts, of(unit));
    });
  }
  b.write_sums();
}

}  // namespace lora_edge::cpu
