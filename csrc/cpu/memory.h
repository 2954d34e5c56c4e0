// Memory of a thread that is kept from call to call, and what else the drivers share.
#pragma once

#include <cstddef>
#include <vector>

namespace lora_edge::cpu {

inline int up(int n, int to) { return (n + to - 1) / to * to; }

enum class Keep { zeros, composed, taps, suffix, sums, masked, transformed, filtered };

// At least `count` elements, whatever was in them; zeros at first.
template <class T, Keep which>
T* kept(size_t count) {
  static thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// A row of zeros, never written.
inline const float* zeros(int count) { return kept<float, Keep::zeros>(static_cast<size_t>(count)); }

}  // namespace lora_edge::cpu
