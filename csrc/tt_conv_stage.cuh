// A k tile on its way into shared memory. A passes through registers, where zeros stand for what lies outside and a prologue
// may mask; B is copied asynchronously.
// Shared rows are 144 bytes apart, so that eight rows' 16-byte words fall into different banks: no conflicts in the inner loop.
#pragma once

#include "tt_conv_gemm.cuh"

namespace lora_edge {

constexpr int kPitch = 36;                    // words from one shared row to the next
constexpr int kChunks = 8;                    // 16-byte chunks of a row in a k tile
constexpr int kOutPitch = kColumns + kExtra;  // floats between rows of the finished tile, on its way out
constexpr int kStageBytes = (kRows + kColumns + kExtra) * kPitch * 4;

// How the source is read: 16 bytes of channels at once, or single words with neighbouring lanes along channels or positions.
enum class Access { vector, channels, positions };

// The shared memory of a block: two stages of A and B, which the finished tile overwrites in the end, then the rows' tables.
struct Stages {
  DEVICE static Shared<uint32_t> a(int buffer) { return shared_array<uint32_t>(buffer * kStageBytes, kRows * kPitch); }
  DEVICE static Shared<uint32_t> b(int buffer) {
    return shared_array<uint32_t>(buffer * kStageBytes + kRows * kPitch * 4, (kColumns + kExtra) * kPitch);
  }
  DEVICE static Shared<float> out() { return shared_array<float>(0, kRows * kOutPitch); }
  DEVICE static Shared<uint32_t> offsets() { return shared_array<uint32_t>(2 * kStageBytes, kRows); }
  DEVICE static Shared<uint32_t> places() { return shared_array<uint32_t>(2 * kStageBytes + kRows * 4, kRows); }
  static constexpr int bytes = 2 * kStageBytes + kRows * 8;
};
static_assert(kRows * kOutPitch * 4 <= 2 * kStageBytes, "the finished tile takes the stages' place");

// Where something stands, an axis in each half of a word, as integers that add: 2^14 more than its position, so that neither
// half leaves [0, 2^15) for positions within 2^14 of the origin. Zero is out of reach of any step.
DEVICE uint32_t place_of(int h, int w) { return (static_cast<uint32_t>(h) << 16) + static_cast<uint32_t>(w) + 0x40004000u; }

// Offsets count modulo 2^32: where a row and a step meet inside of the source, their sum is the element's place among at most
// 2^31.
DEVICE uint32_t offset_of(const Strides& s, int n, int c, int h, int w) {
  return static_cast<uint32_t>(n * s.n + c * s.c + h * s.h + w * s.w);
}

// Writes where this thread's row of the tile stands in the source.
DEVICE void write_row(const Gemm& g, const Tile& tile, const Place& place, int row) {
  const int h = place.h * g.step_h + g.h[tile.phase_h].origin, w = place.w * g.step_w + g.w[tile.phase_w].origin;
  Stages::offsets().store(thread_index(), offset_of(g.strides, place.sample, tile.group * g.channels.d, h, w));
  Stages::places().store(thread_index(), inside(row < tile.rows) ? place_of(h, w) : 0);
}

// One k: its tap's offset from a row and its channel in the group. A row's place plus `low` has the high bit of a half set
// where that axis is not below the source, plus `high` where it is behind it.
struct Step {
  uint32_t offset, low, high;
  int h, w, tap, channel;

  DEVICE Step(const Gemm& g, const Tile& tile, int k, int k_end) {
    const Axis &axis_h = g.h[tile.phase_h], &axis_w = g.w[tile.phase_w];
    tap = g.channels.quotient(k);
    channel = k - tap * g.channels.d;
    const int tap_h = axis_w.taps.quotient(tap);
    h = -tap_h * axis_h.advance;
    w = -(tap - tap_h * axis_w.taps.d) * axis_w.advance;
    offset = offset_of(g.strides, 0, channel, h, w);
    low = inside(k < k_end) ? place_of(h, w) : 0;
    high = place_of(h - g.source_h, w - g.source_w);
  }
};

constexpr uint32_t kHighBits = 0x80008000u;

DEVICE bool in_source(uint32_t place, const Step& step) {
  return inside(((place + step.low) & ~(place + step.high) & kHighBits) == kHighBits);
}

// What is done to each element of A on its way: nothing.
struct NoPrologue {
  DEVICE void vector(Word4&, int, const Step&, bool) const {}
  template <class Element>
  DEVICE void element(Element&, int, const Step&, bool) const {}
};

// This thread's part of a k tile of A: `rows` rows of `columns` words, or of one 16-byte chunk. A warp's words along channels
// are 16 of two rows that lie 16 banks apart; along positions 4 of eight rows, which are 32-byte sectors.
template <class Element, Access access>
struct Staged {
  static constexpr int pack = kPack<Element>;
  static constexpr int columns = access == Access::vector ? 1 : 2;
  static constexpr int rows = access == Access::vector ? kChunks : kWords / columns;

