// Loads and stores elements of the three types as floats, one or 16 bytes at a time, and dispatches kernels by type.
#pragma once

#include "gpu.cuh"

namespace lora_edge {

template <class T>
constexpr int kWhole = 16 / static_cast<int>(sizeof(T));  // elements per 16-byte access

template <class T>
DEVICE void unpack(float* to, Word4 from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = float_of(words[i]);
    } else {
      to[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
      to[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

template <class T>
DEVICE Word4 pack(const float* from) {
  uint32_t words[4];
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = bits_of(from[i]);
    } else {
      words[i] = from_float<T>(from[2 * i]).bits | static_cast<uint32_t>(from_float<T>(from[2 * i + 1]).bits) << 16;
    }
  }
  return Word4{words[0], words[1], words[2], words[3]};
}

// Loads `count` neighbours: one element, or a multiple of 16 aligned bytes. If !ok, reads nothing and gives zeros.
template <class T, int count>
DEVICE void load_floats(float (&to)[count], const T* base, int64_t i, bool ok = true) {
  if constexpr (count == 1) {
    to[0] = to_float(load_global(base, i, ok));
  } else {
    static_assert(count % kWhole<T> == 0);
    UNROLL
    for (int j = 0; j < count; j += kWhole<T>) unpack<T>(to + j, load_global16(base, i + j, ok));
  }
}

template <class T, int count>
DEVICE void store_floats(T* base, int64_t i, const float (&from)[count], bool ok = true) {
  if constexpr (count == 1) {
    store_global(base, i, from_float<T>(from[0]), ok);
  } else {
    static_assert(count % kWhole<T> == 0);
    UNROLL
    for (int j = 0; j < count; j += kWhole<T>) store_global16(base, i + j, pack<T>(from + j), ok);
  }
}

// The same from and to shared memory; element i must be 16-byte aligned if count > 1.
template <int count>
DEVICE void load_floats(float (&to)[count], Shared<float> from, int i) {
  if constexpr (count == 1) {
    to[0] = from.load(i);
  } else {
    static_assert(count % 4 == 0);
    UNROLL
    for (int j = 0; j < count; j += 4) unpack<float>(to + j, from.load16(i + j));
  }
}

template <int count>
DEVICE void store_floats(Shared<float> to, int i, const float (&from)[count]) {
  if constexpr (count == 1) {
    to.store(i, from[0]);
  } else {
    static_assert(count % 4 == 0);
    UNROLL
    for (int j = 0; j < count; j += 4) to.store16(i + j, pack<float>(from + j));
  }
}

// Calls launch(T{}) with the storage type T of `type`.
template <class Launch>
const char* with_type(Type type, const Launch& launch) {
  if (type == Type::f32) return launch(float{});
  if (type == Type::f16) return launch(Half{});
  return launch(Bfloat{});
}

inline bool aligned16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline int32_t up_to_multiple(int32_t n, int32_t of) { return (n + of - 1) / of * of; }
inline int64_t quotient_up(int64_t n, int64_t of) { return (n + of - 1) / of; }

}  // namespace lora_edge
