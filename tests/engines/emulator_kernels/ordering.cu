// Kernels with and without the barriers that their shared memory needs. y[i] is what thread i read in the end.
#include "case.h"

namespace lora_edge {
namespace {

DEVICE Shared<float> words() { return shared_array<float>(0, 1024); }
DEVICE float number(int thread) { return static_cast<float>(thread) + 1.0f; }
DEVICE void finish(const Case& p, float v) { store_global(p.y, thread_index(), v); }

CASE(exchange) {
  const int t = thread_index();
  words().store(t, number(t));
  sync_block();
  const float v = words().load(63 - t);
  sync_block();
  words().store(t, v);
  sync_block();
  finish(p, words().load(63 - t));
}

CASE(read_after_write) {
  words().store(thread_index(), number(thread_index()));
  finish(p, words().load(63 - thread_index()));
}

CASE(write_after_read) {
  words().store(thread_index(), number(thread_index()));
  sync_block();
  finish(p, words().load(63 - thread_index()));
  words().store(thread_index(), 0.0f);
}

CASE(write_after_write) {
  words().store(thread_index() / 2, 1.0f);
  finish(p, 0.0f);
}

CASE(neighbours_in_a_word) {
  const Shared<Half> halves = shared_array<Half>(0, 128);
  const int t = thread_index();
  halves.store(t, from_float<Half>(number(t)));
  finish(p, to_float(halves.load(t)));
}

CASE(warp_exchange) {
  const int t = thread_index();
  words().store(t, number(t));
  sync_warp();
  finish(p, words().load(t ^ 31));
}

CASE(warp_exchange_twice) {
  const int t = thread_index();
  words().store(t, number(t));
  sync_warp();
  const float v = words().load(t ^ 31);
  sync_warp();
  words().store(t, v);
  sync_warp();
  finish(p, words().load(t ^ 31));
}

CASE(missing_sync_warp) {
  words().store(thread_index(), number(thread_index()));
  finish(p, words().load(thread_index() ^ 1));
}

CASE(sync_warp_across_warps) {
  words().store(thread_index(), number(thread_index()));
  sync_warp();
  finish(p, words().load(thread_index() ^ 32));
}

CASE(shuffle_orders_nothing) {
  words().store(thread_index(), number(thread_index()));
  const float v = shuffle_xor(number(thread_index()), 1);
  finish(p, v + words().load(thread_index() ^ 1));
}

CASE(matrix_orders_nothing) {
  const Shared<uint32_t> bits = words().as<uint32_t>();
  UNROLL
  for (int i = 0; i < 4; ++i) bits.store(4 * thread_index() + i, 0);
  sync_block();
  uint32_t r[4];
  load_matrix4(r, bits, 4 * thread_index());
  bits.store(4 * thread_index(), 1);
  finish(p, float_of(r[0]));
}

CASE(matrix_of_an_own_row) {
  const Shared<uint32_t> bits = words().as<uint32_t>();
  UNROLL
  for (int i = 0; i < 4; ++i) bits.store(4 * thread_index() + i, 0);
  uint32_t r[4];
  load_matrix4(r, bits, 4 * thread_index());
  finish(p, float_of(r[0]));
}

// All threads read word 0 in warps of their own time, then one writes it: each reader races, whichever the record has kept.
CASE(one_writer_many_readers) {
  if (thread_index() == 0) words().store(0, 1.0f);
  sync_block();
  float v = words().load(0);
  sync_warp();
  v += words().load(0);
  sync_warp();
  if (thread_index() == 40) words().store(0, 2.0f);
  finish(p, v);
}

// The other warp's reads are before a block barrier and the own warp's before a sync_warp.
CASE(writer_after_all_readers) {
  if (thread_index() == 0) words().store(0, 1.0f);
  sync_block();
  float v = words().load(0);
  sync_block();
  if (warp_index() == 1) v += words().load(0);
  sync_warp();
  if (thread_index() == 40) words().store(0, 2.0f);
  sync_block();
  finish(p, v + words().load(0));
}

DEVICE void copy_mine(const Case& p) {
  const int t = thread_index();
  async_copy16(words(), 4 * t, p.x, 4 * t, inside(t < p.n));
}

CASE(async) {
  copy_mine(p);
  async_commit();
  async_wait<0>();
  sync_block();
  finish(p, words().load(255 - thread_index()));
}

CASE(async_own_bytes) {
  copy_mine(p);
  async_commit();
  async_wait<0>();
  finish(p, words().load(4 * thread_index() + 3));
}

CASE(async_two_groups) {
  const int t = thread_index();
  copy_mine(p);
  async_commit();
  async_copy16(words(), 256 + 4 * t, p.x, 4 * t, true);
  async_commit();
  async_wait<1>();
  const float first = words().load(4 * t);
  async_wait<0>();
  finish(p, first + words().load(256 + 4 * t));
}

CASE(async_wait_for_an_older_group) {
  const int t = thread_index();
  copy_mine(p);
  async_commit();
  async_copy16(words(), 256 + 4 * t, p.x, 4 * t, true);
  async_commit();
  async_wait<1>();
  finish(p, words().load(256 + 4 * t));
}

CASE(async_without_wait) {
  copy_mine(p);
  async_commit();
  sync_block();
  finish(p, words().load(255 - thread_index()));
}

CASE(async_without_commit) {
  copy_mine(p);
  async_wait<0>();
  finish(p, words().load(4 * thread_index()));
}

CASE(async_without_barrier) {
  copy_mine(p);
  async_commit();
  async_wait<0>();
  finish(p, words().load(255 - thread_index()));
}

CASE(async_over_readers) {
  words().store(thread_index(), 1.0f);
  sync_block();
  finish(p, words().load(63 - thread_index()));
  copy_mine(p);
  async_commit();
  async_wait<0>();
}

CASE(async_never_waited_for) {
  copy_mine(p);
  async_commit();
  finish(p, 0.0f);
}

CASE(divergent_barrier) {
  if (thread_index() < 40) sync_block();
  finish(p, 0.0f);
}

CASE(barriers_in_two_places) {
  if (warp_index() == 0) {
    sync_block();
  } else {
    sync_block();
  }
  finish(p, 0.0f);
}

CASE(barrier_against_shuffle) {
  float v = 0.0f;
  if (warp_index() == 0 || lane_index() != 0) {
    sync_block();
  } else {
    v = shuffle_xor(v, 1);
  }
  finish(p, v);
}

CASE(exited_lane) {
  if (thread_index() == 5) return;
  finish(p, shuffle_xor(0.0f, 1));
}

CASE(two_collectives) {
  float v = 0.0f;
  if (lane_index() < 16) {
    v = shuffle_xor(v, 1);
  } else {
    sync_warp();
  }
  finish(p, v);
}

// Every schedule gives another order of arrival at this counter, which the record must report too.
CASE(counter) {
  sync_block();
  const float v = thread_index() == 0 ? 0.0f : words().load(0);
  words().store(0, v + 1.0f);
  finish(p, v);
}

}  // namespace
}  // namespace lora_edge
