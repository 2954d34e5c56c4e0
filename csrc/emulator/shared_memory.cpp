#include "shared_memory.h"

#include <cstring>
#include <vector>

#include "scheduler.h"
#include "trace.h"

namespace lora_edge::emulator {
namespace {

constexpr int kCellBytes = 2, kMostThreads = 1024, kMostWarps = 32;
constexpr uint16_t kNobody = 0xffff;
constexpr uint32_t kUnderWay = 0xffffffff;  // the time stamp of a copy that has not been waited for

struct Cell {
  uint32_t write_stamp, read_stamp;
  uint16_t writer, reader, second;
  uint16_t write_line, read_line, second_line;
};

struct Copy {
  int32_t at;
  uint32_t group;
  Site site;
  unsigned char bytes[16];
};

struct Copies {
  uint32_t committed = 0;
  std::vector<Copy> waiting;
};

alignas(256) unsigned char memory[256 * 1024];
Cell cells[sizeof memory / kCellBytes];
int memory_bytes;
uint32_t clock_ = 1, block_start = 1, warp_start[kMostWarps];
Copies copies[kMostThreads];

bool ordered_for(int thread, uint32_t stamp, int by) {
  return stamp < block_start || (thread / 32 == by / 32 && stamp < warp_start[thread / 32]);
}

// Reports a race of a thread's access with an earlier access of another thread.
[[noreturn]] void report(const char* kind, int at, int thread, const char* does, int other, const char* did, int line,
                         Site site) {
  now.thread = thread;
  fail(site, "race (%s) at byte %d of shared memory: thread %d %s what thread %d %s in line %d, with no barrier between", kind,
       at, thread, does, other, did, line);
}

// Reports the last write if `thread` (if `warp`, its whole warp) is not ordered after it.
inline void after_write(const Cell& cell, int thread, bool warp, bool writes, int at, Site site) {
  if (cell.write_stamp < block_start) return;
  if (cell.write_stamp == kUnderWay) {
    report("async copy", at, thread, writes ? "writes" : "reads", cell.writer, "began to copy and has not waited for",
           cell.write_line, site);
  }
  if ((!warp && cell.writer == thread) || ordered_for(thread, cell.write_stamp, cell.writer)) return;
  report(writes ? "write after write" : "read after write", at, thread, writes ? "overwrites" : "reads", cell.writer, "wrote",
         cell.write_line, site);
}

// Reports a reader if a write of `thread` is not ordered after its read.
inline void after_reads(const Cell& cell, int thread, int at, bool async, Site site) {
  if (cell.read_stamp < block_start) return;
  const int warp = thread / 32;
  const bool several = cell.second != kNobody, since_sync_warp = cell.read_stamp >= warp_start[warp];
  auto races = [&](int reader) { return reader / 32 != warp || (since_sync_warp && reader != thread); };
  const char* does = async ? "copies over" : "overwrites";
  if (races(cell.reader)) report("write after read", at, thread, does, cell.reader, "read", cell.read_line, site);
  if (several && races(cell.second)) report("write after read", at, thread, does, cell.second, "read", cell.second_line, site);
}

inline void note_read(Cell& cell, int thread, uint16_t line) {
  const uint16_t me = static_cast<uint16_t>(thread);
  const int warp = thread / 32;
  if (cell.read_stamp >= block_start) {
    if (cell.reader / 32 != warp) {
      if (cell.second == kNobody || cell.second / 32 == cell.reader / 32) cell.second = me, cell.second_line = line;
      return;
    }
    if (cell.second != kNobody && cell.second / 32 != warp) return;
    if (cell.read_stamp >= warp_start[warp]) {
      if (cell.reader != me && cell.second == kNobody) cell.second = me, cell.second_line = line;
      return;
    }
  }
  cell.read_stamp = clock_, cell.reader = me, cell.read_line = line, cell.second = kNobody;
}

inline void note_write(Cell& cell, int thread, uint32_t stamp, uint16_t line) {
  cell.write_stamp = stamp, cell.writer = static_cast<uint16_t>(thread), cell.write_line = line;
  cell.read_stamp = 0;
}

int checked(SharedRange range, int64_t at, int bytes, const char* verb, Site site) {
  const int64_t begin = range.begin + at;
  if (at < 0 || begin + bytes > range.end) {
    fail(site, "shared memory: %s %d bytes at byte %lld of an array of %d bytes", verb, bytes, static_cast<long long>(at),
         range.end - range.begin);
  }
  if (begin % bytes != 0) {
    fail(site, "shared memory: %s %d bytes at byte %lld, which is not aligned to them", verb, bytes,
         static_cast<long long>(begin));
  }
  return static_cast<int>(begin);
}

void note_writes(int begin, int bytes, bool async, Site site) {
  if (!options.ordered) return;
  for (int at = begin; at < begin + bytes; at += kCellBytes) {
    Cell& cell = cells[at / kCellBytes];
    after_write(cell, now.thread, false, true, at, site);
    after_reads(cell, now.thread, at, async, site);
    note_write(cell, now.thread, async ? kUnderWay : clock_, static_cast<uint16_t>(site.line));
  }
}

}  // namespace

SharedRange shared_range(int64_t begin, int64_t bytes, int64_t alignment, Site site) {
  if (begin < 0 || bytes < 0 || begin + bytes > memory_bytes) {
    fail(site, "shared memory: an array of bytes %lld to %lld, but the block has %d", static_cast<long long>(begin),
         static_cast<long long>(begin + bytes), memory_bytes);
  }
  if (begin % alignment != 0) {
    fail(site, "shared memory: an array at byte %lld, which is not aligned to its elements of %lld bytes",
         static_cast<long long>(begin), static_cast<long long>(alignment));
  }
  return {static_cast<int32_t>(begin), static_cast<int32_t>(begin + bytes)};
}

const void* shared_read(SharedRange range, int64_t offset, int bytes, Site site) {
  const int begin = checked(range, offset, bytes, "reads", site);
  if (tracing) trace_shared(Space::shared_read, begin, bytes, site);
  if (options.ordered) {
    for (int at = begin; at < begin + bytes; at += kCellBytes) {
      Cell& cell = cells[at / kCellBytes];
      after_write(cell, now.thread, false, false, at, site);
      note_read(cell, now.thread, static_cast<uint16_t>(site.line));
    }
  }
  return memory + begin;
}

void* shared_write(SharedRange range, int64_t offset, int bytes, Site site) {
  const int begin = checked(range, offset, bytes, "writes", site);
  if (tracing) trace_shared(Space::shared_write, begin, bytes, site);
  note_writes(begin, bytes, false, site);
  return memory + begin;
}

const uint32_t* shared_matrix_row(SharedRange range, int64_t offset, Site site) {
  const int begin = checked(range, offset, 16, "a matrix row reads", site);
  if (options.ordered) {
    const uint16_t line = static_cast<uint16_t>(site.line);
    for (int at = begin; at < begin + 16; at += kCellBytes) {
      Cell& cell = cells[at / kCellBytes];
      after_write(cell, now.thread, true, false, at, site);
      note_read(cell, now.thread, line);
      note_read(cell, now.thread ^ 1, line);
    }
  }
  return reinterpret_cast<const uint32_t*>(memory + begin);
}

void async_write(SharedRange range, int64_t offset, const void* bytes16, Site site) {
  const int begin = checked(range, offset, 16, "an async copy writes", site);
  if (tracing) trace_shared(Space::shared_write, begin, 16, site);
  note_writes(begin, 16, true, site);
  std::memset(memory + begin, 0xff, 16);
  Copies& mine = copies[now.thread];
  mine.waiting.push_back({begin, mine.committed, site, {}});
  std::memcpy(mine.waiting.back().bytes, bytes16, 16);
}

void async_commit() { ++copies[now.thread].committed; }

void async_wait(int newest) {
  Copies& mine = copies[now.thread];
  size_t kept = 0;
  for (const Copy& copy : mine.waiting) {
    if (copy.group + static_cast<uint32_t>(newest) >= mine.committed) {
      mine.waiting[kept++] = copy;
      continue;
    }
    std::memcpy(memory + copy.at, copy.bytes, 16);
    if (!options.ordered) continue;
    for (int at = copy.at; at < copy.at + 16; at += kCellBytes) {
      note_write(cells[at / kCellBytes], now.thread, clock_, static_cast<uint16_t>(copy.site.line));
    }
  }
  mine.waiting.resize(kept);
}

void shared_begin_block(int bytes, int threads) {
  memory_bytes = bytes;
  std::memset(memory, 0xff, static_cast<size_t>(bytes));
  if (clock_ > 1u << 30) shared_forget();
  shared_block_barrier();
  for (int thread = 0; thread < threads; ++thread) copies[thread].committed = 0;
}

void shared_end_thread(int thread) {
  if (copies[thread].waiting.empty()) return;
  fail(copies[thread].waiting.front().site, "the thread ended with an async copy that it did not wait for");
}

void shared_block_barrier() { block_start = ++clock_; }

void shared_warp_barrier(int warp) { warp_start[warp] = ++clock_; }

void shared_forget() {
  for (Cell& cell : cells) cell.write_stamp = cell.read_stamp = 0;
  for (Copies& thread : copies) thread.waiting.clear();
  for (uint32_t& start : warp_start) start = 0;
  clock_ = block_start = 1;
}

}  // namespace lora_edge::emulator
