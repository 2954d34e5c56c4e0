// The source location of an access or barrier in a kernel; the default argument of every function of gpu.h that checks one.
#pragma once

namespace lora_edge::emulator {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace lora_edge::emulator
