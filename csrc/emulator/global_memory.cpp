#include "global_memory.h"

#include <algorithm>

#include "scheduler.h"
#include "trace.h"

namespace lora_edge::emulator {

std::vector<Buffer> buffers;

namespace {

uint64_t launch_of_run;

// The writer's id: launch, block and thread.
uint64_t me() { return launch_of_run << 48 | static_cast<uint64_t>(now.block) << 16 | static_cast<uint64_t>(now.thread); }

Buffer* buffer_at(const char* address) {
  static size_t last;
  auto holds = [address](const Buffer& b) { return address >= b.data && address <= b.data + b.end; };
  if (last < buffers.size() && holds(buffers[last])) return &buffers[last];
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (holds(buffers[i])) return last = i, &buffers[i];
  }
  return nullptr;
}

Buffer* checked(const void* base, int64_t at, int bytes, const char* verb, Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(at);
  const char* bytes_at = reinterpret_cast<const char*>(address);
  Buffer* buffer = nullptr;
  if (!buffers.empty()) {
    buffer = buffer_at(static_cast<const char*>(base));
    if (buffer == nullptr) buffer = buffer_at(bytes_at);
    if (buffer == nullptr) fail(site, "global memory: %s %d bytes in no buffer of the call", verb, bytes);
    const int64_t from = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(buffer->data)) - buffer->begin;
    if (from < 0 || from + bytes > buffer->end - buffer->begin) {
      fail(site, "global memory: %s %d bytes at byte %lld of `%s`, which has %lld", verb, bytes, static_cast<long long>(from),
           buffer->name.c_str(), static_cast<long long>(buffer->end - buffer->begin));
    }
  }
  if (address % static_cast<uintptr_t>(bytes) != 0) {
    fail(site, "global memory: %s %d bytes of `%s` at an address that is not aligned to them", verb, bytes,
         buffer != nullptr ? buffer->name.c_str() : "?");
  }
  return buffer;
}

}  // namespace

void global_begin_run() {
  launch_of_run = 0;
  for (Buffer& buffer : buffers) {
    buffer.writer.assign(buffer.role == Role::in ? 0 : static_cast<size_t>(buffer.end), 0);
  }
}

void global_begin_launch() { ++launch_of_run; }

void global_read(const void* base, int64_t at, int bytes, bool ok, Site site) {
  if (tracing) trace_global(false, static_cast<const char*>(base) + (ok ? at : 0), bytes, ok, site);
  if (!ok) return;
  const Buffer* buffer = checked(base, at, bytes, "reads", site);
  if (buffer == nullptr || buffer->role == Role::in) return;
  const int64_t from = static_cast<const char*>(base) + at - buffer->data;
  for (int64_t byte = from; byte < from + bytes; ++byte) {
    const uint64_t writer = buffer->writer[static_cast<size_t>(byte)];
    if (writer >> 48 != launch_of_run) continue;
    fail(site, "global memory: reads byte %lld of `%s`, which block %d, thread %d writes in the same launch",
         static_cast<long long>(byte - buffer->begin), buffer->name.c_str(), static_cast<int>(writer >> 16 & 0xffffffff),
         static_cast<int>(writer & 0xffff));
  }
}

void global_write(const void* base, int64_t at, int bytes, bool ok, Site site) {
  if (tracing) trace_global(true, static_cast<const char*>(base) + (ok ? at : 0), bytes, ok, site);
  if (!ok) return;
  Buffer* buffer = checked(base, at, bytes, "writes", site);
  if (buffer == nullptr) return;
  if (buffer->role == Role::in) fail(site, "global memory: writes to the input `%s`", buffer->name.c_str());
  const int64_t from = static_cast<const char*>(base) + at - buffer->data;
  for (int64_t byte = from; byte < from + bytes; ++byte) {
    uint64_t& writer = buffer->writer[static_cast<size_t>(byte)];
    if (writer != 0 && (buffer->role == Role::out || writer >> 48 == launch_of_run)) {
      fail(site, "global memory: byte %lld of `%s` is written twice, before by block %d, thread %d",
           static_cast<long long>(byte - buffer->begin), buffer->name.c_str(), static_cast<int>(writer >> 16 & 0xffffffff),
           static_cast<int>(writer & 0xffff));
    }
    writer = me();
  }
}

int64_t global_unwritten(const Buffer& buffer) {
  const auto view = buffer.writer.begin() + buffer.begin;
  const auto found = std::find(view, buffer.writer.end(), uint64_t{0});
  return found == buffer.writer.end() ? -1 : found - view;
}

}  // namespace lora_edge::emulator
