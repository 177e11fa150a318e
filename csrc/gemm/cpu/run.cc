// The GEMM schedule: C is cut into parts, and each part walks K blocks, N blocks, M blocks, then register tiles
// (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008). A thread packs what its own
// parts need, so nothing is shared and no thread waits for another.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "gemm/gemm.h"

namespace fastdl {
namespace {

struct Part {
  const float* a;
  const float* b;
  float* c;
  i64 m_begin, m_end, n_begin, n_end;
};

// Part `index` of batch x grid_m x grid_n.
Part part_at(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, i64 index) {
  const i64 grid = i64{p.grid_m} * p.grid_n;
  i64 matrix = index / grid;
  const i64 im = index % grid / p.grid_n, in = index % p.grid_n;
  Part part = {args.a, args.b, args.c, 0, 0, 0, 0};
  for (int i = args.batch.dims - 1; i >= 0; --i) {
    const i64 at = matrix % args.batch.size[i];
    matrix /= args.batch.size[i];
    part.a += at * args.batch.a[i];
    part.b += at * args.batch.b[i];
    part.c += at * args.batch.c[i];
  }
  const i64 nr = p.kernel->nr, panels = (d.N + nr - 1) / nr;
  part.m_begin = d.M * im / p.grid_m;
  part.m_end = d.M * (im + 1) / p.grid_m;
  part.n_begin = panels * in / p.grid_n * nr;
  part.n_end = std::min(d.N, panels * (in + 1) / p.grid_n * nr);
  return part;
}

// out = the panels of B[k0 .. k0+depth, n0 .. n0+n], `kc` rows of storage each. Rows that are contiguous along N are
// read a few at a time over all panels, so that the memory stream runs along them.
void pack_b(const GemmDesc& d, const GemmKernel& kernel, const float* b, i64 depth, i64 n, i64 kc, float* out) {
  const i64 step = d.b_col == 1 ? 8 : depth;
  for (i64 k = 0; k < depth; k += step) {
    for (i64 j = 0; j < n; j += kernel.nr) {
      kernel.pack(b + k * d.b_row + j * d.b_col, d.b_row, d.b_col, std::min(step, depth - k),
                  static_cast<int>(std::min<i64>(kernel.nr, n - j)), kernel.nr, out + j * kc + k * kernel.nr);
    }
  }
}

void pack_a(const GemmDesc& d, const GemmPlan& p, const float* a, i64 depth, i64 m, float* out) {
  for (i64 i = 0; i < m; i += p.tile_m) {
    p.kernel->pack(a + i * d.a_row, d.a_col, d.a_row, depth, static_cast<int>(std::min<i64>(p.tile_m, m - i)), p.tile_m,
                   out + i * depth);
  }
}

// All register tiles of one block: A[m x depth] in blocks.a, B[depth x n] in blocks.b.
struct Blocks {
  const float* a;
  i64 a_tile, a_row, a_col;  // a_tile: from one row of tiles to the next
  const float* b;
  i64 b_panel, b_row, b_col;  // b_panel: from one panel to the next
};

void run_tiles(const GemmPlan& p, const Blocks& x, TileArgs t, i64 m, i64 n) {
  float* const c = t.c;
  const float* const bias = t.bias;
  t.a_row = x.a_row, t.a_col = x.a_col, t.b_row = x.b_row, t.b_col = x.b_col;
  for (i64 j = 0; j < n; j += p.kernel->nr) {
    t.b = x.b + j / p.kernel->nr * x.b_panel;
    t.n = static_cast<int>(std::min<i64>(p.kernel->nr, n - j));
    if (bias) t.bias = bias + j * t.bias_step;
    for (i64 i = 0; i < m; i += p.tile_m) {
      t.a = x.a + i / p.tile_m * x.a_tile;
      t.c = c + i * t.c_row + j;
      t.m = static_cast<int>(std::min<i64>(p.tile_m, m - i));
      p.kernel->tile(t);
    }
  }
}

void run_part(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& part, char* scratch) {
  float* const a_block = reinterpret_cast<float*>(scratch);
  float* const b_block = reinterpret_cast<float*>(scratch + p.a_bytes);
  const i64 nr = p.kernel->nr;
  i64 k0 = 0;
  do {  // once for K = 0 too: C is the bias then
    const i64 depth = std::min(p.kc, d.K - k0);
    i64 packed_m = -1;  // the row of A that a_block begins with
    for (i64 n0 = part.n_begin; n0 < part.n_end; n0 += p.nc) {
      const i64 n = std::min(p.nc, part.n_end - n0);
      Blocks x;
      if (p.pack_b) {
        pack_b(d, *p.kernel, part.b + k0 * d.b_row + n0 * d.b_col, depth, n, depth, b_block);
        x.b = b_block, x.b_panel = depth * nr, x.b_row = nr, x.b_col = 1;
      } else if (d.packed) {
        x.b = part.b + n0 / nr * d.K * nr + k0 * nr, x.b_panel = d.K * nr, x.b_row = nr, x.b_col = 1;
      } else {
        x.b = part.b + k0 * d.b_row + n0 * d.b_col, x.b_panel = nr * d.b_col, x.b_row = d.b_row, x.b_col = d.b_col;
      }
      for (i64 m0 = part.m_begin; m0 < part.m_end; m0 += p.mc) {
        const i64 m = std::min(p.mc, part.m_end - m0);
        const float* a = part.a + m0 * d.a_row + k0 * d.a_col;
        if (p.pack_a) {
          if (packed_m != m0) pack_a(d, p, a, depth, m, a_block);
          packed_m = m0;
          x.a = a_block, x.a_tile = p.tile_m * depth, x.a_row = 1, x.a_col = p.tile_m;
        } else {
          x.a = a, x.a_tile = p.tile_m * d.a_row, x.a_row = d.a_row, x.a_col = d.a_col;
        }
        TileArgs t = {};
        t.c = part.c + m0 * args.c_row + n0;
        t.c_row = args.c_row;
        t.k = depth;
        t.accumulate = args.accumulate || k0 > 0;
        // Last: added first, a large bias would have every later block round at its magnitude.
        t.bias = args.bias && k0 + p.kc >= d.K ? args.bias + n0 * args.bias_step : nullptr;
        t.bias_step = args.bias_step;
        run_tiles(p, x, t, m, n);
      }
    }
    k0 += p.kc;
  } while (k0 < d.K);
}

}  // namespace

void gemm_run(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args) {
  if (d.M == 0 || d.N == 0 || d.batch == 0) return;
  const i64 per_thread = p.a_bytes + p.b_bytes;
  ArenaLease scratch(p.workspace_bytes());
  const i64 parts = d.batch * p.grid_m * p.grid_n;
  parallel(p.threads, [&](int thread, int threads) {
    for (i64 i = parts * thread / threads, end = parts * (thread + 1) / threads; i < end; ++i)
      run_part(d, p, args, part_at(d, p, args, i), scratch.data() + thread * per_thread);
  });
}

i64 gemm_pack_size(i64 K, i64 N, const GemmKernel& kernel) { return (N + kernel.nr - 1) / kernel.nr * kernel.nr * K; }

void gemm_pack_b(const float* b, i64 b_row, i64 b_col, i64 K, i64 N, const GemmKernel& kernel, float* out) {
  GemmDesc d = {};
  d.b_row = b_row;
  d.b_col = b_col;
  pack_b(d, kernel, b, K, N, K, out);
}

void gemm_sum_rows(const float* x, const RowsDesc& d, float* out, Isa isa, int threads) {
  const GemmKernel& kernel = gemm_pack_kernel(isa);
  constexpr i64 kUnit = 64, kSerial = 1 << 16;  // columns a share; elements below which one thread is faster
  i64 outer = 1;
  for (int i = 0; i + 1 < d.dims; ++i) outer *= d.size[i];
  const i64 rows = d.dims ? d.size[d.dims - 1] : 1, row = d.dims ? d.stride[d.dims - 1] : 0;
  const i64 units = (d.cols + kUnit - 1) / kUnit;
  parallel(outer * rows * d.cols < kSerial ? 1 : threads, [&](int thread, int n) {
    const i64 begin = units * thread / n * kUnit, end = std::min(d.cols, units * (thread + 1) / n * kUnit);
    if (begin >= end) return;
    if (outer == 0) kernel.sum_rows(x, 0, end - begin, row, d.col, out + begin, false);
    for (i64 o = 0; o < outer; ++o) {
      const float* p = x + begin * d.col;
      for (i64 i = d.dims - 2, rest = o; i >= 0; rest /= d.size[i--]) p += rest % d.size[i] * d.stride[i];
      kernel.sum_rows(p, rows, end - begin, row, d.col, out + begin, o > 0);
    }
  });
}

}  // namespace fastdl
