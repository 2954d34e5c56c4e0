// The block's shared memory: bounds, alignment, asynchronous copies, and the happens-before record.
//
// Time is one counter that every completed sync_block and sync_warp advances; nothing else orders shared memory. An access a is
// ordered before a later access b when they are one thread's, or a came before the block's last barrier, or they are of one
// warp and a came before that warp's last sync_warp. Every chain of barriers from a to b has one of the last two in it, so this
// is exact. A cell of two bytes keeps
//   its last write. Older writes are ordered before it, or were reported, so nothing is lost;
//   the readers since that write which a writer could race with: none; one thread; two threads of one warp, which stand for any
//   number of them; or two threads of different warps, which stand for any number. Reads before the last block barrier race
//   with nothing more and are dropped. Reads before their warp's last sync_warp race only with other warps, for which any
//   reader of that warp is as good. So a write that races with some read is reported, and no other.
// An asynchronous copy writes when it is issued, and until its thread waits for it every access to its bytes is a race, the
// thread's own too; the wait counts as a write of that thread. The bytes arrive in that wait and are NaN before.
#pragma once

#include <cstdint>

#include "site.h"

namespace lora_edge::host {

struct SharedRange {
  int32_t begin, end;  // bytes
};

SharedRange shared_range(int64_t begin, int64_t bytes, int64_t alignment, Site site);

// Check an access of `bytes` at byte `at` of the range, and say where the bytes are.
const void* shared_read(SharedRange range, int64_t at, int bytes, Site site);
void* shared_write(SharedRange range, int64_t at, int bytes, Site site);

// The 16-byte row of a matrix that the running thread names, read by the whole warp.
const uint32_t* shared_matrix_row(SharedRange range, int64_t at, Site site);

void async_write(SharedRange range, int64_t at, const void* bytes16, Site site);
void async_commit();
void async_wait(int newest);

// What the machine calls.
void shared_begin_block(int bytes, int threads);
void shared_end_thread(int thread);
void shared_block_barrier();
void shared_warp_barrier(int warp);
void shared_forget();  // after an error

}  // namespace lora_edge::host
