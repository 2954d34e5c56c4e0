// Runs launches on the CPU: the threads of a block are fibers, which a seeded random schedule interleaves at barriers and warp
// collectives. The first error ends the launch, which returns the error's text.
#pragma once

#include <cstdint>

#include "shared_memory.h"
#include "site.h"

namespace lora_edge::emulator {

struct Launch {
  void (*run_thread)(const void* entry);
  const void* entry;
  const void* kernel;  // identifies the kernel in a trace
  int64_t blocks;
  int threads, shared_bytes;
};

// Returns null, or why the launch failed; the text is valid until the next launch.
const char* run(const Launch& launch);

// The thread that is running.
struct Now {
  int thread = 0, block = 0;
};
extern Now now;

struct Options {
  uint64_t seed = 1;    // of the schedule
  bool ordered = true;  // keep the happens-before record
};
extern Options options;

// Ends the launch with an error that names the source line, the block and the running thread.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

enum class Kind : uint8_t { sync_block, sync_warp, shuffle_xor, load_matrix4, load_matrix2, mma_tf32, mma_f16, mma_bf16 };

struct ShuffleOperands {
  uint32_t value;
  int mask;
  uint32_t result;
};

struct MatrixOperands {
  uint32_t* result;
  SharedRange range;
  int64_t at;  // bytes into the range
};

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Waits until all threads of the warp (for sync_block, of the block) have arrived; the last one does the work for all of them.
void collective(Kind kind, void* operands, Site site);

}  // namespace lora_edge::emulator
