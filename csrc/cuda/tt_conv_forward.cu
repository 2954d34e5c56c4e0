// tt_block forward: y = act(a * (conv(x, W') + bias) + b + ra * residual + rb), h = conv(x, S) and one bit per element, set
// where the activation's slope is 1, in one pass over x. tt_conv is the same without a, b, residual and activation.
//
// Tiles: the implicit GEMM of tt_conv_gemm.cuh, rows = output positions, columns = the group's O/g outputs, then the r1 rows of
// S. Blocks are wide, 128 rows x 128 columns, if a stride leaves part of each sector of x unused: they read x half as often.
// The finished tile goes through shared memory, so that y, the residual and the bits are accessed 8 channels at a time.
// Floor: max(2 N L (O + r1) (I/g) K multiply-add operations / peak, bytes of x, W', S, residual, y, h and bits / bandwidth).
#include "tt_conv_forward.cuh"

#include "activation.cuh"
#include "tt_conv.cuh"
#include "tt_conv_launch.h"

namespace lora_edge {
namespace {

struct Forward {
  Gemm gemm;
  void* y;
  Strides y_strides;
  const void* residual;
  Strides residual_strides;
  const void *bias, *affine_scale, *affine_shift, *residual_scale, *residual_shift;
  void* h;
  uint8_t* bits;
  int32_t rank, octets;  // octets: bytes of bits per position and group
  Type affine_type, saved_type;
  Bounds bounds;
  bool y_vector, residual_vector, along_positions;
};

// Stored after the stages: each row's offset in y and in the residual, at the group's first channel; and for each column of z =
// sum + shift + residual * scale its two numbers, one half after the other. The packed kernel already includes the affine's own
// scale, and the sums begin with the shift.
struct Tables {
  static constexpr int columns = kColumns + kExtra;
  DEVICE static Shared<uint32_t> y(const Tile& tile) { return shared_array<uint32_t>(Stages::bytes(tile.halves), kRows); }
  DEVICE static Shared<uint32_t> residual(const Tile& tile) {
    return shared_array<uint32_t>(Stages::bytes(tile.halves) + kRows * 4, kRows);
  }
  DEVICE static Shared<float> shift(const Tile& tile) { return shared_array<float>(of_half(tile), columns); }
  DEVICE static Shared<float> residual_scale(const Tile& tile) {
    return shared_array<float>(of_half(tile) + columns * 4, columns);
  }
  static constexpr int bytes(int halves) { return Stages::bytes(halves) + kRows * 8 + halves * columns * 8; }

 private:
  DEVICE static int of_half(const Tile& tile) { return Stages::bytes(tile.halves) + kRows * 8 + tile.half * columns * 8; }
};

DEVICE void write_target(const Forward& p, const Tile& tile, const Place& place) {
  const int channel = tile.group * p.gemm.own;
  Tables::y(tile).store(tile.thread, offset_of(p.y_strides, place.sample, channel, place.h, place.w));
  Tables::residual(tile).store(tile.thread, offset_of(p.residual_strides, place.sample, channel, place.h, place.w));
}

DEVICE float optional(const void* values, Type type, int i, float otherwise) {
  return values == nullptr ? otherwise : load_as_float(values, type, i);
}

template <class Element>
DEVICE void write_column(const Forward& p, const Tile& tile) {
  const int i = tile.thread, column = tile.column + i;
  if (!inside(i < Tables::columns)) return;
  const bool own = inside(column < p.gemm.own);
  const int output = tile.group * p.gemm.own + column;
  float shift = 0.0f, scale = 1.0f;
  if (own) {
    shift = optional(p.bias, type_of<Element>, output, 0.0f) * optional(p.affine_scale, p.affine_type, output, 1.0f) +
            optional(p.affine_shift, p.affine_type, output, 0.0f) + optional(p.residual_shift, p.affine_type, output, 0.0f);
    scale = optional(p.residual_scale, p.affine_type, output, 1.0f);
  }
  Tables::shift(tile).store(i, shift);
  Tables::residual_scale(tile).store(i, scale);
}

template <class Element>
DEVICE void write_octet(const Forward& p, const Tile& tile, int row, int octet) {
  const Gemm& g = p.gemm;
  const int position = tile.row + row, column = tile.column + octet * 8;
  if (!inside(position < tile.rows)) return;
  float v[8];
  load_finished(v, tile, row, octet);
  const int64_t cell = static_cast<int64_t>(position) * g.groups.d + tile.group;
  if (p.h != nullptr && column + 8 > g.own) {
    UNROLL
    for (int i = 0; i < 8; ++i) {
      const int q = column + i - g.own;
      store_float(p.h, p.saved_type, cell * p.rank + q, v[i], inside(q >= 0) && inside(q < p.rank));
    }
  }
  const int outputs = g.own - column;  // if less than 8, the outputs in this octet
  if (!inside(outputs > 0)) return;

  if (p.residual != nullptr) {
    float residual[8];
    const uint32_t at = Tables::residual(tile).load(row) + offset_of(p.residual_strides, 0, column, 0, 0);
    load_octet(residual, static_cast<const Element*>(p.residual), at, p.residual_strides.c, outputs, p.residual_vector);
    UNROLL
    for (int i = 0; i < 8; ++i) {
      v[i] += p.residual_scale == nullptr ? residual[i] : residual[i] * Tables::residual_scale(tile).load(octet * 8 + i);
    }
  }
  uint32_t bits = 0;
  UNROLL
  for (int i = 0; i < 8; ++i) {
    if (p.bounds.activation != Activation::none) {
      bool slope;
      v[i] = activate(p.bounds, v[i], slope);
      bits |= static_cast<uint32_t>(slope && inside(i < outputs)) << i;
    }
  }
  if (p.bits != nullptr) store_global(p.bits, cell * p.octets + column / 8, static_cast<uint8_t>(bits));
  const uint32_t at = Tables::y(tile).load(row) + offset_of(p.y_strides, 0, column, 0, 0);
  store_octet(static_cast<Element*>(p.y), at, p.y_strides.c, v, outputs, p.y_vector);
}

template <class Unit, Access access, int halves>
KERNEL(halves * kRows, 2 / halves) void tt_block_forward_kernel(const GRID_CONSTANT Forward p) {
  using Element = typename Unit::Element;
  const Tile tile(p.gemm, halves);
  if (tile.half == 0) {
    const int row = tile.row + tile.thread;
    const Place place(p.gemm, tile, row);
    write_row(p.gemm, tile, place, row);
    write_target(p, tile, place);
  }
  write_column<Element>(p, tile);
  sync_block();
  Sums<Unit> sums;
  sums.begin(Tables::shift(tile));
  run_tiles<Unit, access, halves>(p.gemm, tile, sums, true, 0, p.gemm.k_end[0], NoMask{}, [](int, int) {});
  sync_block();  // all reads of the stages are done
  sums.store(tile);
  sync_block();
  for_each_octet(tile, p.along_positions, [&](int row, int octet) { write_octet<Element>(p, tile, row, octet); });
}

struct Launch {
  const Forward& p;
  int64_t blocks;
  bool wide;
  Stream stream;

