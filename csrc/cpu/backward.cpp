// Backward of a block, unit by unit (cut.h): dy is masked into a scratch map of the unit, which also gives dcore, dbias and
// dresidual; dx follows from the scratch map, phase by phase (packing.h), or by few.h if there are few positions.
// Units are added in order, so the result does not depend on how they are spread over threads.
// Floor: the multiply-adds at oneDNN's rate for channels-last convolutions, less what filtering saves; one read of dy, one
// write of dx.
#include <algorithm>
#include <vector>

#include "block.h"
#include "few.h"
#include "pack.h"
#include "threads.h"
#include "tiles.h"

namespace lora_edge::cpu {
namespace {

// Backward of one call: its tables, and the two steps for each unit.
struct Backward {
  const Problem& p;
  const BackwardCall& call;
  const Conv& c;
  const Cut cut;
  const int rows, octets, rank, pitch, sums_floats;
  const std::vector<int32_t> dy_at, dresidual_at;
  const std::vector<Phase> phases;
  std::vector<std::vector<int32_t>> dx_at;  // by phase
  std::vector<float> sums;                  // per unit: dcore by rank, then dbias

  Backward(const Problem& problem, const BackwardCall& given, int threads)
      : p(problem), call(given), c(problem.conv), cut(c.batch, c.out_h, c.out_w, threads), rows(c.out_h * c.out_w),
        octets((c.outputs + 7) / 8), rank(call.dcore == nullptr ? 0 : c.rank), pitch(up(c.outputs, 8)),
        sums_floats((rank + (call.dbias == nullptr ? 0 : 1)) * pitch),
        dy_at(places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.dy_strides)),
        dresidual_at(places_of(cut.samples, c.out_h, c.out_w, 0, 0, 1, 1, call.dresidual_strides)),
        phases(call.dx == nullptr || has_few_positions(c) ? std::vector<Phase>{} : phases_of(c, cut.samples)),
        sums(static_cast<size_t>(cut.units) * sums_floats, 0.0f) {
    for (const Phase& phase : phases) {
      const Reach& r = phase.product.reach;
      dx_at.push_back(
          places_of(cut.samples, r.rows_h, r.rows_w, phase.h, phase.w, c.stride_h, c.stride_w, call.dx_strides));
    }
    if (!phases.empty()) pack_backward(p, call, phases, threads);
  }

  size_t unit_floats() const { return call.dx == nullptr ? 0 : static_cast<size_t>(cut.samples) * rows * c.outputs; }

  void mask(int unit, float* dz) {
    const int64_t sample = int64_t{unit} * cut.samples;
    MaskRows m{};
    m.dy = floats(call.dy) + sample * call.dy_strides.n, m.dy_at = dy_at.data();
    m.bits = call.bits == nullptr ? nullptr : static_cast<const uint8_t*>(call.bits) + sample * rows * octets;
    m.h = rank == 0 ? nullptr : floats(call.h) + sample * rows * rank;
    m.residual_scale = floats(call.residual_scale), m.dz = dz, m.keeps_dz = call.dx != nullptr;
    m.dresidual = call.dresidual == nullptr ? nullptr : floats(call.dresidual) + sample * call.dresidual_strides.n;
    m.dresidual_at = dresidual_at.data(), m.sums = sums.data() + int64_t{unit} * sums_floats;
    m.rows = cut.samples_of(unit, c.batch) * rows, m.channels = c.outputs, m.octets = octets;
    m.rank = rank, m.pitch = pitch, m.sums_bias = call.dbias != nullptr;
    kernels_here().mask_rows(m);
  }

  void input_gradient(int unit, int part, const float* dz) const {
    float* dx = plus(floats(call.dx), int64_t{unit} * cut.samples * call.dx_strides.n);
    for (size_t i = 0; i < phases.size(); ++i) {
      const float* packed = floats(call.packed) + phases[i].base;
      const int samples = cut.samples_of(unit, c.batch);
      for_each_tile(cut, part, samples, phases[i].product, dz, packed, c.channels, [&](FinishRows& f, int64_t row, int first) {
        f.y = dx + first, f.y_at = dx_at[i].data() + row;
        kernels_here().finish_rows(f);
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
  if (p.conv.batch == 0) {
    if (call.dcore != nullptr) std::fill_n(floats(call.dcore), int64_t{p.conv.outputs} * p.conv.rank, 0.0f);
    if (call.dbias != nullptr) std::fill_n(floats(call.dbias), p.conv.outputs, 0.0f);
    return;
  }
  Backward b(p, call, threads);
  const bool few = has_few_positions(p.conv) && call.dx != nullptr;
  if (b.cut.parts == 1 && !few) {
    parallel_for(threads, b.cut.units, [&](int unit) {
      float* dz = kept<float, Keep::masked>(b.unit_floats());
      b.mask(unit, dz);
      b.input_gradient(unit, 0, dz);
    });
  } else {  // dy is masked first, because several threads share a unit or all units are processed together
    std::vector<float> dz(b.unit_floats() * b.cut.units);
    auto of = [&](int unit) { return dz.data() + b.unit_floats() * static_cast<size_t>(unit); };
    parallel_for(threads, b.cut.units, [&](int unit) { b.mask(unit, of(unit)); });
    if (few) {
      few_input_gradient(p, call, dz.data(), threads);
    } else {
      parallel_for(threads, b.cut.units * b.cut.parts, [&](int i) {
        const int unit = i / b.cut.parts;
        b.input_gradient(unit, i % b.cut.parts, of(unit));
      });
    }
  }
  b.write_sums();
}

}  // namespace lora_edge::cpu
