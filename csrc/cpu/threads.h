// Runs work on torch's own threads: a second pool of OpenMP threads on the same cores would cost more than it gains.
#pragma once

#include <functional>

namespace lora_edge::cpu {

// Calls work(0) .. work(count - 1), each once, on up to `threads` threads; the threads take the next index as they get free.
void parallel_for(int threads, int count, const std::function<void(int)>& work);

}  // namespace lora_edge::cpu
