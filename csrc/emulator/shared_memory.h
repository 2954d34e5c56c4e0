// The block's shared memory: bounds, alignment, asynchronous copies, and the happens-before record.
//
// Time is one counter that every completed sync_block and sync_warp advances; nothing else orders shared memory. An access a is
// ordered before a later access b if both are by one thread, or a was before the block's last barrier, or both are by one warp
// and a was before that warp's last sync_warp. Every chain of barriers from a to b contains one of the last two, so this is
// exact. A cell of two bytes records
//   its last write. Older writes are ordered before it or were reported, so nothing is lost;
//   the readers since that write with which a writer could race: none; one thread; two threads of one warp, which represent any
//   number of them; or two threads of different warps, which represent any number. Reads before the last block barrier can race
//   with nothing any more and are dropped. Reads before their warp's last sync_warp race only with other warps, for which any
//   reader of that warp will do. So exactly the writes that race with some read are reported.
// An asynchronous copy writes when it is issued. Until its thread waits for it, every access to its bytes is a race, even by
// the same thread; the wait counts as a write of that thread. The bytes arrive at that wait and are NaN before.
#pragma once

#include <cstdint>

#include "site.h"

namespace lora_edge::emulator {

struct SharedRange {
  int32_t begin, end;  // bytes
};

SharedRange shared_range(int64_t begin, int64_t bytes, int64_t alignment, Site site);

// Check an access of `bytes` bytes at byte `at` of the range, and return their address.
const void* shared_read(SharedRange range, int64_t at, int bytes, Site site);
void* shared_write(SharedRange range, int64_t at, int bytes, Site site);

// The 16-byte row of a matrix that the running thread provides; the whole warp reads it.
const uint32_t* shared_matrix_row(SharedRange range, int64_t at, Site site);

void async_write(SharedRange range, int64_t at, const void* bytes16, Site site);
void async_commit();
void async_wait(int newest);

// Called by the scheduler.
void shared_begin_block(int bytes, int threads);
void shared_end_thread(int thread);
void shared_block_barrier();
void shared_warp_barrier(int warp);
void shared_forget();  // after an error

}  // namespace lora_edge::emulator
