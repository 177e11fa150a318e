// What the schedules of GEMM share: the parts of C, and where operands and results of a part lie.
#pragma once
#include <algorithm>

#include "gemm/gemm.h"

namespace fastdl {

struct Part {
  const void* a;
  const void* b;
  void* c;
  i64 c_offset;  // elements from args.c to c: residual and pre lie as C does
  i64 m_begin, m_end, n_begin, n_end;
};

// Part `index` of batch x grid_m x grid_n.
inline Part part_at(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, i64 index) {
  const i64 grid = i64{p.grid_m} * p.grid_n;
  i64 matrix = index / grid;
  const i64 im = index % grid / p.grid_n, in = index % p.grid_n;
  Part part = {args.a, args.b, args.c, 0, 0, 0, 0, 0};
  for (int i = args.batch.dims - 1; i >= 0; --i) {
    const i64 step = matrix % args.batch.size[i];
    matrix /= args.batch.size[i];
    part.a = at(part.a, step * args.batch.a[i], d.dtype);
    part.b = at(part.b, step * args.batch.b[i], d.dtype);
    part.c_offset += step * args.batch.c[i];
  }
  part.c = at(args.c, part.c_offset, d.dtype);
  const i64 nr = p.kernel->nr, panels = ceil_div(d.N, nr), unit = gemm_row_unit(*p.kernel),
            strips = ceil_div(d.M, unit);
  part.m_begin = std::min(d.M, strips * im / p.grid_m * unit);
  part.m_end = std::min(d.M, strips * (im + 1) / p.grid_m * unit);
  part.n_begin = panels * in / p.grid_n * nr;
  part.n_end = std::min(d.N, panels * (in + 1) / p.grid_n * nr);
  return part;
}

// Part whose operands are those of pair r.
inline Part pair_of(const GemmDesc& d, const GemmArgs& args, Part part, i64 r) {
  for (i64 i = args.pairs.dims - 1; i >= 0; r /= args.pairs.size[i--]) {
    part.a = at(part.a, r % args.pairs.size[i] * args.pairs.a[i], d.dtype);
    part.b = at(part.b, r % args.pairs.size[i] * args.pairs.b[i], d.dtype);
  }
  return part;
}

// What finishes sums of C(m.., n..), all but the sums themselves.
inline FinishArgs epilogue_at(const GemmDesc& d, const GemmArgs& args, const Part& part, i64 m, i64 n) {
  const i64 offset = m * args.c_row + n;
  FinishArgs f = {};
  f.c = at(part.c, offset, d.dtype), f.c_row = args.c_row, f.accumulate = args.accumulate;
  if (args.bias) f.bias = at(args.bias, n * args.bias_step, d.dtype), f.bias_step = args.bias_step;
  if (args.residual) f.residual = at(args.residual, part.c_offset + offset, d.dtype);
  if (args.pre) f.pre = at(args.pre, part.c_offset + offset, d.dtype);
  f.activation = args.activation;
  return f;
}

// The share of rows i to end, of m, in fetching `rows` rows of `per_row` cache lines.
inline Ahead share(const void* p, i64 step, i64 per_row, i64 rows, i64 i, i64 end, i64 m) {
  const i64 lines = rows * per_row, first = lines * i / m;
  if (lines <= 0) return {};
  return {static_cast<const char*>(p) + first / per_row * step, step, per_row, first % per_row,
          lines * end / m - first};
}

// out = the panels of B[k0 .. k0+depth, n0 .. n0+n], `kc` rows of storage each. Rows that are contiguous along N are
// read a few at a time over all panels, so that the memory stream runs along them.
inline void gemm_pack_block(const GemmDesc& d, const GemmKernel& kernel, const void* b, i64 depth, i64 n, i64 kc,
                            float* out, float* peak) {
  const i64 step = d.b_col == 1 ? std::max(8, kernel.k_step) : std::max<i64>(1, depth);
  for (i64 k = 0; k < depth; k += step) {
    for (i64 j = 0; j < n; j += kernel.nr) {
      kernel.helpers->pack_b(at(b, k * d.b_row + j * d.b_col, d.dtype), d.b_row, d.b_col, std::min(step, depth - k),
                             static_cast<int>(std::min<i64>(kernel.nr, n - j)), kernel.nr,
                             out + j * gemm_packed_steps(kc, kernel) + gemm_packed_steps(k, kernel) * kernel.nr,
                             peak ? peak + j : nullptr);
    }
  }
}

// The smallest of n largest magnitudes, at most 1: zeros lose nothing.
inline float least_peak(const float* peak, i64 n) {
  float least = 1;
  for (i64 i = 0; i < n; ++i) least = peak[i] > 0 ? std::min(least, peak[i]) : least;
  return least;
}
// Whether rows and columns of these magnitudes may lose parts or sums on tiles: see kTinyPeak.
inline bool tiles_lose(float a_least, float b_least) {
  return a_least < kTinyPeak || b_least < kTinyPeak || a_least * b_least < kTinyProduct;
}

// The strips of a part, see strips.cc; memory: as the plan says. False: tiles may have got some of C wrong.
bool gemm_run_strips(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& whole, char* memory);

}  // namespace fastdl
