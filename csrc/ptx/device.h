// What plans know of a GPU: plain data, so that plan() of any GPU runs on any machine.
#pragma once
#include <string>

#include "base/types.h"

namespace fastdl {

struct Gpu {
  int sm = 80;                      // compute capability: 80, 86, 89, 90, ...
  int multiprocessors = 108;        // the default is an A100's
  int shared_bytes = 163 << 10;     // a block may have
  int shared_bytes_sm = 164 << 10;  // of a multiprocessor, 1 KiB of which goes with each block
  int registers_sm = 65536;
  i64 l2_bytes = 40 << 20;
};

// sm80, sm86, sm90: what published data sheets say.
Gpu gpu_named(const std::string& name);  // throws Error naming the ones there are

int gpu_count();           // 0 where there is no GPU or no driver
Gpu gpu_info(int device);  // asked once; throws Error where there is none
std::string gpu_name(int device);

// The stream of a launch, and the GPU that it belongs to.
struct Stream {
  void* handle = nullptr;  // cudaStream_t
  int device = 0;
};

}  // namespace fastdl
