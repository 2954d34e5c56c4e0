// What the module asks of the CUDA runtime. device.cpp answers with the runtime's words; without_cuda.cpp where there is none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lora_edge {

// Makes `device` the current one while it lives. `error`: null, or why that failed.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const char* error = nullptr;

 private:
  int previous_ = -1;  // -1: nothing to restore
};

struct Device {
  std::string name;
  int major, minor, multiprocessors;
  int64_t memory, l2;  // bytes
};

struct DeviceInfo {
  int driver = 0, runtime = 0;  // CUDA versions as 1000 * major + 10 * minor; 0: none
  std::vector<Device> devices;
  std::string error;  // why there are no devices
};

DeviceInfo device_info();

// Why nothing can run with this driver, or empty.
std::string driver_problem();

// The CUDA version of the build, as above; 0: none.
int compiled_cuda_version();

}  // namespace lora_edge
