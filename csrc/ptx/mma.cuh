// D(16,8) = A(16,16) * B(16,8) + D, one warp: bf16 or f16 products, float32 sums (truncated, not rounded: promote them
// to ordinary additions every 128 to 256 K).
//
// Fragments (PTX ISA, mma.m16n8k16): with g = lane / 4, t = lane % 4, each register a pair of neighbours along K,
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)      b[0] (2t, g)  b[1] (2t + 8, g)
//   d[0] (g, 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1)
// So load_matrices of A's rows gives a (matrices: rows 0-7, rows 8-15, then the same of columns 8-15), and of B stored
// [N][K] b, of B stored [K][N] transposed b; d, packed in pairs, is the a of a next product.
#pragma once
#include "ptx/convert.cuh"

namespace fastdl {

#if FASTDL_TWIN

struct MmaIn {
  float* d;
  const u32* a;
  const u32* b;
};

template <class T>
FASTDL_DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const MmaIn in = {d, a, b};
  static_assert(sizeof(T) == 2, "bf16 or f16");
  twin::warp_collective("mma", &in, nullptr, [](const void* const* all, void* const*) {
    float A[16][16], B[16][8];
    const auto element = [](u32 pair, int e) { return to_float(T{static_cast<std::uint16_t>(pair >> 16 * e)}); };
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* in = static_cast<const MmaIn*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][2 * t + r / 2 * 8 + e] = element(in->a[r], e);
        for (int r = 0; r < 2; ++r) B[2 * t + r * 8 + e][g] = element(in->b[r], e);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* in = static_cast<const MmaIn*>(all[lane]);
      for (int r = 0; r < 4; ++r) {
        const int i = lane / 4 + r / 2 * 8, j = lane % 4 * 2 + r % 2;
        double sum = in->d[r];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(A[i][k]) * static_cast<double>(B[k][j]);
        float nearest = static_cast<float>(sum);
        if (std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(sum))
          nearest = std::nextafter(nearest, 0.0f);
        in->d[r] = nearest;
      }
    }
  });
}

#else

template <class T>
FASTDL_DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
FASTDL_DEVICE void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FASTDL_DEVICE void mma_16x8x16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace fastdl
