// Per-thread memory that is kept between calls, and other helpers of the drivers.
#pragma once

#include <cstddef>
#include <vector>

namespace lora_edge::cpu {

inline int up(int n, int to) { return (n + to - 1) / to * to; }

enum class Keep { zeros, composed, taps, suffix, sums, masked, transformed, filtered };

// At least `count` elements with their previous contents; initially zero.
template <class T, Keep which>
T* kept(size_t count) {
  static thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// A row of zeros, never written.
inline const float* zeros(int count) { return kept<float, Keep::zeros>(static_cast<size_t>(count)); }

}  // namespace lora_edge::cpu
