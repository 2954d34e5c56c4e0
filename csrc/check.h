// The module's checks, before any kernel runs: a Problem when its plan is made, and the tensors of a call against it at every
// launch. Kernels count elements and positions in 32 bits and trust their arguments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "fields.h"

namespace lora_edge {

constexpr int64_t kMostCounted = INT32_MAX;   // elements of a tensor
constexpr int64_t kMostReach = 1 << 30;       // positions along an axis, including what padding, kernel and stride add

[[noreturn]] inline void refuse_value(const std::string& text) { throw std::invalid_argument(text); }

// The product of sizes, or -1 if it exceeds kMostCounted.
inline int64_t counted(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    product *= size;
    if (product > kMostCounted) return -1;
  }
  return product;
}

// Throws unless every tensor's element count and every position fits 32 bits and groups and cores are consistent.
inline void check_problem(const Problem& p) {
  const Conv& c = p.conv;
  const std::string plan = "Plan: ";
  if (c.channels % c.groups != 0 || c.outputs % c.groups != 0) {
    refuse_value(plan + "groups is " + std::to_string(c.groups) + "; it must divide channels (" + std::to_string(c.channels) +
                 ") and outputs (" + std::to_string(c.outputs) + ")");
  }
  if (p.cores == 1 || p.cores > 3) refuse_value(plan + "cores is " + std::to_string(p.cores) + "; it must be 0, 2 or 3");
  if ((p.cores >= 2 && p.bond2 == 0) || (p.cores == 3 && p.bond3 == 0)) {
    refuse_value(plan + "a bond is 0; the bonds between the cores must be at least 1");
  }
  if (p.cores == 2 && c.kernel_h != 1) {
    refuse_value(plan + "kernel_h is " + std::to_string(c.kernel_h) + "; with 2 cores, a 1-D kernel, it must be 1");
  }
  auto elements = [&](const char* name, const char* sizes, std::initializer_list<int64_t> values) {
    if (counted(values) >= 0) return;
    std::string given;
    for (const int64_t value : values) given += (given.empty() ? "" : " * ") + std::to_string(value);
    refuse_value(plan + name + " has " + sizes + " = " + given + " elements; it must have at most " +
                 std::to_string(kMostCounted));
  };
  const int64_t batch = std::max(1, c.batch), inputs = c.channels / c.groups, last = p.cores == 3 ? p.bond3 : 1;
  elements("x", "batch * channels * in_h * in_w", {batch, c.channels, c.in_h, c.in_w});
  elements("y", "batch * outputs * out_h * out_w", {batch, c.outputs, c.out_h, c.out_w});
  elements("weight", "outputs * channels / groups * kernel_h * kernel_w", {c.outputs, inputs, c.kernel_h, c.kernel_w});
  elements("core", "outputs * rank", {c.outputs, c.rank});
  elements("suffix", "rank * channels / groups * kernel_h * kernel_w", {c.rank, inputs, c.kernel_h, c.kernel_w});
  elements("h", "batch * out_h * out_w * groups * rank", {batch, c.out_h, c.out_w, c.groups, c.rank});
  if (p.cores >= 2) {
    elements("suffix", "rank * channels / groups * bond2", {c.rank, inputs, p.bond2});
    elements("core2", "bond2 * kernel * bond3", {p.bond2, p.cores == 3 ? c.kernel_h : c.kernel_w, last});
    elements("core3", "bond3 * kernel_w", {last, c.kernel_w});
  }
  auto reach = [&](const char* axis, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t positions = in + pad + dilation * kernel + stride * out;
    if (positions <= kMostReach) return;
    refuse_value(plan + "in + pad + dilation * kernel + stride * out along " + axis + " is " + std::to_string(positions) +
                 "; it must be at most " + std::to_string(kMostReach));
  };
  reach("h", c.in_h, c.out_h, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h);
  reach("w", c.in_w, c.out_w, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w);
}

