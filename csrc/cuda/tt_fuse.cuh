// The composed kernel W + scale * core * suffix, in any layout of packing.h, and its gradient to the core.
#pragma once

#include "../packing.h"
#include "../plan.h"
#include "../problem.h"

namespace lora_edge {

// What is composed and in which layout; the sizes, the other types and the scale come from the Problem.
struct Fuse {
  const void* weight;               // (O, I/g, Kh, Kw)
  const void* core;                 // (O, r1), or null: not adapted
  const void *suffix, *core2, *core3, *core4;
  const void* row_scale;            // (O) or null; multiplies the rows of W', not those of the suffix
  Type row_scale_type;
  Packing packing;
  void* out;
  Type out_type;                    // plain packing: weight_type or float32
  bool suffix_rows;                 // rows O .. O + r1 - 1 of `out` are the suffix; not in the backward packing
  bool round_tf32;                  // round to TF32; packed float32 only
};

template <class Call>
Fuse fuse_of(const Call& call, Packing packing, void* out, Type out_type) {
  Fuse fuse{};
  fuse.weight = call.weight, fuse.core = call.core, fuse.suffix = call.suffix;
  fuse.core2 = call.core2, fuse.core3 = call.core3, fuse.core4 = call.core4;
  fuse.packing = packing, fuse.out = out, fuse.out_type = out_type;
  return fuse;
}

const char* fuse_forward(const Problem& problem, const Fuse& fuse, Stream stream);

// dcore = scale * dout * suffix^T; `partial` has fuse_partial_bytes.
const char* fuse_backward(const Problem& problem, const FuseBackwardCall& call, Stream stream);
int64_t fuse_partial_bytes(const Problem& problem);

// The most shared memory that a block of these kernels uses for this problem. 8 warps fit an SM up to kMostFuseShared.
int64_t fuse_shared_bytes(const Problem& problem);
constexpr int64_t kMostFuseShared = 80 * 1024;

}  // namespace lora_edge
