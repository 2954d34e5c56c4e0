// Where in a kernel's source an access or barrier stands; the default argument of every function of the host twin.
#pragma once

namespace lora_edge::host {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace lora_edge::host