// The address of a tensor of a call, and the number of bytes from there on.
struct Place {
  const char* name;
  int64_t address, bytes;
};

constexpr int kMostPlaces = 20;  // per call

// Checks the places of one call, in the order in which fields.h visits them.
class PlaceChecker {
 public:
  PlaceChecker(const char* op, const Place* places) : op_(op), next_(places) {}

  // A dense tensor of exactly `bytes` bytes. `wanted`: null is an error.
  void dense(int64_t bytes, int64_t element, bool wanted) { check(bytes, element, wanted, true); }
  // Memory of at least `bytes` bytes.
  void scratch(int64_t bytes, int64_t alignment, bool wanted) { check(bytes, alignment, wanted, false); }

  // A map (n, c, h, w) with its strides. `neighbours`: its channels must be contiguous.
  void map(int64_t n, int64_t c, int64_t h, int64_t w, const Strides& s, int64_t element, bool wanted, bool neighbours) {
    const Place& place = *next_;
    if (place.address != 0) {
      const struct {
        const char* axis;
        int64_t size, stride;
      } axes[] = {{"n", n, s.n}, {"c", c, s.c}, {"h", h, s.h}, {"w", w, s.w}};
      int64_t last = n == 0 ? -1 : 0;
      for (const auto& [axis, size, stride] : axes) {
        if (size <= 1) continue;  // its stride is never used
        if (stride < 0 || stride > kMostCounted) {
          refuse(place, std::string("stride along ") + axis, stride, "0.." + std::to_string(kMostCounted));
        }
        if (last >= 0) last += (size - 1) * stride;
        if (last > kMostCounted) refuse(place, "last element", last, "at most " + std::to_string(kMostCounted));
      }
      if (neighbours && c > 1 && s.c != 1) refuse(place, "stride along c", s.c, "1: the CPU engine needs contiguous channels");
      check((last + 1) * element, element, wanted, false);
    } else {
      check(0, element, wanted, false);
    }
  }

 private:
  void check(int64_t bytes, int64_t alignment, bool wanted, bool exactly) {
    const Place& place = *next_++;
    if (place.address == 0) {
      if (place.bytes != 0) refuse(place, "address", 0, "nonzero for a size of " + std::to_string(place.bytes) + " bytes");
      if (wanted && bytes != 0) refuse(place, "address", 0, "that of the tensor, which this plan needs");
      if (wanted && !exactly) refuse(place, "address", 0, "that of the tensor, which this plan needs");
      return;
    }
    if (place.address < 0 || place.address % alignment != 0) {
      refuse(place, "address", place.address, "positive and a multiple of " + std::to_string(alignment));
    }
    if (exactly ? place.bytes != bytes : place.bytes < bytes) {
      refuse(place, "size in bytes", place.bytes, (exactly ? "" : "at least ") + std::to_string(bytes) + " for this plan");
    }
  }

  [[noreturn]] void refuse(const Place& place, const std::string& what, int64_t got, const std::string& wanted) const {
    refuse_value(std::string(op_) + ": the " + what + " of " + place.name + " is " + std::to_string(got) + "; it must be " +
                 wanted);
  }

  const char* op_;
  const Place* next_;
};

// Bytes of scratch that a launch writes besides its results.
struct ScratchBytes {
  int64_t packed_forward, packed_backward, partial, fuse_partial;
};

// Sizes in bytes of the tensors that several calls have.
struct CallSizes {
  const Problem& p;
  const Conv& c;
  bool on_cpu;

  CallSizes(const Problem& problem, bool cpu) : p(problem), c(problem.conv), on_cpu(cpu) {}

