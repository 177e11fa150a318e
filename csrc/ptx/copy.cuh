// Copies between global and shared memory, and matrix fragments out of shared memory.
#pragma once
#include "ptx/target.cuh"

namespace fastdl {

#if FASTDL_TWIN

template <int bytes>
FASTDL_DEVICE void copy_async(void* dst, const void* src, int valid = bytes) {
  twin::copy_async(dst, src, bytes, valid);
}
FASTDL_DEVICE void copy_commit() { twin::copy_commit(); }
template <int groups>
FASTDL_DEVICE void copy_wait() {
  twin::copy_wait(groups);
}

FASTDL_DEVICE Pack<u32, 4> load_l2(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) twin::fail("ld.global: unaligned address");
  return *static_cast<const Pack<u32, 4>*>(p);
}
FASTDL_DEVICE float load_l2(const float* p) { return *p; }
FASTDL_DEVICE Pack<u32, 4> load_once(const void* p) { return load_l2(p); }

template <bool transposed>
FASTDL_DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) twin::fail("ldmatrix: unaligned row");
  const char* shared = static_cast<const char*>(twin::current().shared);
  if (static_cast<const char*>(row) < shared ||
      static_cast<const char*>(row) + 16 > shared + twin::current().shared_bytes)
    twin::fail("ldmatrix: the row is not in shared memory");
  twin::will_read(row, 16);
  twin::warp_collective(
      transposed ? "ldmatrix.trans" : "ldmatrix", row, r, [](const void* const* rows, void* const* out) {
        for (int m = 0; m < 4; ++m) {
          int banks[8] = {};  // of 16 bytes: rows of one matrix that share one are read one after the other
          for (int i = 0; i < 8; ++i) {
            const auto bank = reinterpret_cast<std::uintptr_t>(rows[8 * m + i]) / 16 % 8;
            twin::counts().conflicts += banks[bank]++ > 0;
          }
          for (int lane = 0; lane < kWarp; ++lane) {
            std::uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const int i = lane / 4, j = lane % 4 * 2 + e;
              pair[e] = static_cast<const std::uint16_t*>(rows[8 * m + (transposed ? j : i)])[transposed ? i : j];
            }
            static_cast<u32*>(out[lane])[m] = static_cast<u32>(pair[0]) | static_cast<u32>(pair[1]) << 16;
          }
        }
      });
}

#else

FASTDL_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// `bytes` (4, 8 or 16) from global to shared memory, both aligned to them; those beyond `valid` become zeros, and with
// valid = 0 src is not read.
template <int bytes>
FASTDL_DEVICE void copy_async(void* dst, const void* src, int valid = bytes) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(dst)), "l"(src), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                 :
                 : "r"(shared_address(dst)), "l"(src), "r"(valid), "n"(bytes)
                 : "memory");
}
FASTDL_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Waits until at most `groups` of this thread's groups are in flight; a barrier makes the others' visible too.
template <int groups>
FASTDL_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(groups) : "memory");
}

// From global memory past the multiprocessor's own cache: what other blocks of the grid write between two loads.
FASTDL_DEVICE Pack<u32, 4> load_l2(const void* p) {
  Pack<u32, 4> v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "l"(p));
  return v;
}
FASTDL_DEVICE float load_l2(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
// From global memory that nobody writes while the kernel runs and that this block reads once: past its cache, which
// keeps what is read more often.
FASTDL_DEVICE Pack<u32, 4> load_once(const void* p) {
  Pack<u32, 4> v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
      : "l"(p));
  return v;
}

// ldmatrix.x4: four 8x8 matrices of 2-byte elements. Lane l gives the address of row l % 8 of matrix l / 8, and gets of
// matrix m, in r[m], elements (l / 4, l % 4 * 2 and the next); `transposed`: of the matrix transposed.
template <bool transposed>
FASTDL_DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif

// Whether of the matrices transposed, the same in all lanes, as a value: one instruction of the two is switched off.
#if FASTDL_TWIN
FASTDL_DEVICE void load_matrices(u32 (&r)[4], const void* row, bool transposed) {
  transposed ? load_matrices<true>(r, row) : load_matrices<false>(r, row);
}
#else
FASTDL_DEVICE void load_matrices(u32 (&r)[4], const void* row, bool transposed) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %5, 0;\n"
      "@p ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
      "@!p ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
      "}"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(shared_address(row)), "r"(static_cast<int>(transposed))
      : "memory");
}
#endif

}  // namespace fastdl