  Word4 words[kChunks];
  uint32_t offsets[rows];

  DEVICE Staged() {
    UNROLL
    for (int i = 0; i < rows; ++i) offsets[i] = Stages::offsets().load(row_of(i));
  }

  // The prologue sees what was loaded, its row in the tile, its step, and whether it exists.
  template <class Prologue>
  DEVICE void load(const Gemm& g, const Tile& tile, int k, int k_end, const Prologue& prologue) {
    const Element* source = static_cast<const Element*>(g.source);
    uint32_t places[rows];
    UNROLL
    for (int i = 0; i < rows; ++i) places[i] = Stages::places().load(row_of(i));
    UNROLL
    for (int j = 0; j < columns; ++j) {
      UNROLL
      for (int e = 0; e < (access == Access::vector ? 1 : pack); ++e) {
        const Step step(g, tile, k + word_of(j) * pack + e, k_end);
        UNROLL
        for (int i = 0; i < rows; ++i) {
          const bool ok = in_source(places[i], step);
          const int64_t at = offsets[i] + step.offset;
          if constexpr (access == Access::vector) {
            words[i] = load_global16(source, at, ok);
            prologue.vector(words[i], row_of(i), step, ok);
          } else {
            Element value = load_global(source, at, ok);
            prologue.element(value, row_of(i), step, ok);
            put(j * rows + i, e, value);
          }
        }
      }
    }
  }

  DEVICE void store(int buffer) const {
    const Shared<uint32_t> a = Stages::a(buffer);
    UNROLL
    for (int j = 0; j < columns; ++j) {
      UNROLL
      for (int i = 0; i < rows; ++i) {
        const int to = row_of(i) * kPitch + word_of(j);
        if constexpr (access == Access::vector) {
          a.store16(to, words[i]);
        } else {
          a.store(to, get(j * rows + i));
        }
      }
    }
  }

 private:
  DEVICE static int word_of(int j) {
    if (access == Access::vector) return thread_index() % kChunks * 4;
    return access == Access::channels ? thread_index() % 16 + 16 * j : warp_index() * 8 + lane_index() / 8 + 4 * j;
  }
  DEVICE static int row_of(int i) {
    if (access == Access::vector) return thread_index() / kChunks + i * (kRows / kChunks);
    return access == Access::channels ? warp_index() + lane_index() / 16 * 4 + 8 * i : lane_index() % 8 + 8 * i;
  }
  DEVICE uint32_t get(int i) const {
    const Word4& w = words[i / 4];
    return i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w;
  }
  DEVICE void put(int i, int e, Element value) {
    uint32_t bits;
    if constexpr (pack == 1) {
      bits = bits_of(value);
    } else {
      bits = e == 0 ? value.bits : get(i) | static_cast<uint32_t>(value.bits) << 16;
    }
    Word4& w = words[i / 4];
    (i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w) = bits;
  }
};

// Starts the copy of a k tile of B. Columns and k that do not exist are zero.
template <class Element>
DEVICE void copy_b(const Gemm& g, const Tile& tile, int buffer, int k, int k_end) {
  constexpr int whole = 4 * kPack<Element>;
  const uint32_t* packed = static_cast<const uint32_t*>(g.packed);
  const Shared<uint32_t> b = Stages::b(buffer);
  const int chunks = (tile.extra ? kColumns + kExtra : kColumns) * kChunks;
  for (int i = thread_index(); i < chunks; i += kRows) {
    const int column = tile.column + i / kChunks, at = k + i % kChunks * whole;
    const int64_t row = column < g.own ? tile.group * g.own + column : g.shared_row + column - g.own;
    const bool ok = inside(column < g.columns) && inside(at < k_end);
    const int64_t from = (row * g.pitch + g.base[tile.phase] + at) / kPack<Element>;
    async_copy16(b, i / kChunks * kPitch + i % kChunks * 4, packed, from, ok);
  }
}

}  // namespace lora_edge
