#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <link.h>
#endif

namespace lora_edge::cpu {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel in libgomp's ABI

#if defined(__linux__)
// torch's wheels ship their own libgomp under a name of their own; its symbols are not in the global scope.
int find_libgomp(dl_phdr_info* info, size_t, void* found) {
  const char* name = std::strrchr(info->dlpi_name, '/');
  if (name == nullptr || std::strncmp(name, "/libgomp", 8) != 0) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return 0;
  *static_cast<Parallel*>(found) = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  return *static_cast<Parallel*>(found) != nullptr ? 1 : 0;
}
#endif

Parallel parallel_of_torch() {
  Parallel found = nullptr;
#if defined(__linux__)
  dl_iterate_phdr(find_libgomp, &found);
#endif
  return found;
}

struct Job {
  const std::function<void(int)>& work;
  int count;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // the first one; an exception must not leave a thread of the pool

  static void run(void* self) {
    Job& job = *static_cast<Job*>(self);
    try {
      for (int i = job.next++; i < job.count; i = job.next++) job.work(i);
    } catch (...) {
      if (!job.failed.exchange(true)) job.error = std::current_exception();
      job.next = job.count;
    }
  }

  // Called when all threads have finished.
  void finish() const {
    if (failed) std::rethrow_exception(error);
  }
};

}  // namespace

void parallel_for(int threads, int count, const std::function<void(int)>& work) {
  Job job{work, count};
  threads = std::min(threads, count);
  static const Parallel parallel = parallel_of_torch();
  if (threads <= 1) {
    Job::run(&job);
  } else if (parallel != nullptr) {
    parallel(Job::run, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(Job::run, &job);
    Job::run(&job);
    for (std::thread& other : others) other.join();
  }
  job.finish();
}

}  // namespace lora_edge::cpu
