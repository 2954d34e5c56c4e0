// The products of a k tile: each thread has 72 sums of the tile.
// Work per k tile: FP32, an 8 x 8 micro tile per thread, 16 shared loads of 16 bytes for 256 multiply-adds; tensor cores, 32
// rows x 64 columns per warp, 6 ldmatrix for 16 mma. The extra fragment adds one column to the former, two mma to the latter.
#pragma once

#include "tt_conv_stage.cuh"

namespace lora_edge {

struct Fp32 {
  using Element = float;
  static constexpr bool tensor_cores = false, rounded = false;
};

struct Tf32 {
  using Element = float;
  static constexpr bool tensor_cores = true, rounded = true;
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_tf32(d, a, b0, b1); }
};

struct F16 {
  using Element = Half;
  static constexpr bool tensor_cores = true, rounded = false;
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_f16(d, a, b0, b1); }
};

struct Bf16 {
  using Element = Bfloat;
  static constexpr bool tensor_cores = true, rounded = false;
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(d, a, b0, b1); }
};

// The sums of one thread of a half. FP32: rows thread / 8 + 16 i, columns thread % 8 + 8 j, at v[i * 9 + j]. Tensor cores: the
// fragments of rows 32 warp + 16 i and columns 8 j, at v[(i * 9 + j) * 4 ...].
template <class Unit>
struct Sums {
  float v[kColumns + kExtra];

  DEVICE void clear() {
    UNROLL
    for (int i = 0; i < kColumns + kExtra; ++i) v[i] = 0.0f;
  }

  // Initialises the sums with one number per column instead of zero.
  DEVICE void begin(Shared<float> columns) {
    UNROLL
    for (int j = 0; j < 9; ++j) {
      UNROLL
      for (int i = 0; i < 8; ++i) {
        if constexpr (Unit::tensor_cores) {
          v[(i / 4 * 9 + j) * 4 + i % 4] = columns.load(j * 8 + lane_index() % 4 * 2 + i % 2);
        } else {
          v[i * 9 + j] = columns.load(thread_index() % 8 + 8 * j);
        }
      }
    }
  }

  // Adds the products of the first `words` words of the k tile; the rest of it is zero.
  DEVICE void add(const Tile& tile, int buffer, int words) {
    tile.extra ? add_tile<9>(tile, buffer, words) : add_tile<8>(tile, buffer, words);
  }

  // Writes the finished tile over the stages.
  DEVICE void store(const Tile& tile) const {
    const Shared<float> out = Stages::out(tile);
    const bool upper = lane_index() >= 16;  // half of the lanes begin with odd columns, so that the 32 lanes use 32 banks
    UNROLL
    for (int j = 0; j < 9; ++j) {
      if (j == 8 && !tile.extra) break;
      if constexpr (Unit::tensor_cores) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = (tile.thread / 32 * 32 + i * 8 + lane_index() / 4) * kOutPitch + j * 8 + lane_index() % 4 * 2;
          const float* pair = v + (i / 2 * 9 + j) * 4 + i % 2 * 2;
          out.store(at + (upper ? 1 : 0), upper ? pair[1] : pair[0]);
          out.store(at + (upper ? 0 : 1), upper ? pair[0] : pair[1]);
        }
      } else {
        UNROLL
        for (int i = 0; i < 8; ++i) {
          out.store((tile.thread / 8 + 16 * i) * kOutPitch + tile.thread % 8 + 8 * j, v[i * 9 + j]);
        }
      }
    }
  }

 private:
  template <int fragments>
  DEVICE void add_tile(const Tile& tile, int buffer, int words) {
    const Shared<uint32_t> a = Stages::a(tile, buffer), b = Stages::b(tile, buffer);
    if constexpr (Unit::tensor_cores) {
      const int lane = lane_index(), row = tile.thread / 32 * 32;
      UNROLL
      for (int word = 0; word < kWords; word += 8) {
        if (word >= words) break;
        uint32_t fa[2][4], fb[fragments][2];
        UNROLL
        for (int i = 0; i < 2; ++i) {
          load_matrix4(fa[i], a, (row + i * 16 + lane % 16) * kPitch + word + lane / 16 * 4);
          if constexpr (Unit::rounded) {  // rounded here, also once per element, so that dcore sums unrounded values
            UNROLL
            for (int n = 0; n < 4; ++n) fa[i][n] = round_tf32(float_of(fa[i][n]));
          }
        }
        UNROLL
        for (int j = 0; j < 8; j += 2) {
          uint32_t pair[4];
          load_matrix4(pair, b, (j * 8 + lane % 8 + lane / 16 * 8) * kPitch + word + lane / 8 % 2 * 4);
          fb[j][0] = pair[0], fb[j][1] = pair[1], fb[j + 1][0] = pair[2], fb[j + 1][1] = pair[3];
        }
        if constexpr (fragments == 9) load_matrix2(fb[8], b, (kColumns + lane % 8) * kPitch + word + lane / 8 % 2 * 4);
        UNROLL
        for (int i = 0; i < 2; ++i) {
          UNROLL
          for (int j = 0; j < fragments; ++j) {
            float(&sum)[4] = *reinterpret_cast<float(*)[4]>(v + (i * 9 + j) * 4);
            Unit::mma(sum, fa[i], fb[j][0], fb[j][1]);
          }
        }
      }
    } else {
      const int row = tile.thread / 8, column = tile.thread % 8;
      UNROLL_BY(1)
      for (int word = 0; word < words; word += 4) {
        float fb[fragments][4];
        UNROLL
        for (int j = 0; j < fragments; ++j) load4(fb[j], b, (column + 8 * j) * kPitch + word);
        UNROLL
        for (int i = 0; i < 8; ++i) {
          float fa[4];
          load4(fa, a, (row + 16 * i) * kPitch + word);
          UNROLL
          for (int k = 0; k < 4; ++k) {
            UNROLL
            for (int j = 0; j < fragments; ++j) v[i * 9 + j] += fa[k] * fb[j][k];
          }
        }
      }
    }
  }

  DEVICE static void load4(float (&to)[4], Shared<uint32_t> from, int word) {
    const Word4 w = from.load16(word);
    to[0] = float_of(w.x), to[1] = float_of(w.y), to[2] = float_of(w.z), to[3] = float_of(w.w);
  }
};

}  // namespace lora_edge
