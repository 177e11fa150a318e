// ThreadSanitizer takes each fiber for a thread: what two of them touch, one writing, with no barrier and no release
// and acquire between them, is a race, in whatever order the scheduler ran them. Warp instructions but bar.warp.sync
// order nothing. The scheduler's own memory is none of its business.
#pragma once
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif

namespace fastdl::twin {
namespace {

#if defined(__SANITIZE_THREAD__)
struct Unseen {
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
// Whoever goes has what all have who came to the meeting before.
inline void come(void* meeting) { __tsan_release(meeting); }
inline void go(void* meeting) { __tsan_acquire(meeting); }
#else
struct Unseen {
  ~Unseen() {}  // so that it counts as used
};
inline void come(void*) {}
inline void go(void*) {}
#endif

}  // namespace
}  // namespace fastdl::twin
