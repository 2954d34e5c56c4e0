#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"
#include "tensor_core.h"
#include "trace.h"

namespace lora_edge::emulator {

Now now;
Options options;

namespace {

constexpr int kMostThreads = 1024, kMostWarps = kMostThreads / 32, kMostSharedBytes = 163 * 1024;
constexpr uint32_t kWholeWarp = 0xffffffff;

struct Warp {
  uint32_t runnable, arrived, finished;  // lanes
  Kind kind;                             // what the arrived lanes wait for
  Site site;
  void* operands[32];
};

Fiber main_fiber, fibers[kMostThreads];
Warp warps[kMostWarps];
int warp_count, running, at_barrier, finished;
Site barrier_site;
uint32_t warps_runnable;           // by place in `warp_at`
int warp_at[kMostWarps], place_of[kMostWarps];
bool by_priority;
const Launch* current;
std::string error;
uint64_t random_state;

uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
  return static_cast<uint32_t>(random_state * 0x2545f4914f6cdd1d >> 32);
}

template <class T>
void shuffle(T* items, size_t count) {
  for (size_t i = count; i > 1; --i) std::swap(items[i - 1], items[random_bits() % i]);
}

const char* name_of(Kind kind) {
  static const char* const names[] = {"sync_block",   "sync_warp", "shuffle_xor", "load_matrix4",
                                      "load_matrix2", "mma_tf32",  "mma_f16",     "mma_bf16"};
  return names[static_cast<int>(kind)];
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

std::string text_of(Site site) { return std::string(base_name(site.file)) + ":" + std::to_string(site.line); }

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// A random set bit of a nonzero mask.
int any_bit(uint32_t mask) {
  const uint32_t from = random_bits() & 31;
  const uint32_t turned = mask >> from | mask << ((32 - from) & 31);
  return static_cast<int>((static_cast<uint32_t>(__builtin_ctz(turned)) + from) & 31);
}

void block_lane(int thread) {
  Warp& warp = warps[thread / 32];
  warp.runnable &= ~(1u << thread % 32);
  if (warp.runnable == 0) warps_runnable &= ~(1u << place_of[thread / 32]);
}

void wake(int warp, uint32_t lanes) {
  warps[warp].runnable |= lanes;
  if (lanes != 0) warps_runnable |= 1u << place_of[warp];
}

// Reports a deadlock: what the threads wait for, and which thread is missing.
[[noreturn]] void fail_stuck() {
  for (int w = 0; w < warp_count; ++w) {
    const Warp& warp = warps[w];
    if (warp.arrived == 0 || warp.kind == Kind::sync_block) continue;
    const int waits = w * 32 + __builtin_ctz(warp.arrived), other = w * 32 + __builtin_ctz(~warp.arrived);
    if (at_barrier > 0) {
      fail(barrier_site, "divergent barrier: %d of %d threads wait at sync_block, and thread %d waits at %s (%s)", at_barrier,
           current->threads, waits, name_of(warp.kind), text_of(warp.site).c_str());
    }
    fail(warp.site, "divergent warp: %d lanes of warp %d wait at %s, and thread %d has ended",
         __builtin_popcount(warp.arrived), w, name_of(warp.kind), other);
  }
  int gone = 0;
  while (gone < current->threads && (warps[gone / 32].finished >> gone % 32 & 1) == 0) ++gone;
  fail(barrier_site, "divergent barrier: %d of %d threads wait at sync_block, and thread %d has ended", at_barrier,
       current->threads, gone);
}

// Switches from the running thread, which has ended if `last`, to any thread that can run. In half of the blocks the warps have
// priorities, so that one runs far ahead of another.
void go_on(bool last = false) {
  if (warps_runnable == 0) fail_stuck();
  const int warp = warp_at[by_priority ? __builtin_ctz(warps_runnable) : any_bit(warps_runnable)];
  const int before = running;
  running = now.thread = warp * 32 + any_bit(warps[warp].runnable);
  if (running != before) switch_to(fibers[before], fibers[running], last);
}

void run_thread() {
  entered(main_fiber);
  current->run_thread(current->entry);
  const int thread = running;
  shared_end_thread(thread);
  warps[thread / 32].finished |= 1u << thread % 32;
  block_lane(thread);
  if (++finished == current->threads) switch_to(fibers[thread], main_fiber, true);
  go_on(true);
}

void load_matrices(const Warp& warp, int first_thread, int count, Site site) {
  for (int matrix = 0; matrix < count; ++matrix) {
    const uint32_t* rows[8];
    int row_bytes[8];
    for (int row = 0; row < 8; ++row) {
      const int lane = matrix * 8 + row;
      const MatrixOperands& operands = *static_cast<const MatrixOperands*>(warp.operands[lane]);
      now.thread = first_thread + lane;
      rows[row] = shared_matrix_row(operands.range, operands.at, site);
      row_bytes[row] = operands.range.begin + static_cast<int>(operands.at);
    }
    if (tracing) trace_matrix(row_bytes);
    for (int lane = 0; lane < 32; ++lane) {
      static_cast<MatrixOperands*>(warp.operands[lane])->result[matrix] = rows[lane / 4][lane % 4];
    }
  }
  now.thread = running;
}

void perform(Warp& warp, int index) {
  switch (warp.kind) {
    case Kind::sync_block:
      return;
    case Kind::sync_warp:
      return shared_warp_barrier(index);
    case Kind::shuffle_xor:
      for (int lane = 0; lane < 32; ++lane) {
        ShuffleOperands& mine = *static_cast<ShuffleOperands*>(warp.operands[lane]);
        mine.result = static_cast<const ShuffleOperands*>(warp.operands[(lane ^ mine.mask) & 31])->value;
      }
      return;
    case Kind::load_matrix4:
      return load_matrices(warp, index * 32, 4, warp.site);
    case Kind::load_matrix2:
      return load_matrices(warp, index * 32, 2, warp.site);
    default:
      return multiply(warp.kind, warp.operands);
  }
}

void arrive_at_barrier(Site site) {
  const int thread = running;
  Warp& warp = warps[thread / 32];
  if (at_barrier == 0) barrier_site = site;
  if (!same(site, barrier_site)) {
    fail(site, "divergent barrier: other threads wait at the sync_block of %s", text_of(barrier_site).c_str());
  }
  if (warp.arrived != 0 && warp.kind != Kind::sync_block) {
    fail(site, "divergent warp: a lane comes to sync_block while others wait at %s (%s)", name_of(warp.kind),
         text_of(warp.site).c_str());
  }
  warp.kind = Kind::sync_block, warp.site = site;
  warp.arrived |= 1u << thread % 32;
  block_lane(thread);
  if (++at_barrier == current->threads) {
    shared_block_barrier();
    if (tracing) trace_collective(Kind::sync_block, 0);
    at_barrier = 0;
    for (int w = 0; w < warp_count; ++w) warps[w].arrived = 0, wake(w, kWholeWarp);
  }
  go_on();
}

void run_block(int64_t block) {
  now.block = static_cast<int>(block);
  shared_begin_block(current->shared_bytes, current->threads);
  warp_count = current->threads / 32;
  at_barrier = finished = 0;
  by_priority = random_bits() % 2 == 0;
  std::iota(warp_at, warp_at + warp_count, 0);
  shuffle(warp_at, static_cast<size_t>(warp_count));
  warps_runnable = 0;
  for (int place = 0; place < warp_count; ++place) place_of[warp_at[place]] = place;
  for (int w = 0; w < warp_count; ++w) {
    warps[w].arrived = warps[w].finished = warps[w].runnable = 0;
    wake(w, kWholeWarp);
  }
  for (int thread = 0; thread < current->threads; ++thread) prepare(fibers[thread], thread, run_thread);
  running = now.thread = static_cast<int>(random_bits() % static_cast<uint32_t>(current->threads));
  switch_to(main_fiber, fibers[running]);
}

std::vector<int64_t> blocks_to_run(const Launch& launch) {
  if (trace_plan.on) return trace_launch(launch);
  std::vector<int64_t> blocks(static_cast<size_t>(launch.blocks));
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  shuffle(blocks.data(), blocks.size());
  return blocks;
}

const char* refused(const Launch& launch) {
  if (launch.blocks < 0 || launch.blocks > INT32_MAX) return "the grid has more than 2147483647 blocks";
  if (launch.threads <= 0 || launch.threads > kMostThreads || launch.threads % 32 != 0) {
    return "a block has whole warps of threads, at most 1024";
  }
  static const std::string too_much =
      "a block has at most " + std::to_string(kMostSharedBytes / 1024) + " KB of shared memory";
  return launch.shared_bytes < 0 || launch.shared_bytes > kMostSharedBytes ? too_much.c_str() : nullptr;
}

}  // namespace

void fail(Site site, const char* format, ...) {
  char text[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error = text_of(site) + ": block " + std::to_string(now.block) + ", thread " + std::to_string(now.thread) + ": " + text;
  switch_to(fibers[running], main_fiber, true);
  __builtin_unreachable();
}

void collective(Kind kind, void* operands, Site site) {
  if (kind == Kind::sync_block) return arrive_at_barrier(site);
  const int thread = running, lane = thread % 32;
  Warp& warp = warps[thread / 32];
  if (warp.arrived == 0) {
    warp.kind = kind, warp.site = site;
  } else if (warp.kind != kind || !same(warp.site, site)) {
    fail(site, "divergent warp: a lane comes to %s while others wait at %s (%s)", name_of(kind), name_of(warp.kind),
         text_of(warp.site).c_str());
  }
  warp.operands[lane] = operands;
  warp.arrived |= 1u << lane;
  block_lane(thread);
  if (warp.arrived == kWholeWarp) {
    if (tracing) trace_collective(kind, thread / 32);
    perform(warp, thread / 32);
    warp.arrived = 0;
    wake(thread / 32, kWholeWarp);
  }
  go_on();
}

const char* run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (launch.blocks == 0) return nullptr;
  if (const char* why = refused(launch)) return why;
  current = &launch;
  error.clear();
  main_fiber.stack = nullptr;
  random_state = (options.seed + 1) * 0x9e3779b97f4a7c15 + 1;
  global_begin_launch();
  for (const int64_t block : blocks_to_run(launch)) {
    if (trace_plan.on) trace_begin_block(block);
    run_block(block);
    if (!error.empty()) {
      shared_forget();
      for (Fiber& fiber : fibers) forget(fiber);
      tracing = false;
      return error.c_str();
    }
    if (trace_plan.on) trace_end_block();
  }
  return nullptr;
}

}  // namespace lora_edge::emulator
