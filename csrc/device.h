// The device queries of the module. device.cpp implements them with the CUDA runtime, without_cuda.cpp for builds without CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lora_edge {

// Makes `device` the current device during its lifetime. `error`: null, or why that failed.
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
  std::string error;  // why there are no devices; empty if there are
};

DeviceInfo device_info();

// Why the kernels cannot run with this driver, or empty.
std::string driver_problem();

// The CUDA version of the build, encoded as above; 0: none.
int compiled_cuda_version();

}  // namespace lora_edge
