// A kernel of the emulator's own tests, as an op of the runner: `x` in, `y` out, 64 threads and 4 KB of shared memory.
#pragma once

#include "cuda/gpu.cuh"
#include "emulator/job.h"

namespace lora_edge {

struct Case {
  const float* x;
  float* y;
  int n;
};

constexpr int kThreads = 64;
constexpr int kSharedBytes = 4096;

template <void (*kernel)(Case)>
const char* run_case(const host::Job& job) {
  const Case params{job.pointer<float>("x"), job.pointer<float>("y"), static_cast<int>(job.number("n"))};
  return launch(kernel, job.fields.count("blocks") != 0 ? job.number("blocks") : 1, kThreads, kSharedBytes, nullptr, params);
}

// `CASE(name) { body }` defines the kernel and its op.
#define CASE(NAME)                                                                  \
  KERNEL(kThreads, 1) void NAME(const GRID_CONSTANT Case p);                        \
  const host::Register NAME##_op({#NAME, run_case<NAME>});                          \
  KERNEL(kThreads, 1) void NAME([[maybe_unused]] const GRID_CONSTANT Case p)

}  // namespace lora_edge
