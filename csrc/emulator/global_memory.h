// The buffers of a call. Where some are registered, every global access must lie in the view that it is made through, inputs
// are not written, outputs are written once in a run, scratch once in a launch, and what a launch writes it does not read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "site.h"

namespace lora_edge::host {

enum class Role { in, out, scratch };

struct Buffer {
  std::string name;
  Role role;
  char* data;
  int64_t begin, end;            // the view, in bytes from `data`
  std::vector<uint64_t> writer;  // of each byte, or 0
};

extern std::vector<Buffer> buffers;

// Forgets who wrote what: a new run of an op.
void global_begin_run();
void global_begin_launch();

// Check an access of `bytes` at byte `at` from `base`; nothing is touched where !ok.
void global_read(const void* base, int64_t at, int bytes, bool ok, Site site);
void global_write(const void* base, int64_t at, int bytes, bool ok, Site site);

// The first byte of the buffer's view that was not written, or -1.
int64_t global_unwritten(const Buffer& buffer);

}  // namespace lora_edge::host
