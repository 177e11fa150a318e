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
    for (int i = 0; i < gpu_count(); ++i) {
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
      known.push_back(gpu);
    }
  }
  if (device < 0 || device >= static_cast<int>(known.size())) fail("CUDA: no GPU ", device, " here");
  return known[static_cast<std::size_t>(device)];
}

std::string gpu_name(int device) {
  cudaDeviceProp properties;
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

#endif

}  // namespace fastdl
