// The one list of all field names. The module reads the fields from keyword arguments and a tuple, the emulator from text.
#pragma once

#include "problem.h"

namespace lora_edge {

template <class Visit>
void visit(Visit&& v, Problem& p) {
  Conv& c = p.conv;
  v("batch", c.batch), v("channels", c.channels), v("outputs", c.outputs), v("groups", c.groups), v("rank", c.rank);
  v("in_h", c.in_h), v("in_w", c.in_w), v("out_h", c.out_h), v("out_w", c.out_w);
  v("kernel_h", c.kernel_h), v("kernel_w", c.kernel_w), v("stride_h", c.stride_h), v("stride_w", c.stride_w);
  v("pad_h", c.pad_h), v("pad_w", c.pad_w), v("dilation_h", c.dilation_h), v("dilation_w", c.dilation_w);
  v("type", p.type), v("weight_type", p.weight_type), v("core_type", p.core_type), v("suffix_type", p.suffix_type);
  v("saved_type", p.saved_type), v("affine_type", p.affine_type), v("precision", p.precision);
  v("activation", p.activation), v("low", p.low), v("high", p.high), v("scale", p.scale);
  v("cores", p.cores), v("bond2", p.bond2), v("bond3", p.bond3);
}

template <class Visit>
void visit_strides(Visit&& v, const char* n, const char* c, const char* h, const char* w, Strides& s) {
  v(n, s.n), v(c, s.c), v(h, s.h), v(w, s.w);
}

template <class Visit, class Call>
void visit_factors(Visit&& v, Call& c) {
  v("suffix", c.suffix), v("core2", c.core2), v("core3", c.core3), v("core4", c.core4);
}

template <class Visit>
void visit(Visit&& v, FuseCall& c) {
  v("weight", c.weight), v("core", c.core), visit_factors(v, c), v("out", c.out);
}

template <class Visit>
void visit(Visit&& v, FuseBackwardCall& c) {
  v("dout", c.dout), visit_factors(v, c), v("dcore", c.dcore), v("partial", c.partial);
}

template <class Visit>
void visit(Visit&& v, DoraCall& c) {
  v("weight", c.weight), v("core", c.core), v("suffix", c.suffix), v("magnitude", c.magnitude);
  v("out", c.out), v("norms", c.norms);
}

template <class Visit>
void visit(Visit&& v, DoraBackwardCall& c) {
  v("dout", c.dout), v("weight", c.weight), v("core", c.core), v("suffix", c.suffix), v("magnitude", c.magnitude);
  v("norms", c.norms), v("dcore", c.dcore), v("dsuffix", c.dsuffix), v("dmagnitude", c.dmagnitude);
}

template <class Visit>
void visit(Visit&& v, ForwardCall& c) {
  v("weight", c.weight), v("core", c.core), visit_factors(v, c);
  v("x", c.x), visit_strides(v, "x_n", "x_c", "x_h", "x_w", c.x_strides);
  v("bias", c.bias), v("affine_scale", c.affine_scale), v("affine_shift", c.affine_shift), v("residual", c.residual);
  visit_strides(v, "residual_n", "residual_c", "residual_h", "residual_w", c.residual_strides);
  v("residual_scale", c.residual_scale), v("residual_shift", c.residual_shift);
  v("y", c.y), visit_strides(v, "y_n", "y_c", "y_h", "y_w", c.y_strides);
  v("h", c.h), v("bits", c.bits), v("packed", c.packed);
}

template <class Visit>
void visit(Visit&& v, BackwardCall& c) {
  v("weight", c.weight), v("core", c.core), visit_factors(v, c);
  v("dy", c.dy), visit_strides(v, "dy_n", "dy_c", "dy_h", "dy_w", c.dy_strides);
  v("h", c.h), v("bits", c.bits), v("affine_scale", c.affine_scale), v("residual_scale", c.residual_scale);
  v("dx", c.dx), visit_strides(v, "dx_n", "dx_c", "dx_h", "dx_w", c.dx_strides);
  v("dresidual", c.dresidual);
  visit_strides(v, "dresidual_n", "dresidual_c", "dresidual_h", "dresidual_w", c.dresidual_strides);
  v("dcore", c.dcore), v("dbias", c.dbias), v("packed", c.packed), v("partial", c.partial);
}

}  // namespace lora_edge
