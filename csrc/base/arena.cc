#include "base/arena.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "base/sizes.h"

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
  const i64 size = round_up(bytes, unit);
  void* p = nullptr;
  if (posix_memalign(&p, static_cast<std::size_t>(unit), static_cast<std::size_t>(size)) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (size >= kHugePage) madvise(p, static_cast<std::size_t>(size), MADV_HUGEPAGE);
#endif
  return {static_cast<char*>(p), size};
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] i64 bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kUnit = kHugePage;
  const auto begin = reinterpret_cast<std::uintptr_t>(data), first = (begin + kUnit - 1) / kUnit * kUnit;
  const auto last = (begin + static_cast<std::uintptr_t>(bytes)) / kUnit * kUnit;
  if (bytes > 0 && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

ArenaLease::ArenaLease(i64 bytes) : data_(nullptr), size_(0) {
  if (bytes < 0) throw std::bad_alloc();  // a size that overflowed
  if (bytes == 0) return;
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
