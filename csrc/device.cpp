// device.h implemented with the CUDA runtime. Nothing here creates a context or waits for the device.
#include "device.h"

#include <cuda_runtime_api.h>

namespace lora_edge {
namespace {

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// Clears the error of a failed call, which the next launch check would otherwise report as its own.
const char* text_of(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  (void)cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  error = text_of(cudaGetDevice(&current));
  if (error != nullptr || current == device) return;
  error = text_of(cudaSetDevice(device));
  if (error == nullptr) previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) (void)text_of(cudaSetDevice(previous_));
}

int compiled_cuda_version() { return CUDART_VERSION; }

std::string driver_problem() {
  int driver = 0;
  if (text_of(cudaDriverGetVersion(&driver)) != nullptr || driver == 0) return "no NVIDIA driver is loaded on this machine";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver supports CUDA up to " + version_text(driver) + ", but lora_edge._C was built with " +
           version_text(CUDART_VERSION);
  }
  return "";
}

DeviceInfo device_info() {
  DeviceInfo info;
  (void)text_of(cudaDriverGetVersion(&info.driver));
  (void)text_of(cudaRuntimeGetVersion(&info.runtime));
  info.error = driver_problem();
  if (!info.error.empty()) return info;
  int count = 0;
  if (const char* error = text_of(cudaGetDeviceCount(&count))) {
    info.error = error;
    return info;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp about{};
    if (const char* error = text_of(cudaGetDeviceProperties(&about, i))) {
      info.error = error;
      break;
    }
    info.devices.push_back({about.name, about.major, about.minor, about.multiProcessorCount,
                            static_cast<int64_t>(about.totalGlobalMem), about.l2CacheSize});
  }
  return info;
}

}  // namespace lora_edge
