// The collectives of one warp, for comparison with plain arithmetic: `a`, `b` and `y` hold what each lane's registers do.
#include "case.h"

namespace lora_edge {
namespace {

struct Fragments {
  const uint32_t *a, *b;  // (times, 32, 4) and (times, 32, 2)
  float* y;               // (32, 4)
  int times;
};

using Multiply = void (*)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

void tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_tf32(d, a, b0, b1); }
void f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_f16(d, a, b0, b1); }
void bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(d, a, b0, b1); }

template <Multiply multiply>
KERNEL(32, 1) void multiply_kernel(const GRID_CONSTANT Fragments p) {
  const int lane = lane_index();
  float d[4] = {};
  for (int time = 0; time < p.times; ++time) {
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = load_global(p.a, (time * 32 + lane) * 4 + i);
    for (int i = 0; i < 2; ++i) b[i] = load_global(p.b, (time * 32 + lane) * 2 + i);
    multiply(d, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; ++i) store_global(p.y, lane * 4 + i, d[i]);
}

template <Multiply multiply>
const char* run_multiply(const emulator::Job& job) {
  const Fragments params{job.pointer<uint32_t>("a"), job.pointer<uint32_t>("b"), job.pointer<float>("y"),
                         static_cast<int>(job.number("times"))};
  return launch(multiply_kernel<multiply>, 1, 32, 0, nullptr, params);
}

const emulator::Register tf32_op({"mma_tf32", run_multiply<tf32>});
const emulator::Register f16_op({"mma_f16", run_multiply<f16>});
const emulator::Register bf16_op({"mma_bf16", run_multiply<bf16>});

// x (32, 8) halves are the rows of four matrices; y (4, 32, 2) is what the lanes hold.
template <int matrices>
KERNEL(32, 1) void matrix_kernel(const GRID_CONSTANT Case p) {
  const Shared<uint32_t> words = shared_array<uint32_t>(0, 128);
  const int lane = lane_index();
  words.store16(4 * lane, load_global16(p.x, 4 * lane));
  sync_warp();
  uint32_t r[4] = {};
  if constexpr (matrices == 4) {
    load_matrix4(r, words, 4 * lane);
  } else {
    uint32_t two[2];
    load_matrix2(two, words, lane < 16 ? 4 * lane : 0);
    r[0] = two[0], r[1] = two[1];
  }
  for (int i = 0; i < matrices; ++i) store_global(p.y, i * 32 + lane, float_of(r[i]));
}

template <int matrices>
const char* run_matrix(const emulator::Job& job) {
  return launch(matrix_kernel<matrices>, 1, 32, 512, nullptr, Case{job.pointer<float>("x"), job.pointer<float>("y"), 0});
}

const emulator::Register matrix4_op({"load_matrix4", run_matrix<4>});
const emulator::Register matrix2_op({"load_matrix2", run_matrix<2>});

CASE(butterfly) {
  float v = load_global(p.x, thread_index());
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  store_global(p.y, thread_index(), v);
}

// y (4, n): x rounded to tf32, half, bfloat and back, and x / 7 for whole x.
CASE(convert) {
  const Divider seven(7);
  for (int i = thread_index(); i < p.n; i += kThreads) {
    const float v = load_global(p.x, i);
    store_global(p.y, i, float_of(round_tf32(v)));
    store_global(p.y, p.n + i, to_float(from_float<Half>(v)));
    store_global(p.y, 2 * p.n + i, to_float(from_float<Bfloat>(v)));
    const bool whole = v >= 0.0f && v < 2147483648.0f;
    store_global(p.y, 3 * p.n + i, static_cast<float>(seven.quotient(whole ? static_cast<int>(v) : 0)));
  }
}

// Wavefronts that can be counted by hand: 1 + 32 of 4 bytes, 4 + 32 of 16 bytes, 4 + 32 of matrix rows.
CASE(banks) {
  const int lane = lane_index();
  const Shared<uint32_t> words = shared_array<uint32_t>(0, 1024);
  if (warp_index() > 0) return;
  words.store(lane, 0);
  sync_warp();
  words.store(32 * lane, 0);
  sync_warp();
  words.store16(4 * lane, Word4{});
  sync_warp();
  words.store16(32 * lane, Word4{});
  sync_warp();
  uint32_t r[4];
  load_matrix4(r, words, 4 * lane);
  load_matrix4(r, words, 32 * lane);
  load_global(p.x, lane);
  load_global(p.x, 8 * lane, inside(lane < 16));
}

template <int kind>
KERNEL(128, 1) void repeat_kernel(const GRID_CONSTANT Case p) {
  const Shared<uint32_t> words = shared_array<uint32_t>(0, 1024);
  uint32_t r[4] = {};
  float d[4] = {};
  for (int i = 0; i < 8; ++i) words.store(thread_index() + 128 * i, 0);
  sync_block();
  for (int i = 0; i < p.n; ++i) {
    if (kind == 0) mma_tf32(d, r, 0, 0);
    if (kind == 1) mma_f16(d, r, 0, 0);
    if (kind == 2) load_matrix4(r, words, 4 * thread_index());
    if (kind == 3) sync_block();
    if (kind == 4) r[0] = words.load16(4 * thread_index()).x;
  }
  store_global(p.y, thread_index(), d[0] + float_of(r[0]));
}

template <int kind>
const char* run_repeat(const emulator::Job& job) {
  const Case params{nullptr, job.pointer<float>("y"), static_cast<int>(job.number("n"))};
  return launch(repeat_kernel<kind>, 1, 128, 4096, nullptr, params);
}

const emulator::Register repeat_tf32({"repeat mma_tf32", run_repeat<0>});
const emulator::Register repeat_f16({"repeat mma_f16", run_repeat<1>});
const emulator::Register repeat_matrix({"repeat load_matrix4", run_repeat<2>});
const emulator::Register repeat_barrier({"repeat sync_block", run_repeat<3>});
const emulator::Register repeat_load({"repeat load16", run_repeat<4>});

}  // namespace
}  // namespace lora_edge
