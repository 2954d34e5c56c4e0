// Plain data that host and device code share: the sizes of one adapted convolution and the tensors of one call.
#pragma once

#include <cstdint>

namespace lora_edge {

enum class Type : int32_t { f32, f16, bf16 };
enum class Precision : int32_t { fp32, tf32, half };  // of the products; half: x's 16-bit type with float32 sums
enum class Activation : int32_t { none, relu, clamp };

inline int32_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// y = conv2d(x, W + scale * core * suffix). A 1-D convolution has height 1. pad_h, pad_w: leading zeros; the trailing ones
// follow from the sizes.
struct Conv {
  int32_t batch, channels, outputs, groups, rank;  // N, I, O, g, r1; rank 0: not adapted
  int32_t in_h, in_w, out_h, out_w, kernel_h, kernel_w;
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Strides of a tensor (N, C, H, W) in elements; tensors that are only read may have any.
struct Strides {
  int64_t n, c, h, w;
};

// All that is fixed for one layer on one input size.
struct Problem {
  Conv conv;
  Type type;                                        // x, y, dy, dx, residual, bias
  Type weight_type, core_type, suffix_type;         // weight; core and its gradient; suffix or frozen cores
  Type saved_type, affine_type;                     // h; scales and shifts of the affines, or the magnitude and its gradient
  Precision precision;
  Activation activation;
  float low, high;                                  // bounds of Activation::clamp
  float scale;
  int32_t cores;                                    // 0: a contracted suffix is given; 2 (1-D) or 3 (2-D) frozen cores
  int32_t bond2, bond3;                             // r2, and r3 of a 2-D kernel
};

// tt_fuse: out = weight + scale * core * suffix, (O, I/g * Kh * Kw), in `weight_type`.
struct FuseCall {
  const void *weight, *core;
  const void *suffix, *core2, *core3, *core4;  // suffix (r1, I/g, Kh, Kw), or G2 (r1, I/g, r2), G3 (r2, Kh, r3), G4 (r3, Kw)
  void* out;
};

// Backward of tt_fuse: dcore = scale * dout * suffix^T, (O, r1); `partial` is float32 scratch.
struct FuseBackwardCall {
  const void* dout;
  const void *suffix, *core2, *core3, *core4;
  void *dcore, *partial;
};

// dora_fuse: out = gain * (weight + scale * core * suffix) by rows, gain = magnitude / max(norms, 1e-12); `norms` (O) float32
// are those of the rows before the gain. The suffix is contracted; the magnitude (O) has `affine_type`.
struct DoraCall {
  const void *weight, *core, *suffix, *magnitude;
  void *out, *norms;
};

// Backward of dora_fuse, the norms a constant. Null outputs are not computed.
struct DoraBackwardCall {
  const void* dout;
  const void *weight, *core, *suffix, *magnitude, *norms;
  void *dcore, *dsuffix, *dmagnitude;
};

// y = act(affine(conv(x) + bias) + residual_affine(residual)), h = conv(x, suffix), bits: set where act has slope 1.
// Null: absent. h (N, Ho, Wo, g * r1) and bits (N, Ho, Wo, g, ceil(O/g / 8)), depthwise (N, Ho, Wo, ceil(O / 8)), are dense;
// `packed` is scratch.
struct ForwardCall {
  const void *weight, *core, *suffix, *core2, *core3, *core4;
  const void* x;
  Strides x_strides;
  const void *bias, *affine_scale, *affine_shift;
  const void* residual;
  Strides residual_strides;
  const void *residual_scale, *residual_shift;
  void* y;
  Strides y_strides;
  void *h, *bits, *packed;
};

// dz = slope(bits) * dy; dresidual = residual_scale * dz; dx = conv^T(dz, affine_scale * W');
// dcore = scale * affine_scale * sum of dz h^T; dbias = affine_scale * sum of dz. Null outputs are not computed.
struct BackwardCall {
  const void *weight, *core, *suffix, *core2, *core3, *core4;
  const void* dy;
  Strides dy_strides;
  const void *h, *bits;
  const void *affine_scale, *residual_scale;
  void* dx;
  Strides dx_strides;
  void* dresidual;
  Strides dresidual_strides;
  void *dcore, *dbias;
  void *packed, *partial;
};

}  // namespace lora_edge
