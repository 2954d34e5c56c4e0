// device.h and plan.h for builds without CUDA: there is no device, and every launch is refused with the reason. In a build for
// the emulator (LORA_EDGE_EMULATOR) the launchers are the real ones and only the device is missing.
#include "device.h"
#include "plan.h"

namespace lora_edge {

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;
std::string driver_problem() { return ""; }
int compiled_cuda_version() { return 0; }

#if defined(LORA_EDGE_EMULATOR)

DeviceInfo device_info() { return {0, 0, {}, "the emulator needs no device"}; }

#else

namespace {
constexpr const char* kWhy = "lora_edge._C was built without CUDA; put nvcc on PATH and install again with LORA_EDGE_CUDA=1";
}

DeviceInfo device_info() { return {0, 0, {}, kWhy}; }

const char* tt_fuse_forward(const Problem&, const FuseCall&, Stream) { return kWhy; }
const char* tt_fuse_backward(const Problem&, const FuseBackwardCall&, Stream) { return kWhy; }
const char* dora_fuse_forward(const Problem&, const DoraCall&, Stream) { return kWhy; }
const char* dora_fuse_backward(const Problem&, const DoraBackwardCall&, Stream) { return kWhy; }
const char* tt_block_forward(const Problem&, const ForwardCall&, Stream) { return kWhy; }
const char* tt_block_backward(const Problem&, const BackwardCall&, Stream) { return kWhy; }
const char* refusal(const Problem&, const char*) { return kWhy; }
Scratch scratch(const Problem&) { return {}; }

#endif

}  // namespace lora_edge