  template <class Unit, Access access>
  const char* operator()() const {
    if constexpr (access == Access::positions) {
      if (wide) return launch(tt_block_forward_kernel<Unit, access, 2>, blocks, 2 * kRows, Tables::bytes(2), stream, p);
    }
    return launch(tt_block_forward_kernel<Unit, access, 1>, blocks, kRows, Tables::bytes(1), stream, p);
  }
};

}  // namespace

const char* conv_forward(const Problem& problem, const ForwardCall& call, Stream stream) {
  const Conv& c = problem.conv;
  Forward p{};
  Gemm& g = p.gemm;
  g.source = call.x, g.packed = call.packed, g.strides = call.x_strides;
  g.source_h = c.in_h, g.source_w = c.in_w;
  g.step_h = c.stride_h, g.step_w = c.stride_w, g.target_h = g.target_w = 1;
  g.own = c.outputs / c.groups, g.shared_row = c.outputs;
  g.h[0] = Axis{0, -c.pad_h, -c.dilation_h, Divider(c.out_h), Divider(c.kernel_h)};
  g.w[0] = Axis{0, -c.pad_w, -c.dilation_w, Divider(c.out_w), Divider(c.kernel_w)};
  g.phases = g.phases_w = Divider(1);
  const PackedLayout layout = packed_layout(c, Packing::forward, bytes_of(problem.type));
  g.pitch = layout.pitch;
  set_tiles(g, c.batch, c.groups, c.channels / c.groups, g.own + (call.h != nullptr ? c.rank : 0));
  const Access access = source_access(g, problem.type, false);
  // a stride along contiguous elements leaves half of each sector or more unused, so that x dominates the L2 traffic; but a
  // wide block occupies an SM alone, and few of them would leave SMs idle
  const int64_t tiles = row_tiles(g, 0) * g.groups.d * g.tiles_n.d;
  const bool wide = access == Access::positions && c.stride_w > 1 && g.tiles_n.d % 2 == 0 && tiles >= kTogether;
  if (wide) g.tiles_n = Divider(g.tiles_n.d / 2);
  g.k_end[0] = c.kernel_h * c.kernel_w * g.channels.d;
  const int64_t source = int64_t{c.batch} * c.channels * c.in_h * c.in_w, packed = int64_t{layout.rows} * layout.pitch;
  // the stride reduces the rows that a tap reads, and if channels are contiguous also the sectors of a row
  const double sweeps = static_cast<double>(c.kernel_h * c.kernel_w) / (c.stride_h * (g.strides.c == 1 ? c.stride_w : 1));
  const int64_t blocks = set_blocks(g, source * bytes_of(problem.type), packed * bytes_of(problem.type), sweeps, wide ? 2 : 1);

  p.y = call.y, p.y_strides = call.y_strides;
  p.residual = call.residual, p.residual_strides = call.residual_strides;
  p.bias = call.bias, p.affine_scale = call.affine_scale, p.affine_shift = call.affine_shift;
  p.residual_scale = call.residual_scale, p.residual_shift = call.residual_shift;
  p.h = call.h, p.bits = static_cast<uint8_t*>(call.bits);
  p.rank = c.rank, p.octets = (g.own + 7) / 8;
  p.affine_type = problem.affine_type, p.saved_type = problem.saved_type;
  p.bounds = Bounds{problem.activation, problem.low, problem.high};
  p.y_vector = whole_octets(g.own) && in_vectors(call.y, call.y_strides, problem.type);
  p.residual_vector = whole_octets(g.own) && in_vectors(call.residual, call.residual_strides, problem.type);
  p.along_positions = call.y_strides.c != 1;
  return with_kernel(problem, access, Launch{p, blocks, wide, stream});
}

}  // namespace lora_edge
