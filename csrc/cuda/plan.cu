// The launches of each op, in order, and what the kernels refuse. A block is a tt_fuse launch that composes the kernel, then
// the convolution.
#include "../plan.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../packing.h"
#include "depthwise.cuh"
#include "dora_fuse.cuh"
#include "tt_conv_backward.cuh"
#include "tt_conv_forward.cuh"
#include "tt_fuse.cuh"

namespace lora_edge {
namespace {

constexpr int32_t kMostRank = 16;                 // of a block; with more the backward tables do not fit beside the stages
constexpr int32_t kMostFuseRank = 64;
constexpr int32_t kMostTaps = 1 << 20;            // times a bond; shared memory is counted in 32 bits
constexpr int64_t kMostElements = INT32_MAX - 4096;  // tiles round up in 32 bits
constexpr int64_t kMostPosition = (1 << 14) - 1;  // along an axis; places have half a word for it, padding included

bool depthwise(const Conv& c) { return c.channels == c.groups; }

int64_t packed_bytes(const Problem& p, Packing packing) {
  const PackedLayout layout = packed_layout(p.conv, packing, bytes_of(p.type));
  return static_cast<int64_t>(layout.rows) * layout.pitch * (packing == Packing::plain ? 4 : bytes_of(p.type));
}

Fuse composed(const Problem& p, Fuse fuse) {
  fuse.round_tf32 = p.type == Type::f32 && p.precision == Precision::tf32;
  return fuse;
}

template <class... Numbers>
const char* text(const char* format, Numbers... numbers) {
  static thread_local char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, numbers...);
  return buffer;
}

const char* dora_refusal(const Problem& p) {
  const Conv& c = p.conv;
  if (c.rank > kMostDoraRank) return text("rank %d: the kernels support up to %d", c.rank, kMostDoraRank);
  if (p.cores > 0) return "frozen cores: the kernels of dora_fuse support a contracted suffix";
  const int64_t elements = int64_t{c.channels / c.groups} * c.kernel_h * c.kernel_w * std::max(c.outputs, c.rank);
  if (elements <= kMostElements) return nullptr;
  return text("%lld elements: the kernels support up to %lld", static_cast<long long>(elements),
              static_cast<long long>(kMostElements));
}

}  // namespace

const char* tt_fuse_forward(const Problem& p, const FuseCall& call, Stream stream) {
  return fuse_forward(p, fuse_of(call, Packing::plain, call.out, p.weight_type), stream);
}

const char* tt_fuse_backward(const Problem& p, const FuseBackwardCall& call, Stream stream) {
  return fuse_backward(p, call, stream);
}

const char* dora_fuse_forward(const Problem& p, const DoraCall& call, Stream stream) { return dora_forward(p, call, stream); }

const char* dora_fuse_backward(const Problem& p, const DoraBackwardCall& call, Stream stream) {
  return dora_backward(p, call, stream);
}

const char* tt_block_forward(const Problem& p, const ForwardCall& call, Stream stream) {
  if (depthwise(p.conv)) return depthwise_forward(p, call, stream);
  Fuse fuse = composed(p, fuse_of(call, Packing::forward, call.packed, p.type));
  fuse.suffix_rows = call.h != nullptr;
  fuse.row_scale = call.affine_scale, fuse.row_scale_type = p.affine_type;
  const char* error = fuse_forward(p, fuse, stream);
  return error != nullptr ? error : conv_forward(p, call, stream);
}

const char* tt_block_backward(const Problem& p, const BackwardCall& call, Stream stream) {
  if (depthwise(p.conv)) return depthwise_backward(p, call, stream);
  if (call.dx != nullptr) {
    Fuse fuse = composed(p, fuse_of(call, Packing::backward, call.packed, p.type));
    fuse.row_scale = call.affine_scale, fuse.row_scale_type = p.affine_type;
    const char* error = fuse_forward(p, fuse, stream);
    if (error != nullptr) return error;
  }
  return conv_backward(p, call, stream);
}

const char* refusal(const Problem& p, const char* op) {
  const Conv& c = p.conv;
  if (std::strcmp(op, "dora_fuse") == 0) return dora_refusal(p);
  const bool block = std::strcmp(op, "tt_block") == 0;
  const int32_t most_rank = block ? kMostRank : kMostFuseRank;
  if (c.rank > most_rank) return text("rank %d: the kernels support up to %d", c.rank, most_rank);
  if (c.stride_h > kMostStride || c.stride_w > kMostStride) {  // the size of the tables of phases
    return text("stride (%d, %d): the kernels support up to %d", c.stride_h, c.stride_w, kMostStride);
  }
  const int64_t taps = int64_t{c.kernel_h} * c.kernel_w;
  if (taps * std::max(1, p.bond2) > kMostTaps || (block && depthwise(c) && taps * (c.outputs / c.groups) > kMostTaps)) {
    return text("kernel (%d, %d), bond %d: more than %d taps times bond or a group's outputs", c.kernel_h, c.kernel_w, p.bond2,
                kMostTaps);
  }
  if (fuse_shared_bytes(p) > kMostFuseShared || (block && depthwise(c) && depthwise_shared_bytes(p) > kMostDepthwiseShared)) {
    return text("kernel (%d, %d) at rank %d: it does not fit the shared memory of a thread block", c.kernel_h, c.kernel_w,
                c.rank);
  }
  if (!block) return nullptr;
  const int64_t in = int64_t{c.batch} * c.channels * c.in_h * c.in_w, out = int64_t{c.batch} * c.outputs * c.out_h * c.out_w;
  if (std::max(in, out) > kMostElements) {
    return text("%lld elements: the kernels support up to %lld", static_cast<long long>(std::max(in, out)),
                static_cast<long long>(kMostElements));
  }
  const int64_t reach = std::max(int64_t{c.in_h} + c.pad_h + int64_t{c.dilation_h} * c.kernel_h,
                                 int64_t{c.in_w} + c.pad_w + int64_t{c.dilation_w} * c.kernel_w);
  if (reach > kMostPosition) {
    return text("%lld padded positions along an axis: the kernels support up to %lld", static_cast<long long>(reach),
                static_cast<long long>(kMostPosition));
  }
  return nullptr;
}

Scratch scratch(const Problem& p) {
  const Conv& c = p.conv;
  const bool plain = depthwise(c);
  const int64_t positions = int64_t{c.batch} * c.out_h * c.out_w;
  const int64_t octets = plain ? (c.outputs + 7) / 8 : int64_t{c.groups} * ((c.outputs / c.groups + 7) / 8);
  Scratch s{};
  s.fuse_partial = fuse_partial_bytes(p);
  if (refusal(p, "tt_block") != nullptr) return s;
  s.packed_forward = packed_bytes(p, plain ? Packing::plain : Packing::forward);
  s.packed_backward = packed_bytes(p, plain ? Packing::plain : Packing::backward);
  s.partial = plain ? depthwise_partial_bytes(p) : conv_partial_bytes(p);
  s.h = positions * c.groups * c.rank * bytes_of(p.saved_type);
  s.bits = positions * octets;
  return s;
}

}  // namespace lora_edge
