// The GPU interface that the kernels are written for; all launches, PTX and intrinsics are here. This is the implementation for
// devices; with LORA_EDGE_EMULATOR the same names run on the CPU (../emulator/gpu.h). Grids and blocks have one axis.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../plan.h"

#if !defined(LORA_EDGE_EMULATOR)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DEVICE inline
#define HOST_DEVICE inline
#endif

namespace lora_edge {

struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};

// Storage types with the layout of __half and __nv_bfloat16.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class T>
constexpr Type type_of = Type::f32;
template <>
constexpr Type type_of<Half> = Type::f16;
template <>
constexpr Type type_of<Bfloat> = Type::bf16;

// Computes n / d for 0 <= n < 2^31 and d >= 1 with a multiplication (Granlund and Montgomery, 1994).
struct Divider {
  int32_t d = 1;
  uint32_t multiplier = 1;
  int32_t shift = 0;

  Divider() = default;
  explicit Divider(int32_t divisor) : d(divisor) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - static_cast<uint64_t>(divisor)) << 32) / divisor + 1);
  }
  HOST_DEVICE int32_t quotient(int32_t n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

// Every bounds check and boundary mask is written as inside(...), one condition each: `make mutate` removes them one at a time.
HOST_DEVICE bool inside(bool condition) { return condition; }

}  // namespace lora_edge

#if defined(LORA_EDGE_EMULATOR)
#include "../emulator/gpu.h"
#else

#define KERNEL(threads, blocks_per_sm) __global__ __launch_bounds__(threads, blocks_per_sm)
#define GRID_CONSTANT __grid_constant__
#define UNROLL _Pragma("unroll")
#define LORA_EDGE_PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) LORA_EDGE_PRAGMA(unroll n)

namespace lora_edge {

inline const char* cuda_error_text(cudaError_t error) {
  static thread_local char text[256];
  std::snprintf(text, sizeof text, "CUDA error %d (%s): %s", static_cast<int>(error), cudaGetErrorName(error),
                cudaGetErrorString(error));
  return text;
}

// Null, or why the kernel could not be launched; the text stays valid until this thread's next failure.
template <class Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, Stream stream, const Params& params) {
  static_assert(sizeof(Params) <= 4096, "kernel parameters are at most 4 KB");
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the grid has more than 2147483647 blocks";
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), arguments,
                             static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, so torch's next check must not see it again
  return cuda_error_text(error);
}

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE int lane_index() { return static_cast<int>(threadIdx.x % 32); }
DEVICE int warp_index() { return static_cast<int>(threadIdx.x / 32); }

DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

DEVICE float to_float(float v) { return v; }
DEVICE float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
DEVICE float to_float(Bfloat v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

template <class T>
DEVICE T from_float(float v) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{__half_as_ushort(__float2half_rn(v))};
  } else if constexpr (std::is_same_v<T, Bfloat>) {
    return Bfloat{__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  } else {
    static_assert(std::is_same_v<T, float>);
    return v;
  }
}

template <class T>
struct Shared {
  T* base;

  DEVICE T load(int i) const { return base[i]; }
  DEVICE void store(int i, T v) const { base[i] = v; }
  DEVICE Word4 load16(int i) const { return *reinterpret_cast<const Word4*>(base + i); }
  DEVICE void store16(int i, Word4 v) const { *reinterpret_cast<Word4*>(base + i) = v; }
  template <class U>
  DEVICE Shared<U> as() const {
    return {reinterpret_cast<U*>(base)};
  }
};

template <class T>
DEVICE Shared<T> shared_array(int byte_offset, int /*count: the emulator checks it*/) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return {reinterpret_cast<T*>(dynamic_shared + byte_offset)};
}

// A launch never reads global memory that it writes, so loads may use the read-only path.
template <class T>
DEVICE T load_global(const T* base, int64_t i, bool ok = true) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4);
  if (!ok) return T{};
  if constexpr (std::is_arithmetic_v<T>) {
    return __ldg(base + i);
  } else {
    return T{__ldg(reinterpret_cast<const uint16_t*>(base) + i)};
  }
}

template <class T>
DEVICE Word4 load_global16(const T* base, int64_t i, bool ok = true) {
  if (!ok) return Word4{0, 0, 0, 0};
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(base + i));
  return Word4{v.x, v.y, v.z, v.w};
}

template <class T>
DEVICE void store_global(T* base, int64_t i, T v, bool ok = true) {
  if (ok) base[i] = v;
}

template <class T>
DEVICE void store_global16(T* base, int64_t i, Word4 v, bool ok = true) {
  if (ok) *reinterpret_cast<Word4*>(base + i) = v;
}

DEVICE float load_as_float(const void* base, Type type, int64_t i, bool ok = true) {
  if (type == Type::f32) return load_global(static_cast<const float*>(base), i, ok);
  if (type == Type::f16) return to_float(load_global(static_cast<const Half*>(base), i, ok));
  return to_float(load_global(static_cast<const Bfloat*>(base), i, ok));
}

DEVICE void store_float(void* base, Type type, int64_t i, float v, bool ok = true) {
  if (type == Type::f32) return store_global(static_cast<float*>(base), i, v, ok);
  if (type == Type::f16) return store_global(static_cast<Half*>(base), i, from_float<Half>(v), ok);
  store_global(static_cast<Bfloat*>(base), i, from_float<Bfloat>(v), ok);
}

DEVICE float square_root(float v) { return sqrtf(v); }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to element i of `to` from element j of `base`; if !ok, reads nothing and writes zeros.
template <class T>
DEVICE void async_copy16(Shared<T> to, int i, const T* base, int64_t j, bool ok) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.base + i)), "l"(ok ? base + j : base),
               "r"(ok ? 16 : 0)
               : "memory");
}

DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N newest groups of this thread are in flight. Other threads see the bytes after a barrier.
template <int N>
DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// `word` is the 16-byte aligned address of the row that this lane provides: row lane % 8 of matrix lane / 8.
DEVICE void load_matrix4(uint32_t (&r)[4], Shared<uint32_t> from, int word) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(from.base + word))
               : "memory");
}

// Lanes 0..15 provide the rows.
DEVICE void load_matrix2(uint32_t (&r)[2], Shared<uint32_t> from, int word) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(from.base + word))
               : "memory");
}

// d += a b with the fragment layouts of the PTX manual: m16n8k8 for tf32, m16n8k16 for the 16-bit types.
#define LORA_EDGE_MMA(NAME, SHAPE_AND_TYPES)                                            \
  DEVICE void NAME(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {   \
    asm("mma.sync.aligned." SHAPE_AND_TYPES                                             \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                \
  }
LORA_EDGE_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
LORA_EDGE_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
LORA_EDGE_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
#undef LORA_EDGE_MMA

// Rounds to the nearest tf32, ties away from zero; the tensor core itself would truncate the low 13 bits.
DEVICE uint32_t round_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

}  // namespace lora_edge

#endif