  int64_t inputs() const { return c.channels / c.groups; }
  int64_t taps() const { return int64_t{c.kernel_h} * c.kernel_w; }
  int64_t columns() const { return inputs() * taps(); }
  int64_t positions() const { return int64_t{c.batch} * c.out_h * c.out_w; }
  int64_t weight() const { return c.outputs * columns() * bytes_of(p.weight_type); }
  int64_t core() const { return int64_t{c.outputs} * c.rank * bytes_of(p.core_type); }
  int64_t suffix() const { return c.rank * columns() * bytes_of(p.suffix_type); }
  int64_t h_element() const { return on_cpu ? 4 : bytes_of(p.saved_type); }
  int64_t h() const { return positions() * c.groups * c.rank * h_element(); }
  int64_t bits() const {
    const bool depthwise = c.channels == c.groups;
    return positions() * (depthwise ? (c.outputs + 7) / 8 : int64_t{c.groups} * ((c.outputs / c.groups + 7) / 8));
  }
  int64_t vector(Type type) const { return int64_t{c.outputs} * bytes_of(type); }

  // suffix, core2, core3, core4. The CPU engine needs the contracted suffix.
  void factors(PlaceChecker& check, bool wanted) const {
    const int64_t element = bytes_of(p.suffix_type), last = p.cores == 3 ? p.bond3 : 1;
    const int64_t middle = int64_t{p.bond2} * (p.cores == 3 ? c.kernel_h : c.kernel_w) * last;
    const bool cores = p.cores > 0 && !on_cpu;
    wanted = wanted && c.rank > 0;
    check.dense(cores ? 0 : suffix(), element, wanted && !cores);
    check.dense(cores ? c.rank * inputs() * p.bond2 * element : 0, element, wanted && cores);
    check.dense(cores ? middle * element : 0, element, wanted && cores);
    check.dense(cores && p.cores == 3 ? last * c.kernel_w * element : 0, element, wanted && cores && p.cores == 3);
  }

  // weight, core, suffix, magnitude
  void dora_operands(PlaceChecker& check) const {
    check.dense(weight(), bytes_of(p.weight_type), true);
    check.dense(core(), bytes_of(p.core_type), true);
    check.dense(suffix(), bytes_of(p.suffix_type), true);
    check.dense(vector(p.affine_type), bytes_of(p.affine_type), true);
  }
};

inline void check_call(PlaceChecker& check, const Problem& p, const FuseCall&, const ScratchBytes&, bool) {
  const CallSizes sizes(p, false);
  check.dense(sizes.weight(), bytes_of(p.weight_type), true);
  check.dense(sizes.core(), bytes_of(p.core_type), true);
  sizes.factors(check, true);
  check.dense(sizes.weight(), bytes_of(p.weight_type), true);
}

inline void check_call(PlaceChecker& check, const Problem& p, const FuseBackwardCall&, const ScratchBytes& scratch, bool) {
  const CallSizes sizes(p, false);
  check.dense(sizes.weight(), bytes_of(p.weight_type), true);
  sizes.factors(check, true);
  check.dense(sizes.core(), bytes_of(p.core_type), true);
  check.scratch(scratch.fuse_partial, 4, scratch.fuse_partial > 0);
}

inline void check_call(PlaceChecker& check, const Problem& p, const DoraCall&, const ScratchBytes&, bool) {
  const CallSizes sizes(p, false);
  sizes.dora_operands(check);
  check.dense(sizes.weight(), bytes_of(p.weight_type), true);
  check.dense(sizes.vector(Type::f32), 4, true);
}

inline void check_call(PlaceChecker& check, const Problem& p, const DoraBackwardCall&, const ScratchBytes&, bool) {
  const CallSizes sizes(p, false);
  check.dense(sizes.weight(), bytes_of(p.weight_type), true);
  sizes.dora_operands(check);
  check.dense(sizes.vector(Type::f32), 4, true);
  check.dense(sizes.core(), bytes_of(p.core_type), false);
  check.dense(sizes.suffix(), bytes_of(p.suffix_type), false);
  check.dense(sizes.vector(p.affine_type), bytes_of(p.affine_type), false);
}

