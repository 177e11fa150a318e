#include "base/arena.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdl {
namespace {

struct Buffer {
  char* data;
  i64 size;
};

// Never destroyed: kernels may run in threads that outlive static destruction.
std::mutex& mutex() {
  static auto* m = new std::mutex;
  return *m;
}
std::vector<Buffer>& idle() {
  static auto* v = new std::vector<Buffer>;
  return *v;
}

constexpr i64 kHugePage = i64{2} << 20;

Buffer allocate(i64 bytes) {
  const i64 unit = bytes >= kHugePage ? kHugePage : 4096;
  const i64 size = (bytes + unit - 1) / unit * unit;
  void* p = nullptr;
  if (posix_memalign(&p, static_cast<std::size_t>(unit), static_cast<std::size_t>(size)) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (size >= kHugePage) madvise(p, static_cast<std::size_t>(size), MADV_HUGEPAGE);
#endif
  return {static_cast<char*>(p), size};
}

}  // namespace

void advise_fresh([[maybe_unused]] void* data, [[maybe_unused]] i64 bytes) {
#if defined(__linux__)
  constexpr i64 kMapped = i64{32} << 20;  // glibc's largest threshold
  if (bytes < kMapped) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end =
      (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

ArenaLease::ArenaLease(i64 bytes) : data_(nullptr), size_(0) {
  if (bytes <= 0) return;
  Buffer grown = {nullptr, 0};
  {
    std::lock_guard<std::mutex> lock(mutex());
    auto& buffers = idle();
    if (!buffers.empty()) {
      grown = buffers.back();
      buffers.pop_back();
    }
  }
  if (grown.size < bytes) {  // one buffer a concurrent caller, grown to the largest call seen
    std::free(grown.data);
    grown = allocate(bytes);
  }
  data_ = grown.data;
  size_ = grown.size;
}

ArenaLease::~ArenaLease() {
  if (!data_) return;
  std::lock_guard<std::mutex> lock(mutex());
  idle().push_back({data_, size_});
}

}  // namespace fastdl
