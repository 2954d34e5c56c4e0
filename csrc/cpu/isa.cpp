// Compiles kernels.h for each instruction set and chooses among them at run time.
#include "kernels_of.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lora_edge::cpu {

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are never passed between files

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
constexpr int kLanes = 16, kVectors = 4;
constexpr bool kHasAvx = true;
#include "kernels.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kLanes = 8, kVectors = 2;
constexpr bool kHasAvx = true;
#include "kernels.h"
}  // namespace avx2
#pragma GCC pop_options

#endif

namespace baseline {  // NEON on aarch64
constexpr int kLanes = 4, kVectors = 4;
constexpr bool kHasAvx = false;
#include "kernels.h"
}  // namespace baseline

namespace {

struct Choice {
  const Kernels* kernels;
  const char* name;
};

// The best instruction set that this processor supports, or the one named by LORA_EDGE_CPU if it is supported.
Choice choose() {
  std::vector<Choice> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back({&avx512::kernels, "avx512"});
  }
  if (fma) found.push_back({&avx2::kernels, "avx2"});
#endif
  found.push_back({&baseline::kernels, "baseline"});
  const char* wanted = std::getenv("LORA_EDGE_CPU");
  for (const Choice& choice : found) {
    if (wanted != nullptr && std::strcmp(wanted, choice.name) == 0) return choice;
  }
  return found[0];
}

const Choice& here() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const Kernels& kernels_here() { return *here().kernels; }
const char* instruction_set() { return here().name; }

}  // namespace lora_edge::cpu
