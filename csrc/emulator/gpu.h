// The names of cuda/gpu.cuh on the CPU, with every access checked. Included only by gpu.cuh.
#pragma once

#include <cmath>
#include <cstring>

#include "global_memory.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "site.h"

#define KERNEL(threads, blocks_per_sm)
#define GRID_CONSTANT
#define UNROLL
#define UNROLL_BY(n)

namespace lora_edge {

using emulator::Site;

template <class Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, Stream, const Params& params) {
  static_assert(sizeof(Params) <= 4096, "kernel parameters are at most 4 KB");
  struct Entry {
    void (*kernel)(Params);
    const Params* params;
  } entry{kernel, &params};
  emulator::Launch launch;
  launch.run_thread = [](const void* of) {
    const Entry& e = *static_cast<const Entry*>(of);
    e.kernel(*e.params);
  };
  launch.entry = &entry;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.blocks = blocks, launch.threads = threads, launch.shared_bytes = shared_bytes;
  return emulator::run(launch);
}

inline int thread_index() { return emulator::now.thread; }
inline int block_index() { return emulator::now.block; }
inline int lane_index() { return emulator::now.thread % 32; }
inline int warp_index() { return emulator::now.thread / 32; }

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline float to_float(float v) { return v; }

inline float to_float(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));  // the product also normalises subnormals
}

inline float to_float(Bfloat v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

namespace emulator {

inline uint16_t half_bits(float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: the float32 addition rounds at bit 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline uint16_t bfloat_bits(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{emulator::half_bits(v)};
  } else if constexpr (std::is_same_v<T, Bfloat>) {
    return Bfloat{emulator::bfloat_bits(v)};
  } else {
    static_assert(std::is_same_v<T, float>);
    return v;
  }
}

// A range of the block's shared memory. Every access is checked for bounds and alignment and recorded for happens-before.
template <class T>
struct Shared {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "the happens-before record has cells of two bytes");
  emulator::SharedRange range;

  T load(int i, Site site = Site::here()) const { return read<T>(i, site); }
  void store(int i, T v, Site site = Site::here()) const { write(i, v, site); }
  Word4 load16(int i, Site site = Site::here()) const { return read<Word4>(i, site); }
  void store16(int i, Word4 v, Site site = Site::here()) const { write(i, v, site); }
  template <class U>
  Shared<U> as() const {
    return {range};
  }

 private:
  template <class V>
  V read(int i, Site site) const {
    V v;
    std::memcpy(&v, emulator::shared_read(range, int64_t{i} * static_cast<int64_t>(sizeof(T)), sizeof(V), site), sizeof(V));
    return v;
  }
  template <class V>
  void write(int i, V v, Site site) const {
    std::memcpy(emulator::shared_write(range, int64_t{i} * static_cast<int64_t>(sizeof(T)), sizeof(V), site), &v, sizeof(V));
  }
};

template <class T>
Shared<T> shared_array(int byte_offset, int count, Site site = Site::here()) {
  return {emulator::shared_range(byte_offset, int64_t{count} * static_cast<int64_t>(sizeof(T)), sizeof(T), site)};
}

template <class T>
T load_global(const T* base, int64_t i, bool ok = true, Site site = Site::here()) {
  emulator::global_read(base, i * static_cast<int64_t>(sizeof(T)), sizeof(T), ok, site);
  return ok ? base[i] : T{};
}

template <class T>
Word4 load_global16(const T* base, int64_t i, bool ok = true, Site site = Site::here()) {
  emulator::global_read(base, i * static_cast<int64_t>(sizeof(T)), 16, ok, site);
  Word4 v{0, 0, 0, 0};
  if (ok) std::memcpy(&v, base + i, 16);
  return v;
}

template <class T>
void store_global(T* base, int64_t i, T v, bool ok = true, Site site = Site::here()) {
  emulator::global_write(base, i * static_cast<int64_t>(sizeof(T)), sizeof(T), ok, site);
  if (ok) base[i] = v;
}

template <class T>
void store_global16(T* base, int64_t i, Word4 v, bool ok = true, Site site = Site::here()) {
  emulator::global_write(base, i * static_cast<int64_t>(sizeof(T)), 16, ok, site);
  if (ok) std::memcpy(base + i, &v, 16);
}

inline float load_as_float(const void* base, Type type, int64_t i, bool ok = true, Site site = Site::here()) {
  if (type == Type::f32) return load_global(static_cast<const float*>(base), i, ok, site);
  if (type == Type::f16) return to_float(load_global(static_cast<const Half*>(base), i, ok, site));
  return to_float(load_global(static_cast<const Bfloat*>(base), i, ok, site));
}

inline void store_float(void* base, Type type, int64_t i, float v, bool ok = true, Site site = Site::here()) {
  if (type == Type::f32) return store_global(static_cast<float*>(base), i, v, ok, site);
  if (type == Type::f16) return store_global(static_cast<Half*>(base), i, from_float<Half>(v), ok, site);
  store_global(static_cast<Bfloat*>(base), i, from_float<Bfloat>(v), ok, site);
}

inline float square_root(float v) { return std::sqrt(v); }

inline void sync_block(Site site = Site::here()) { emulator::collective(emulator::Kind::sync_block, nullptr, site); }
inline void sync_warp(Site site = Site::here()) { emulator::collective(emulator::Kind::sync_warp, nullptr, site); }

template <class T>
void async_copy16(Shared<T> to, int i, const T* base, int64_t j, bool ok, Site site = Site::here()) {
  const Word4 v = load_global16(base, j, ok, site);
  emulator::async_write(to.range, int64_t{i} * static_cast<int64_t>(sizeof(T)), &v, site);
}

inline void async_commit() { emulator::async_commit(); }

template <int N>
void async_wait() {
  emulator::async_wait(N);
}

inline uint32_t shuffle_xor(uint32_t v, int mask, Site site = Site::here()) {
  emulator::ShuffleOperands operands{v, mask, 0};
  emulator::collective(emulator::Kind::shuffle_xor, &operands, site);
  return operands.result;
}

inline float shuffle_xor(float v, int mask, Site site = Site::here()) { return float_of(shuffle_xor(bits_of(v), mask, site)); }

inline void load_matrix4(uint32_t (&r)[4], Shared<uint32_t> from, int word, Site site = Site::here()) {
  emulator::MatrixOperands operands{r, from.range, int64_t{word} * 4};
  emulator::collective(emulator::Kind::load_matrix4, &operands, site);
}

inline void load_matrix2(uint32_t (&r)[2], Shared<uint32_t> from, int word, Site site = Site::here()) {
  emulator::MatrixOperands operands{r, from.range, int64_t{word} * 4};
  emulator::collective(emulator::Kind::load_matrix2, &operands, site);
}

inline void mma(emulator::Kind kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  emulator::MmaOperands operands{d, a, {b0, b1}};
  emulator::collective(kind, &operands, site);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  mma(emulator::Kind::mma_tf32, d, a, b0, b1, site);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  mma(emulator::Kind::mma_f16, d, a, b0, b1, site);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  mma(emulator::Kind::mma_bf16, d, a, b0, b1, site);
}

inline uint32_t round_tf32(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffff) >= 0x7f800000) return bits;
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

}  // namespace lora_edge
