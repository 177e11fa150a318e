// launch(kernel, shape, stream, args): the one way in which kernels start. Errors of the launch are thrown, with the
// kernel's name; nothing waits for the GPU.
#pragma once
#include "base/check.h"
#include "ptx/device.h"
#include "ptx/target.cuh"

#if !FASTDL_TWIN
#include <cuda_runtime.h>
#endif

namespace fastdl {

struct LaunchShape {
  int grid[3] = {1, 1, 1};  // at most 2^31 - 1, 65535, 65535
  int threads = kWarp;
  int shared_bytes = 0;
  bool cooperative = false;  // all blocks are on the GPU together: grid_sync works
};

// Throws Error for what no GPU from sm_80 on launches; `name` gives the kernel's, asked when it is needed.
template <class Name>
void require_launchable(const LaunchShape& shape, const Name& name) {
  constexpr int kMaxGrid = 65535, kMaxThreads = 1024, kMaxShared = 227 << 10;
  const auto& [x, y, z] = shape.grid;
  if (x < 1 || y < 1 || y > kMaxGrid || z < 1 || z > kMaxGrid || shape.threads < 1 || shape.threads > kMaxThreads ||
      shape.threads % kWarp != 0 || shape.shared_bytes < 0 || shape.shared_bytes > kMaxShared)
    fail("CUDA: launch of ", name(), ": no GPU takes a grid of ", x, " x ", y, " x ", z, " blocks, ", shape.threads,
         " threads, ", shape.shared_bytes, " bytes of shared memory");
}

#if FASTDL_TWIN

template <class Args>
void launch(void (*kernel)(const Args), const LaunchShape& shape, const Stream&, const Args& args) {
  require_launchable(shape, [] { return "a kernel"; });
  twin::run(shape.grid, shape.threads, static_cast<std::size_t>(shape.shared_bytes), shape.cooperative,
            [&] { kernel(args); });
}
inline void fill_zero(void* p, i64 bytes, const Stream&) { __builtin_memset(p, 0, static_cast<std::size_t>(bytes)); }

#else

// The error as text, and what it means where it is none of this call's. Clears it: the next call is judged by itself.
std::string cuda_error(cudaError_t status);
// As in its source, with template arguments; "a kernel" where the driver is too old to tell.
std::string kernel_name(const void* function);

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail("CUDA: ", what, ": ", cuda_error(status));
}

// As much dynamic shared memory as a block may have. Not what this launch takes: another thread may launch the same
// kernel with more between this call and the launch. `device` is the current one.
inline void allow_shared_memory(const void* function, int device, int shared_bytes) {
  if (shared_bytes <= 48 << 10) return;
  const cudaError_t status =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, gpu_info(device).shared_bytes);
  if (status != cudaSuccess) fail("CUDA: shared memory of ", kernel_name(function), ": ", cuda_error(status));
}

// Makes the stream's GPU the current one for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) cuda_check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

template <class Args>
void launch(void (*kernel)(const Args), const LaunchShape& shape, const Stream& stream, const Args& args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  require_launchable(shape, [&] { return kernel_name(function); });
  const DeviceGuard guard(stream.device);
  allow_shared_memory(function, stream.device, shape.shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid[0]), static_cast<unsigned>(shape.grid[1]),
                        static_cast<unsigned>(shape.grid[2]));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  void* parameters[] = {const_cast<Args*>(&args)};
  const cudaError_t status = cudaLaunchKernelExC(&config, function, parameters);
  if (status != cudaSuccess)
    fail("CUDA: launch of ", kernel_name(function), " with ", shape.grid[0], " x ", shape.grid[1], " x ", shape.grid[2],
         shape.cooperative ? " cooperating" : "", " blocks, ", shape.threads, " threads, ", shape.shared_bytes,
         " bytes of shared memory: ", cuda_error(status));
}

inline void fill_zero(void* p, i64 bytes, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  cuda_check(cudaMemsetAsync(p, 0, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream.handle)),
             "cudaMemsetAsync");
}

#endif

}  // namespace fastdl
