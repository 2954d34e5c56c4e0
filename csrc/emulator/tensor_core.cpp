#include "tensor_core.h"

#include <cstring>

namespace lora_edge::emulator {
namespace {

float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

float from_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float magnitude = as_float(rest << 13) * 0x1p112f;
  return sign != 0 ? -magnitude : magnitude;
}

float from_bfloat(uint32_t bits) { return as_float(bits << 16); }

float from_tf32(uint32_t bits) { return as_float(bits & ~uint32_t{0x1fff}); }

// a (16, K), b (K, 8); each register of a lane holds `packed` neighbouring values of k.
template <int K, int packed, class Convert>
void multiply(void* const (&lanes)[32], Convert convert) {
  float a[16][K], b[K][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& operands = *static_cast<const MmaOperands*>(lanes[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, k = member * packed + i / 2 * (K / 2);
      for (int p = 0; p < packed; ++p) a[row][k + p] = convert(operands.a[i] >> (16 * p));
      d[group + i / 2 * 8][member * 2 + i % 2] = operands.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      for (int p = 0; p < packed; ++p) b[member * packed + i * (K / 2) + p][group] = convert(operands.b[i] >> (16 * p));
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& operands = *static_cast<const MmaOperands*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) operands.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply(Kind kind, void* const (&lanes)[32]) {
  if (kind == Kind::mma_tf32) return multiply<8, 1>(lanes, from_tf32);
  if (kind == Kind::mma_f16) return multiply<16, 2>(lanes, [](uint32_t bits) { return from_half(bits & 0xffff); });
  multiply<16, 2>(lanes, [](uint32_t bits) { return from_bfloat(bits & 0xffff); });
}

}  // namespace lora_edge::emulator
