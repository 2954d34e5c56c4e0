// Stages a k tile in shared memory. A passes through registers, where elements outside the source and masked elements become
// zero; B is copied asynchronously.
// Shared rows are 144 bytes apart, so that the 16-byte words of eight rows fall into different banks: the inner loop has no
// bank conflicts.
#pragma once

#include "tt_conv_gemm.cuh"

namespace lora_edge {

constexpr int kPitch = 36;                    // words from one shared row to the next
constexpr int kChunks = 8;                    // 16-byte chunks per row of a k tile
constexpr int kOutPitch = kColumns + kExtra;  // floats from one row of the finished tile to the next

// How the source is read: 16 bytes of channels at a time, or single words with neighbouring lanes along channels or positions.
enum class Access { vector, channels, positions };

// The shared memory of a block: two stages of A and of the halves' B, which the finished tile overwrites at the end, one half
// after the other; then the tables of the rows.
struct Stages {
  DEVICE static Shared<uint32_t> a(const Tile& tile, int buffer) {
    return shared_array<uint32_t>(buffer * stage(tile.halves), kRows * kPitch);
  }
  DEVICE static Shared<uint32_t> b(const Tile& tile, int buffer) {
    return shared_array<uint32_t>(buffer * stage(tile.halves) + a_bytes + tile.half * b_bytes, (kColumns + kExtra) * kPitch);
  }
  DEVICE static Shared<float> out(const Tile& tile) { return shared_array<float>(tile.half * out_bytes, kRows * kOutPitch); }
  DEVICE static Shared<uint32_t> offsets(const Tile& tile) { return shared_array<uint32_t>(2 * stage(tile.halves), kRows); }
  DEVICE static Shared<uint32_t> places(const Tile& tile) {
    return shared_array<uint32_t>(2 * stage(tile.halves) + kRows * 4, kRows);
  }
  HOST_DEVICE static constexpr int bytes(int halves) { return 2 * stage(halves) + kRows * 8; }

 private:
  static constexpr int a_bytes = kRows * kPitch * 4, b_bytes = (kColumns + kExtra) * kPitch * 4;
  static constexpr int out_bytes = kRows * kOutPitch * 4;
  HOST_DEVICE static constexpr int stage(int halves) { return a_bytes + halves * b_bytes; }
  static_assert(out_bytes <= 2 * (a_bytes + b_bytes) && out_bytes <= a_bytes + 2 * b_bytes,
                "the finished tile takes the stages' place");
};

// A place: a position with one axis in each half of a word, so that places can be added. Each half is 2^14 more than the
// position, so neither leaves [0, 2^15) for positions within 2^14 of the origin. No step can reach zero.
DEVICE uint32_t place_of(int h, int w) { return (static_cast<uint32_t>(h) << 16) + static_cast<uint32_t>(w) + 0x40004000u; }

// Offsets are modulo 2^32: if a row plus a step is inside the source, their sum is the index of an element, of at most 2^31.
DEVICE uint32_t offset_of(const Strides& s, int n, int c, int h, int w) {
  return static_cast<uint32_t>(n * s.n + c * s.c + h * s.h + w * s.w);
}

// Writes the place of this thread's row of the tile in the source; one half does this.
DEVICE void write_row(const Gemm& g, const Tile& tile, const Place& place, int row) {
  const int h = place.h * g.step_h + g.h[tile.phase_h].origin, w = place.w * g.step_w + g.w[tile.phase_w].origin;
  Stages::offsets(tile).store(tile.thread, offset_of(g.strides, place.sample, tile.group * g.channels.d, h, w));
  Stages::places(tile).store(tile.thread, inside(row < tile.rows) ? place_of(h, w) : 0);
}

// One k: its tap's offset from a row and its channel in the group. A row's place plus `low` has the high bit of a half set if
// that axis is not before the source's beginning; plus `high`, if it is past its end.
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

DEVICE bool in_source(uint32_t place, uint32_t low, uint32_t high) {
  return inside(((place + low) & ~(place + high) & kHighBits) == kHighBits);
}
DEVICE bool in_source(uint32_t place, const Step& step) { return in_source(place, step.low, step.high); }

DEVICE uint32_t word_at(const Word4* words, int i) {
  const Word4& w = words[i / 4];
  return i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w;
}

// Sets element e of word i; the elements of a word must be set in order.
template <class Element>
DEVICE void put(Word4* words, int i, int e, Element value) {
  uint32_t bits;
  if constexpr (kPack<Element> == 1) {
    bits = bits_of(value);
  } else {
    bits = e == 0 ? value.bits : word_at(words, i) | static_cast<uint32_t>(value.bits) << 16;
  }
  Word4& w = words[i / 4];
  (i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w) = bits;
}

// The mask of A that zeroes no element. For other masks, `any`: whether there are bits; `bits`: those of a row's channels from
// a channel on, at an offset of (h, w) positions; `words`: whether `bits` gives 32 of them, not only the rest of a byte.
struct NoMask {
  DEVICE static bool any() { return false; }
  DEVICE static bool words() { return false; }
  DEVICE static uint32_t bits(int, int, int, int) { return 0; }
};

// `word` with the elements zeroed whose bits are not set.
template <class Element>
DEVICE uint32_t masked(uint32_t word, uint32_t bits) {
  if constexpr (kPack<Element> == 1) return bits & 1 ? word : 0u;
  return (bits & 1 ? word & 0x0000ffffu : 0u) | (bits & 2 ? word & 0xffff0000u : 0u);
}

template <class Element>
DEVICE Word4 masked(const Word4& v, uint32_t bits) {
  constexpr int pack = kPack<Element>;
  return Word4{masked<Element>(v.x, bits), masked<Element>(v.y, bits >> pack), masked<Element>(v.z, bits >> 2 * pack),
               masked<Element>(v.w, bits >> 3 * pack)};
}

// This thread's part of a k tile of A, with lanes along the channels: `rows` rows of two words, or of one 16-byte chunk. With
// single words, a warp has 16 of each of two rows that are 16 banks apart.
template <class Element, Access access, int halves>
struct Staged {
  static_assert(halves == 1, "only lanes along the positions share a row");
  static constexpr bool vector = access == Access::vector;
  static constexpr int pack = kPack<Element>;
  static constexpr int columns = vector ? 1 : 2;
  static constexpr int rows = vector ? kChunks : kWords / columns;

