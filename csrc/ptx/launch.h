// launch(kernel, shape, stream, args): the one way in which kernels start. Errors of the launch are thrown; nothing
// waits for the GPU.
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

#if FASTDL_TWIN

template <class Args>
void launch(void (*kernel)(const Args), const LaunchShape& shape, const Stream&, const Args& args) {
  twin::run(shape.grid, shape.threads, static_cast<std::size_t>(shape.shared_bytes), shape.cooperative,
            [&] { kernel(args); });
}
inline int blocks_at_once(const void*, const Gpu& gpu, int, int) { return gpu.multiprocessors; }
inline void fill_zero(void* p, i64 bytes, const Stream&) { __builtin_memset(p, 0, static_cast<std::size_t>(bytes)); }

#else

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears it: the next call is judged by itself
    fail("CUDA: ", what, ": ", cudaGetErrorString(status));
  }
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
  const DeviceGuard guard(stream.device);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > 48 << 10)
    cuda_check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
               "shared memory of a kernel");
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
  cuda_check(cudaLaunchKernelExC(&config, function, parameters), "launch");
}

// Blocks of a cooperative launch that fit on the GPU together.
inline int blocks_at_once(const void* kernel, const Gpu& gpu, int threads, int shared_bytes) {
  int blocks = 0;
  if (shared_bytes > 48 << 10)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "occupancy");
  cuda_check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<std::size_t>(shared_bytes)),
      "occupancy");
  return blocks * gpu.multiprocessors;
}

inline void fill_zero(void* p, i64 bytes, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  cuda_check(cudaMemsetAsync(p, 0, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream.handle)),
             "cudaMemsetAsync");
}

#endif

}  // namespace fastdl