inline void check_call(PlaceChecker& check, const Problem& p, const ForwardCall& call, const ScratchBytes& scratch, bool cpu) {
  const CallSizes sizes(p, cpu);
  const Conv& c = p.conv;
  const int64_t element = bytes_of(p.type), affine = bytes_of(p.affine_type);
  check.dense(sizes.weight(), bytes_of(p.weight_type), true);
  check.dense(sizes.core(), bytes_of(p.core_type), c.rank > 0);
  sizes.factors(check, true);
  check.map(c.batch, c.channels, c.in_h, c.in_w, call.x_strides, element, c.batch > 0, cpu);
  check.dense(sizes.vector(p.type), element, false);
  for (int i = 0; i < 2; ++i) check.dense(sizes.vector(p.affine_type), affine, false);
  check.map(c.batch, c.outputs, c.out_h, c.out_w, call.residual_strides, element, false, cpu);
  for (int i = 0; i < 2; ++i) check.dense(sizes.vector(p.affine_type), affine, false);
  check.map(c.batch, c.outputs, c.out_h, c.out_w, call.y_strides, element, c.batch > 0, cpu);
  check.dense(sizes.h(), sizes.h_element(), false);
  check.dense(sizes.bits(), 1, false);
  check.scratch(scratch.packed_forward, 4, scratch.packed_forward > 0);
  if (c.rank == 0 && call.h != nullptr) refuse_value("the forward call has an h, but the plan's rank is 0; give address 0");
  if (cpu && call.y == call.x && c.batch > 0) {  // y is copied over x in whole samples
    const Strides &x = call.x_strides, &y = call.y_strides;
    const int64_t line = int64_t{c.out_w} * c.outputs, dense[] = {c.out_h * line, line, c.outputs};
    const bool same = c.in_h == c.out_h && c.in_w == c.out_w && c.channels == c.outputs;
    const bool n = c.batch == 1 || x.n == dense[0], h = c.out_h == 1 || (x.h == dense[1] && y.h == dense[1]);
    const bool w = c.out_w == 1 || (x.w == dense[2] && y.w == dense[2]);
    if (!same || !n || !h || !w || y.n != dense[0]) {
      refuse_value("cpu_block_forward: y overwrites x; both must be dense, channels-last and of the same size");
    }
  }
}

inline void check_call(PlaceChecker& check, const Problem& p, const BackwardCall& call, const ScratchBytes& scratch, bool cpu) {
  const CallSizes sizes(p, cpu);
  const Conv& c = p.conv;
  const int64_t element = bytes_of(p.type), affine = bytes_of(p.affine_type);
  const bool dx = call.dx != nullptr, sums = call.dcore != nullptr || call.dbias != nullptr;
  check.dense(sizes.weight(), bytes_of(p.weight_type), dx);
  check.dense(sizes.core(), bytes_of(p.core_type), dx && c.rank > 0);
  sizes.factors(check, dx);
  check.map(c.batch, c.outputs, c.out_h, c.out_w, call.dy_strides, element, c.batch > 0, cpu);
  check.dense(sizes.h(), sizes.h_element(), call.dcore != nullptr);
  check.dense(sizes.bits(), 1, false);
  for (int i = 0; i < 2; ++i) check.dense(sizes.vector(p.affine_type), affine, false);
  check.map(c.batch, c.channels, c.in_h, c.in_w, call.dx_strides, element, false, cpu);
  check.map(c.batch, c.outputs, c.out_h, c.out_w, call.dresidual_strides, element, false, cpu);
  check.dense(sizes.core(), bytes_of(p.core_type), false);
  check.dense(sizes.vector(p.type), element, false);
  if (c.rank == 0 && call.dcore != nullptr) {
    refuse_value("the backward call has a dcore, but the plan's rank is 0; give address 0");
  }
  check.scratch(dx ? scratch.packed_backward : 0, 4, dx && scratch.packed_backward > 0);
  check.scratch(sums ? scratch.partial : 0, 4, sums && scratch.partial > 0);
}

}  // namespace lora_edge