  Word4 words[kChunks];
  uint32_t offsets[rows];

  DEVICE Staged(const Gemm&, const Tile& tile, int) {
    UNROLL
    for (int i = 0; i < rows; ++i) offsets[i] = Stages::offsets(tile).load(row_of(i));
  }

  template <class Mask>
  DEVICE void load(const Gemm& g, const Tile& tile, int k, int k_end, const Mask& mask) {
    const Element* source = static_cast<const Element*>(g.source);
    uint32_t places[rows];
    UNROLL
    for (int i = 0; i < rows; ++i) places[i] = Stages::places(tile).load(row_of(i));
    UNROLL
    for (int j = 0; j < columns; ++j) {
      UNROLL
      for (int e = 0; e < (vector ? 1 : pack); ++e) {
        const Step step(g, tile, k + word_of(j) * pack + e, k_end);
        UNROLL
        for (int i = 0; i < rows; ++i) {
          const bool ok = in_source(places[i], step);
          const int64_t at = offsets[i] + step.offset;
          const uint32_t bits = ok && mask.any() ? mask.bits(row_of(i), step.h, step.w, step.channel) : ~0u;
          if constexpr (vector) {
            words[i] = masked<Element>(load_global16(source, at, ok), bits);
          } else {
            const Element value = load_global(source, at, ok);
            put<Element>(words, j * rows + i, e, bits & 1 ? value : Element{});
          }
        }
      }
    }
  }

  template <class Mask>
  DEVICE void store(const Tile& tile, int buffer, const Mask&) const {
    const Shared<uint32_t> a = Stages::a(tile, buffer);
    UNROLL
    for (int j = 0; j < columns; ++j) {
      UNROLL
      for (int i = 0; i < rows; ++i) {
        const int to = row_of(i) * kPitch + word_of(j);
        if constexpr (vector) {
          a.store16(to, words[i]);
        } else {
          a.store(to, word_at(words, j * rows + i));
        }
      }
    }
  }

 private:
  DEVICE static int word_of(int j) {
    return vector ? thread_index() % kChunks * 4 : thread_index() % 16 + 16 * j;
  }
  DEVICE static int row_of(int i) {
    if (vector) return thread_index() / kChunks + i * (kRows / kChunks);
    return warp_index() + lane_index() / 16 * 4 + 8 * i;
  }
};

// The same with lanes along the positions: a thread stages one row, or its half's part of one, so that a warp reads 32
// neighbours of one channel. It runs through k in order and reaches a new tap every `channels` elements.
template <class Element, int halves>
struct Staged<Element, Access::positions, halves> {
  static constexpr int pack = kPack<Element>, chunks = kChunks / halves, elements = chunks * 4 * pack;

  Word4 words[chunks];
  uint32_t bits[(elements + 31) / 32];
  uint32_t place, row, offset;  // place and offset of the row; offset of the next element
  int tap_h, tap_w, h, w;       // the tap and its offset in positions
  int turn;                     // elements of this thread before the next tap begins
  bool ok;

