// Accesses inside and outside of their arrays and buffers.
#include "case.h"

namespace lora_edge {
namespace {

CASE(copy) {
  const int t = thread_index();
  store_global16(p.y, 4 * t, load_global16(p.x, 4 * t, inside(t < p.n)));
}

CASE(poisoned) { store_global(p.y, thread_index(), shared_array<float>(0, 64).load(thread_index())); }

CASE(zero_fill) {
  const Shared<float> words = shared_array<float>(0, 256);
  const int t = thread_index();
  async_copy16(words, 4 * t, p.x, 4 * t, inside(t < p.n));
  async_commit();
  async_wait<0>();
  store_global16(p.y, 4 * t, words.load16(4 * t));
}

CASE(shared_past_the_array) { shared_array<float>(0, 63).store(thread_index(), 0.0f); }
CASE(shared_before_the_array) { shared_array<float>(256, 64).store(thread_index() - 1, 0.0f); }
CASE(shared_past_the_block) { shared_array<float>(0, 1025).store(thread_index(), 0.0f); }
CASE(shared_misaligned) { shared_array<float>(0, 1024).load16(4 * thread_index() + 1); }
CASE(shared_array_misaligned) { shared_array<float>(2, 64).store(thread_index(), 0.0f); }

CASE(matrix_misaligned) {
  uint32_t r[2];
  load_matrix2(r, shared_array<uint32_t>(0, 1024), 4 * lane_index() + 2);
}

CASE(global_past_the_end) { store_global(p.y, thread_index(), load_global(p.x, thread_index() + 1)); }
CASE(global_before_the_view) { store_global(p.y, thread_index(), load_global(p.x, thread_index() - 1)); }
CASE(global_misaligned) { store_global16(p.y, 4 * thread_index(), load_global16(p.x, thread_index())); }

CASE(async_past_the_end) {
  async_copy16(shared_array<float>(0, 1024), 4 * thread_index(), p.x, 4 * thread_index() + 4, true);
  async_commit();
  async_wait<0>();
}

CASE(stored_twice) { store_global(p.y, thread_index() / 2, 1.0f); }
CASE(stored_by_two_blocks) { store_global(p.y, thread_index(), 1.0f); }
CASE(input_written) { store_global(const_cast<float*>(p.x), thread_index(), 1.0f); }
CASE(stored_in_part) { store_global(p.y, thread_index(), 1.0f, inside(thread_index() < p.n)); }

CASE(read_in_the_launch_that_writes) {
  store_global(p.y, thread_index(), 1.0f);
  store_global(p.y, kThreads + thread_index(), load_global(static_cast<const float*>(p.y), thread_index()));
}

CASE(crash) { const_cast<volatile float*>(p.y)[p.n] = 1.0f; }

CASE(overflow) { store_global(p.y, thread_index(), static_cast<float>(p.n + thread_index())); }

}  // namespace
}  // namespace lora_edge
