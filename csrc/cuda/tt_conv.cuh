// The loop over the k tiles of a tile, and the output of the finished tile, eight channels at a time. See tt_conv_gemm.cuh.
#pragma once

#include "tt_conv_gemm.cuh"
#include "tt_conv_stage.cuh"
#include "tt_conv_sums.cuh"

namespace lora_edge {

// Runs over the k tiles in [k_first, k_end) with two buffers and one barrier per tile. Calls `each` with the buffer and its
// first k while the buffer can be read; without `wanted` it does only that.
template <class Unit, Access access, int halves, class Mask, class Each>
DEVICE void run_tiles(const Gemm& g, const Tile& tile, Sums<Unit>& sums, bool wanted, int k_first, int k_end,
                      const Mask& mask, const Each& each) {
  using Element = typename Unit::Element;
  constexpr int step = kWords * kPack<Element>;
  if (k_first >= k_end) return;
  Staged<Element, access, halves> staged(g, tile, k_first);
  if (wanted) copy_b<Element>(g, tile, 0, k_first, k_end);
  async_commit();
  staged.load(g, tile, k_first, k_end, mask);
  staged.store(tile, 0, mask);
  int buffer = 0;
  for (int k = k_first; k < k_end; k += step) {
    async_wait<0>();
    sync_block();  // this tile has arrived, and no thread still reads the other buffer
    const bool more = k + step < k_end;
    if (more && wanted) copy_b<Element>(g, tile, 1 - buffer, k + step, k_end);
    async_commit();
    each(buffer, k);
    if (more) staged.load(g, tile, k + step, k_end, mask);
    if (wanted) {
      const int left = (k_end - k + kPack<Element> - 1) / kPack<Element>;
      sums.add(tile, buffer, left < kWords ? left : kWords);
    }
    buffer = 1 - buffer;
    if (more) staged.store(tile, buffer, mask);
  }
}

// Loads eight neighbouring columns of the half's finished tile. Lanes whose addresses are 32 words apart begin with different
// halves of the eight, which avoids bank conflicts.
DEVICE void load_finished(float (&v)[8], const Tile& tile, int row, int octet) {
  const Shared<float> out = Stages::out(tile);
  const int at = row * kOutPitch + octet * 8;
  const bool swapped = octet % 8 >= 4;
  float first[4], second[4];
  load_floats(first, out, at + (swapped ? 4 : 0));
  load_floats(second, out, at + (swapped ? 0 : 4));
  UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = swapped ? second[i] : first[i];
    v[i + 4] = swapped ? first[i] : second[i];
  }
}

// Stores or loads eight channels: 16 bytes at a time if `vector`, which needs contiguous channels, otherwise the first `count`.
template <class Element>
DEVICE void store_octet(Element* base, int64_t at, int64_t stride, const float (&v)[8], int count, bool vector) {
  if (vector) {
    store_floats(base, at, v);
  } else {
    UNROLL
    for (int i = 0; i < 8; ++i) store_global(base, at + i * stride, from_float<Element>(v[i]), inside(i < count));
  }
}

template <class Element>
DEVICE void load_octet(float (&v)[8], const Element* base, int64_t at, int64_t stride, int count, bool vector) {
  if (vector) {
    load_floats(v, base, at);
  } else {
    UNROLL
    for (int i = 0; i < 8; ++i) v[i] = to_float(load_global(base, at + i * stride, inside(i < count)));
  }
}

// Calls write(row, octet) once for every octet of the half; lanes run along channels or positions, whichever is contiguous in
// the target.
template <class Write>
DEVICE void for_each_octet(const Tile& tile, bool along_positions, const Write& write) {
  const int thread = tile.thread;
  for (int i = 0; i < kColumns / 8; ++i) {
    along_positions ? write(thread, i) : write(thread / 8 + i * (kRows / 8), thread % 8);
  }
  if (tile.extra) write(thread, kColumns / 8);
}

}  // namespace lora_edge