  DEVICE Staged(const Gemm& g, const Tile& tile, int k) {
    place = Stages::places(tile).load(tile.thread), row = Stages::offsets(tile).load(tile.thread);
    const int first = k + tile.half * elements, tap = g.channels.quotient(first), channel = first - tap * g.channels.d;
    tap_h = g.w[tile.phase_w].taps.quotient(tap);
    tap_w = tap - tap_h * g.w[tile.phase_w].taps.d;
    begin_tap(g, tile, channel);
    turn = g.channels.d - channel;
  }

  template <class Mask>
  DEVICE void load(const Gemm& g, const Tile& tile, int, int, const Mask& mask) {
    if (turn < elements) {
      gather<true>(g, tile, mask);
    } else if (ok) {
      gather<false>(g, tile, mask);
    } else {
      UNROLL
      for (int i = 0; i < chunks; ++i) words[i] = Word4{0, 0, 0, 0};
      offset += static_cast<uint32_t>(elements * g.strides.c);
    }
    turn -= elements;
    if constexpr (halves > 1) pass(g, tile);
  }

  // Applies the mask here, after the loads have arrived.
  template <class Mask>
  DEVICE void store(const Tile& tile, int buffer, const Mask& mask) const {
    const int to = tile.thread * kPitch + tile.half * chunks * 4;
    UNROLL
    for (int i = 0; i < chunks; ++i) {
      const uint32_t of = bits[i * 4 * pack / 32] >> i * 4 * pack % 32;
      Stages::a(tile, buffer).store16(to + i * 4, mask.any() ? masked<Element>(words[i], of) : words[i]);
    }
  }

 private:
  // `turns`: the k tile has elements of several taps; otherwise all are inside the source.
  template <bool turns, class Mask>
  DEVICE void gather(const Gemm& g, const Tile& tile, const Mask& mask) {
    const Element* source = static_cast<const Element*>(g.source);
    UNROLL
    for (int i = 0; i < elements; ++i) {
      if (turns && i == turn) next_tap(g, tile);
      const bool exists = !turns || ok;
      if (i % 8 == 0 && mask.any()) {  // then channels are whole octets, so each octet belongs to one tap
        if (i % 32 == 0) bits[i / 32] = 0;
        if (exists && (i % 32 == 0 || !mask.words())) {
          bits[i / 32] |= mask.bits(tile.thread, h, w, g.channels.d - turn + i) << i % 32;
        }
      }
      put<Element>(words, i / pack, i % pack, load_global(source, static_cast<int64_t>(offset), exists));
      offset += static_cast<uint32_t>(g.strides.c);
    }
  }

  DEVICE void begin_tap(const Gemm& g, const Tile& tile, int channel) {
    const Axis &axis_h = g.h[tile.phase_h], &axis_w = g.w[tile.phase_w];
    h = -tap_h * axis_h.advance, w = -tap_w * axis_w.advance;
    offset = row + offset_of(g.strides, 0, channel, h, w);
    ok = in_source(place, place_of(h, w), place_of(h - g.source_h, w - g.source_w)) && inside(tap_h < axis_h.taps.d);
  }

  DEVICE void next_tap(const Gemm& g, const Tile& tile) {
    if (++tap_w == g.w[tile.phase_w].taps.d) tap_w = 0, ++tap_h;
    begin_tap(g, tile, 0);
    turn += g.channels.d;
  }

  // Skips the elements that the other half stages.
  DEVICE void pass(const Gemm& g, const Tile& tile) {
    turn -= elements;
    offset += static_cast<uint32_t>(elements * g.strides.c);
    if (turn >= 0) return;
    while (turn < 0) next_tap(g, tile);
    offset += static_cast<uint32_t>((g.channels.d - turn) * g.strides.c);
  }
};

// Starts the copy of a k tile of the half's B. Columns and values of k that do not exist become zero.
template <class Element>
DEVICE void copy_b(const Gemm& g, const Tile& tile, int buffer, int k, int k_end) {
  constexpr int whole = 4 * kPack<Element>;
  const uint32_t* packed = static_cast<const uint32_t*>(g.packed);
  const Shared<uint32_t> b = Stages::b(tile, buffer);
  const int chunks = (tile.extra ? kColumns + kExtra : kColumns) * kChunks;
  for (int i = tile.thread; i < chunks; i += kRows) {
    const int column = tile.column + i / kChunks, at = k + i % kChunks * whole;
    const int64_t row = column < g.own ? tile.group * g.own + column : g.shared_row + column - g.own;
    const bool ok = inside(column < g.columns) && inside(at < k_end);
    const int64_t from = (row * g.pitch + g.base[tile.phase] + at) / kPack<Element>;
    async_copy16(b, i / kChunks * kPitch + i % kChunks * 4, packed, from, ok);
  }
}

}  // namespace lora_edge
