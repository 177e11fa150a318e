#include <cxxabi.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "ptx/device.h"
#include "ptx/launch.h"

namespace fastdl {

Gpu gpu_named(const std::string& name) {
  if (name == "sm80") return {80, 108, 163 << 10, 164 << 10, 65536, i64{40} << 20};
  if (name == "sm90") return {90, 132, 227 << 10, 228 << 10, 65536, i64{50} << 20};
  if (name == "sm86") return {86, 84, 99 << 10, 100 << 10, 65536, i64{6} << 20};
  fail("gpu: no GPU named '", name, "'; expected sm80, sm86 or sm90");
}

#if FASTDL_TWIN

int gpu_count() { return 1; }
Gpu gpu_info(int) { return gpu_named("sm80"); }
std::string gpu_name(int) { return "the host twin of an sm80"; }

#else

int gpu_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Gpu gpu_info(int device) {
  static std::mutex mutex;
  static std::vector<Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.empty()) {
    std::vector<Gpu> found;
    const int count = gpu_count();
    for (int i = 0; i < count; ++i) {
      const auto ask = [i](cudaDeviceAttr attribute) {
        int value = 0;
        cuda_check(cudaDeviceGetAttribute(&value, attribute, i), "cudaDeviceGetAttribute");
        return value;
      };
      Gpu gpu;
      gpu.sm = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
      gpu.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
      gpu.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
      gpu.shared_bytes_sm = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
      gpu.registers_sm = ask(cudaDevAttrMaxRegistersPerMultiprocessor);
      gpu.l2_bytes = ask(cudaDevAttrL2CacheSize);
      found.push_back(gpu);
    }
    known = found;
  }
  if (device < 0 || device >= static_cast<int>(known.size())) fail("CUDA: no GPU ", device, " here");
  return known[static_cast<std::size_t>(device)];
}

std::string gpu_name(int device) {
  cudaDeviceProp properties;
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

std::string cuda_error(cudaError_t status) {
  cudaGetLastError();
  std::string text = concat(cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
  switch (status) {  // those after which nothing runs on the GPU any more
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorLaunchFailure:
      return text +
             ": a kernel that began before, of fastdl or not, failed on the GPU, which this process cannot use any "
             "more; CUDA_LAUNCH_BLOCKING=1 shows which";
    case cudaErrorInitializationError:
      return text + ": CUDA does not work in a process that was forked after its first use";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return text + ": this build holds no code for this GPU that its driver takes (FASTDL_CUDA_CODE)";
    default:
      return text;
  }
}

std::string kernel_name(const void* function) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, function) != cudaSuccess || !mangled) {
    cudaGetLastError();
    return "a kernel";
  }
  char* readable = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  const std::string name = readable ? readable : mangled;
  std::free(readable);
  return name;
}

#endif

}  // namespace fastdl
