// The buffers of a call. If any are registered, every global access must be inside the view that it uses, inputs must not be
// written, outputs are written once per run and scratch once per launch, and a launch must not read what it writes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "site.h"

namespace lora_edge::emulator {

enum class Role { in, out, scratch };

struct Buffer {
  std::string name;
  Role role;
  char* data;
  int64_t begin, end;            // the view, in bytes from `data`
  std::vector<uint64_t> writer;  // the last writer of each byte, or 0
};

extern std::vector<Buffer> buffers;

// Starts a new run of an op: forgets all writers.
void global_begin_run();
void global_begin_launch();

// Check an access of `bytes` bytes at byte `at` from `base`; if !ok, the kernel accesses nothing.
void global_read(const void* base, int64_t at, int bytes, bool ok, Site site);
void global_write(const void* base, int64_t at, int bytes, bool ok, Site site);

// The first byte of the buffer's view that has not been written, or -1.
int64_t global_unwritten(const Buffer& buffer);

}  // namespace lora_edge::emulator
