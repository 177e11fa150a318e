// Scratch memory of kernels: persistent, huge-page advised, one lease a running call.
#pragma once
#include "base/types.h"

namespace fastdl {

// A lease of at least `bytes`, 4096-byte aligned, contents undefined. Concurrent callers get different buffers;
// buffers are kept for the life of the process and reused. Throws std::bad_alloc.
class ArenaLease {
 public:
  explicit ArenaLease(i64 bytes);
  ~ArenaLease();
  ArenaLease(const ArenaLease&) = delete;
  ArenaLease& operator=(const ArenaLease&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  i64 size_;
};

// Asks for huge pages under an output that is about to be written. From 32 MB on torch's allocator maps every tensor
// anew, and a fresh 4 KB page costs 0.7 us; below, and for memory in use, nothing changes.
void advise_fresh(void* data, i64 bytes);

}  // namespace fastdl
