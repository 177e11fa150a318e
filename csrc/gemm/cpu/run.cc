// The GEMM schedule: C is cut into parts, and each part walks K blocks, N blocks, M blocks, then register tiles
// (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008). A thread packs what its own
// parts need, so nothing is shared and no thread waits for another.
#include <algorithm>
#include <atomic>
#include <vector>

#include "base/arena.h"
#include "base/parallel.h"
#include "gemm/cpu/part.h"

namespace fastdl {
namespace {

std::atomic<i64> g_repaired{0};

void pack_a(const GemmDesc& d, const GemmPlan& p, const void* a, i64 depth, i64 m, float* out, float* peak) {
  const i64 steps = gemm_packed_steps(depth, *p.kernel);
  for (i64 i = 0; i < m; i += p.tile_m) {
    p.kernel->helpers->pack_a(at(a, i * d.a_row, d.dtype), d.a_col, d.a_row, depth,
                              static_cast<int>(std::min<i64>(p.tile_m, m - i)), p.tile_m, out + i * steps,
                              peak ? peak + i : nullptr);
  }
}

// Scratch of a thread, cut as the plan says. The peaks are those of the rows and columns of a part.
struct Scratch {
  float* a;
  float* b;
  float* sum;
  float* a_peak;
  float* b_peak;
  float* repair;
};

constexpr int kBlockRows = 32;  // of a tile of 64, for what takes so many at a time: see GemmHelpers

bool has_peaks(const GemmPlan& p) { return p.repair && p.kernel->dtype == DType::f32; }

// What is left to do for a tile of sums once they are complete: see GemmPlan::repair.
struct Repair {
  const GemmDesc& d;
  const GemmPlan& p;
  const GemmArgs& args;
  const Part& whole;  // of the first pair
  const Scratch& scratch;
  const float* b_peak;  // of the column n_begin; null: none

  void operator()(float* sum, i64 sum_row, i64 i0, i64 j0, int m, int n) const {
    unsigned rows[32];
    const float* a_peaks = b_peak ? scratch.a_peak + i0 - whole.m_begin : nullptr;
    const float* b_peaks = b_peak ? b_peak + j0 - whole.n_begin : nullptr;
    if (!p.kernel->helpers->suspects({sum, sum_row, a_peaks, b_peaks, m, n}, rows)) return;
    int begin = 0, end = m;
    while (rows[begin] == 0) ++begin;
    while (rows[end - 1] == 0) --end;
    const GemmKernel& exact = *p.repair;
    const int nr = p.kernel->nr;
    float* const c = scratch.repair;
    float* const a = c + i64{p.kernel->mr} * nr;
    float* const b = a + repair_floats(exact, exact.mr);
    for (i64 r = 0; r < d.pairs; ++r) {
      const Part part = pair_of(d, args, whole, r);
      for (i64 k0 = 0; k0 < d.K; k0 += exact.kc) {
        const i64 depth = std::min(exact.kc, d.K - k0);
        if (d.packed) {
          const i64 panel = j0 / nr * gemm_packed_steps(d.K, *p.kernel) * nr;
          p.kernel->helpers->unpack_b(static_cast<const float*>(part.b) + panel + gemm_packed_steps(k0, *p.kernel) * nr,
                                      depth, n, nr, b_peaks, b);
        } else {
          exact.helpers->pack_b(at(part.b, k0 * d.b_row + j0 * d.b_col, d.dtype), d.b_row, d.b_col, depth, n, nr, b,
                                nullptr);
        }
        for (int i = begin; i < end; i += exact.mr) {
          TileArgs t = {};
          t.m = std::min(exact.mr, end - i), t.n = n, t.k = depth;
          exact.helpers->pack_a(at(part.a, (i0 + i) * d.a_row + k0 * d.a_col, d.dtype), d.a_col, d.a_row, depth, t.m,
                                t.m, a, nullptr);
          t.a = a, t.a_row = 1, t.a_col = t.m, t.b = b, t.b_row = nr, t.b_col = 1;
          t.c = c + i64{i} * nr, t.c_row = nr, t.accumulate = r > 0 || k0 > 0;
          exact.tile(t);
        }
      }
    }
    i64 count = 0;
    for (int i = begin; i < end; ++i)
      for (int j = 0; j < n; ++j)
        if (rows[i] >> j & 1) sum[i * sum_row + j] = c[i64{i} * nr + j], ++count;
    gemm_add_repaired(count);
  }

  static i64 repair_floats(const GemmKernel& exact, int lines) { return exact.kc * lines + 16; }  // a vector of slack
};

// One block of operands as the tiles of a kernel see it: A[m x depth] and B[depth x n].
struct Blocks {
  const void* a;
  i64 a_tile, a_row, a_col;  // a_tile: from one row of tiles to the next
  const void* b;
  i64 b_panel, b_row, b_col;  // b_panel: from one panel to the next
  DType dtype;                // of both as they lie there: float32 once packed
  const void* source;         // what panels of B are packed from as they are reached; null: they are packed
  i64 source_cols, depth;     // of the source, to the end of the part
  float* peak;                // of the columns of B, or null
};

// sums(i,j) += the tile's.
void add(const TileArgs& t, float* sums) {
  for (int i = 0; i < t.m; ++i)
    for (int j = 0; j < t.n; ++j) sums[i * t.c_row + j] += t.c[i * t.c_row + j];
}

// The four columns of B at t.b against all m rows of A, for dot kernels. A piece of the columns stays in L1 for the
// tiles of several rows, whose lanes wait in L1, too. (Granite Rapids, two threads, float32, 16 and 30 x 4096 x 4096,
// pieces of 4096 / 1024 / 512 elements, ms: 2.7 / 2.5 / 2.6, 4.6 / 4.1 / 4.3.)
constexpr i64 kDotBytes = 4096, kDotTiles = 8;
void run_dots(const GemmKernel& kernel, const Blocks& x, TileArgs t, i64 sum_row, i64 m) {
  const TileArgs origin = t;
  const i64 tiles = ceil_div(m, kernel.mr), K = t.k;
  alignas(64) float lanes[kDotTiles * kDotLanes];
  const i64 piece = kDotBytes / item_size(x.dtype);
  for (i64 first = 0; first < tiles; first += kDotTiles) {
    const i64 some = std::min(kDotTiles, tiles - first), step = std::max<i64>(1, some > 1 ? std::min(piece, K) : K);
    t.turns = static_cast<int>(some);
    for (i64 k = 0; k < K || k == 0; k += step) {
      t.b = at(origin.b, k, x.dtype), t.k = std::min(step, K - k);
      t.first = k == 0, t.last = k + step >= K;
      for (i64 i = 0; i < some; ++i) {
        const i64 row = m * (first + i) / tiles;  // not packed, rows can be cut evenly
        t.m = static_cast<int>(m * (first + i + 1) / tiles - row), t.turn = static_cast<int>(i);
        t.a = at(x.a, row * x.a_row + k, x.dtype), t.c = origin.c + row * sum_row;
        t.lanes = step < K ? lanes + i * kDotLanes : nullptr;
        kernel.tile(t);
      }
    }
  }
}

// All register tiles of a block. `finish`, or null, is applied to their sums, a few columns at a time: see
// GemmPlan::finish_cols. total: sums of the spans before, as those of the tiles lie, that this block completes by one;
// or null.
void run_tiles(const GemmDesc& d, const GemmPlan& p, const Blocks& x, TileArgs t, i64 sum_panel, float* total,
               const FinishArgs* finish, const Repair& repair, i64 m0, i64 n0, i64 m, i64 n) {
  const GemmKernel& kernel = *p.kernel;
  const bool dot = kernel.kind == GemmKind::kDot, grouped = p.finish_cols > kernel.nr, narrow = p.sum_bytes > 0;
  const i64 nr = kernel.nr;
  const TileArgs origin = t;
  // Sums of the tile at (i, j), sum_row * i + column(j) from the first: in C, in those of a part, on tiles by panels,
  // or of a few columns, or of a tile alone.
  const i64 sum_row = p.tile_sums && !grouped ? 0 : t.c_row;
  const auto column = [&](i64 j) {
    if (!p.tile_sums) return j / nr * sum_panel;
    return grouped ? j % p.finish_cols : 0;
  };
  const auto finish_sums = [&](i64 i, i64 j, i64 rows, i64 cols) {
    FinishArgs f = *finish;
    f.sum = (total ? total : origin.c) + i * sum_row + column(j), f.sum_row = t.c_row;
    f.m = static_cast<int>(rows), f.n = static_cast<int>(cols);
    f.c = at(f.c, i * f.c_row + j, kernel.dtype);
    if (f.residual) f.residual = at(f.residual, i * f.c_row + j, kernel.dtype);
    if (f.pre) f.pre = at(f.pre, i * f.c_row + j, kernel.dtype);
    if (f.bias) f.bias = at(f.bias, j * f.bias_step, kernel.dtype);
    kernel.helpers->finish(f);
  };
  // C comes from memory while the products run, as tiles see to where it takes their sums. (bfloat16, 3200 x 1024 x
  // 256, one thread of Zen 4: 10.1 -> 8.5 ms, of which the sums of one tile instead of a part's are 0.2.) Not for tiles
  // of bfloat16 parts: 64 rows at once fill the buffers that A and B come through. (Granite Rapids, two threads, the
  // same: 0.80 -> 0.88 ms.)
  const auto fetch = [&](void* c, i64 i, i64 j, int rows, int cols) {
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(at(c, (i + r) * finish->c_row + j, kernel.dtype), 1);
      __builtin_prefetch(at(c, (i + r) * finish->c_row + j + cols - 1, kernel.dtype), 1);
    }
  };
  t.a_row = x.a_row, t.a_col = x.a_col, t.b_row = x.b_row, t.b_col = x.b_col;
  for (i64 j = 0; j < n; j += nr) {
    t.b = at(x.b, j / nr * x.b_panel, x.dtype);
    t.n = static_cast<int>(std::min(nr, n - j));
    if (origin.bias) t.bias = origin.bias + j * t.bias_step;
    const i64 sums_at = column(j);
    if (x.source)
      kernel.helpers->pack_b(at(x.source, j * d.b_col, d.dtype), d.b_row, d.b_col, x.depth, t.n, kernel.nr,
                             static_cast<float*>(const_cast<void*>(t.b)), x.peak ? x.peak + j : nullptr);
    t.c = origin.c + sums_at;
    if (dot && m <= kernel.mr) {
      t.a = x.a, t.m = static_cast<int>(m);
      kernel.tile(t);
    } else if (dot) {
      run_dots(kernel, x, t, sum_row, m);
    }
    for (i64 i = 0; i < m && !dot; i += t.m) {
      t.m = static_cast<int>(std::min<i64>(p.tile_m, m - i));
      t.a = at(x.a, i / p.tile_m * x.a_tile, x.dtype);
      t.c = origin.c + i * sum_row + sums_at;
      if (is_tiled(kernel)) {
        // The next panel, or what it will be packed from, a share with each tile of this one; and the next tile's sums.
        const i64 item = item_size(d.dtype), end = i + t.m;
        if (!x.source && j + nr < n)
          t.ahead[0] = share(at(t.b, x.b_panel, x.dtype), 0, t.k * nr / 16, 1, i, end, m);
        else if (x.source && d.b_row == 1)
          t.ahead[0] = share(at(x.source, (j + nr) * d.b_col, d.dtype), d.b_col * item, ceil_div(x.depth * item, 64),
                             std::min(nr, x.source_cols - j - nr), i, end, m);
        else
          t.ahead[0] = {};
        const i64 next = origin.accumulate && !p.tile_sums ? std::min<i64>(t.m, m - end) : 0;
        t.ahead[1] = share(t.c + t.m * t.c_row, t.c_row * 4, nr / 16, next, 0, 1, 1);
      } else if (finish && narrow) {
        fetch(finish->c, i, j, t.m, t.n);
      }
      kernel.tile(t);
      float* const sums = total ? total + i * sum_row + sums_at : t.c;
      if (total) add(t, sums);
      if (!finish) continue;
      for (int r = 0; p.repair && r < t.m; r += kBlockRows)
        repair(sums + r * t.c_row, t.c_row, m0 + i + r, n0 + j, std::min(kBlockRows, t.m - r), t.n);
      if (!grouped) finish_sums(i, j, t.m, t.n);
    }
    const i64 end = j + t.n;
    if (finish && grouped && (end % p.finish_cols == 0 || end == n)) {
      const i64 begin = (end - 1) / p.finish_cols * p.finish_cols;
      finish_sums(0, begin, m, end - begin);
    }
  }
}

// C of the part (+)= A_r * B_r. first: C is written, not added to; last: the bias is added and the sums are narrowed.
void run_pair(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& part, const Repair& repair,
              bool first, bool last) {
  const Scratch& scratch = repair.scratch;
  const bool peaks = has_peaks(p);
  const i64 nr = p.kernel->nr;
  const bool narrow = p.sum_bytes > 0;  // sums wait in scratch
  const bool epilogue = narrow || args.activation != Activation::none || args.residual || args.pre;
  i64 k0 = 0;
  do {  // once for K = 0 too: C is the bias then
    const i64 depth = std::min(p.kc, d.K - k0);
    const i64 steps = gemm_packed_steps(depth, *p.kernel);
    const bool finish = last && k0 + p.kc >= d.K;
    i64 packed_m = -1;  // the row of A that scratch.a begins with
    for (i64 n0 = part.n_begin; n0 < part.n_end; n0 += p.nc) {
      const i64 n = std::min(p.nc, part.n_end - n0);
      Blocks x = {};
      const void* b = at(part.b, k0 * d.b_row + n0 * d.b_col, d.dtype);
      if (p.pack_b) {
        x.peak = peaks ? scratch.b_peak + n0 - part.n_begin : nullptr;
        if (!p.by_panel) gemm_pack_block(d, *p.kernel, b, depth, n, depth, scratch.b, x.peak);
        x.b = scratch.b, x.b_panel = p.one_panel ? 0 : steps * nr, x.b_row = nr, x.b_col = 1;
      } else if (d.packed) {
        x.b_panel = gemm_packed_steps(d.K, *p.kernel) * nr, x.b_row = nr, x.b_col = 1;
        x.b = at(part.b, n0 / nr * x.b_panel + gemm_packed_steps(k0, *p.kernel) * nr, DType::f32);
      } else {
        x.b = b, x.b_panel = nr * d.b_col, x.b_row = d.b_row, x.b_col = d.b_col;
      }
      x.dtype = p.kernel->kind == GemmKind::kTile ? DType::f32 : d.dtype;
      for (i64 m0 = part.m_begin; m0 < part.m_end; m0 += p.mc) {
        const i64 m = std::min(p.mc, part.m_end - m0);
        x.source = p.by_panel && m0 == part.m_begin ? b : nullptr;
        x.source_cols = part.n_end - n0, x.depth = depth;
        const void* a = at(part.a, m0 * d.a_row + k0 * d.a_col, d.dtype);
        if (p.pack_a) {
          float* const peak = peaks ? scratch.a_peak + m0 - part.m_begin : nullptr;
          if (packed_m != m0) pack_a(d, p, a, depth, m, scratch.a, peak);
          packed_m = m0;
          x.a = scratch.a, x.a_tile = p.tile_m * steps, x.a_row = 1, x.a_col = p.tile_m;
        } else {
          x.a = a, x.a_tile = p.tile_m * d.a_row, x.a_row = d.a_row, x.a_col = d.a_col;
        }
        void* c = at(part.c, m0 * args.c_row + n0, d.dtype);
        // With the last block: added first, a large bias would have every later block round at its magnitude.
        const void* bias = finish && args.bias ? at(args.bias, n0 * args.bias_step, d.dtype) : nullptr;
        TileArgs t = {};
        t.k = p.kernel->kind == GemmKind::kTile ? steps : depth;
        float* total = nullptr;
        i64 sum_panel = nr;
        if (narrow) {
          const i64 rows = part.m_end - part.m_begin;
          t.c_row = p.sum_row, sum_panel = is_tiled(*p.kernel) ? rows * nr : nr;
          t.c = scratch.sum;
          if (!p.tile_sums) t.c += (m0 - part.m_begin) * t.c_row + (n0 - part.n_begin) / nr * sum_panel;
          t.accumulate = !first || k0 > 0;
          if (p.span < d.K && k0 >= p.span) {
            if (k0 + p.kc >= d.K || (k0 + p.kc) % p.span == 0) total = t.c;
            t.c += rows * (is_tiled(*p.kernel) ? round_up(part.n_end - part.n_begin, nr) : t.c_row),
                t.accumulate = k0 % p.span > 0;
          }
        } else {
          t.c = static_cast<float*>(c);
          t.c_row = args.c_row;
          t.accumulate = args.accumulate || !first || k0 > 0;
          t.bias = epilogue ? nullptr : static_cast<const float*>(bias);
          t.bias_step = args.bias_step;
        }
        FinishArgs f = epilogue_at(d, args, part, m0, n0);
        f.accumulate = narrow && args.accumulate;
        run_tiles(d, p, x, t, sum_panel, total, epilogue && finish ? &f : nullptr, repair, m0, n0, m, n);
      }
    }
    k0 += p.kc;
  } while (k0 < d.K);
}

// See GemmPlan::turned: strips of rows of B' times panels of A'.
void run_turned(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& part, const Scratch& scratch) {
  const GemmKernel& kernel = *p.kernel;
  const int strip = kernel.mr;
  const i64 panel = kernel.nr * gemm_packed_steps(d.K, kernel);
  for (i64 j = 0; j < d.M; j += kernel.nr)
    kernel.helpers->pack_b(at(part.a, j * d.a_row, d.dtype), d.a_col, d.a_row, d.K,
                           static_cast<int>(std::min<i64>(kernel.nr, d.M - j)), kernel.nr,
                           scratch.b + j / kernel.nr * panel, nullptr);
  float* const turned = scratch.sum + strip * kernel.nr;
  for (i64 i = part.n_begin; i < part.n_end; i += strip) {
    TileArgs t = {};
    t.m = static_cast<int>(std::min<i64>(strip, part.n_end - i)), t.n = d.M <= 16 ? 16 : kernel.nr,
    t.k = d.K / kernel.k_unit;
    t.a = at(part.b, i * d.b_col, d.dtype), t.a_row = d.b_col / kernel.k_unit, t.a_col = 1;
    t.b_row = kernel.nr, t.b_col = 1, t.c = scratch.sum, t.c_row = kernel.nr;
    for (i64 j = 0; j < d.M; j += kernel.nr) {
      t.b = scratch.b + j / kernel.nr * panel;
      kernel.tile(t);
      for (int r = 0; r < t.m; r += kBlockRows) kernel.helpers->turn(scratch.sum + r * kernel.nr, turned + r, strip);
      FinishArgs f = epilogue_at(d, args, part, j, i);
      f.sum = turned, f.sum_row = strip, f.m = static_cast<int>(std::min<i64>(kernel.nr, d.M - j)), f.n = t.m;
      kernel.helpers->finish(f);
    }
  }
}

// See GemmPlan::streamed. (A K block straight onto C, kDepth by kDepth, would round K / kDepth times at its magnitude.)
void run_streamed(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& whole, float* sum) {
  constexpr i64 kDepth = 8;
  const GemmKernel& kernel = *p.kernel;
  for (i64 n0 = whole.n_begin; n0 < whole.n_end; n0 += p.nc) {
    FinishArgs last = epilogue_at(d, args, whole, whole.m_begin, n0), f = {};
    f.m = static_cast<int>(whole.m_end - whole.m_begin), f.n = static_cast<int>(std::min(p.nc, whole.n_end - n0));
    f.sum = sum, f.sum_row = p.nc, f.c = last.c, f.c_row = last.c_row;
    last.m = f.m, last.n = f.n, last.sum = sum, last.sum_row = p.nc;
    for (i64 r = 0; r < d.pairs; ++r) {
      const Part part = pair_of(d, args, whole, r);
      for (i64 k0 = 0; k0 < d.K; k0 += p.kc) {
        const i64 end = std::min(d.K, k0 + p.kc);
        for (i64 k = k0; k < end; k += kDepth) {
          TileArgs t = {};
          t.a = at(part.a, part.m_begin * d.a_row + k * d.a_col, d.dtype), t.a_row = d.a_row, t.a_col = d.a_col;
          t.b_row = d.b_row, t.b_col = 1, t.c_row = p.nc;
          t.m = f.m, t.k = std::min(kDepth, end - k), t.accumulate = k > k0;
          for (int j = 0; j < f.n; j += kernel.nr) {
            t.b = at(part.b, k * d.b_row + n0 + j, d.dtype);
            t.c = sum + j, t.n = std::min(kernel.nr, f.n - j);
            kernel.tile(t);
          }
        }
        FinishArgs x = r + 1 == d.pairs && end == d.K ? last : f;
        x.accumulate = args.accumulate || r > 0 || k0 > 0;
        kernel.helpers->finish(x);
      }
    }
  }
}

void run_part(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& whole, char* memory) {
  Scratch scratch = {};
  const auto take = [&](i64 bytes) {
    float* const piece = reinterpret_cast<float*>(memory);
    memory += bytes;
    return piece;
  };
  scratch.a = take(p.a_bytes), scratch.b = take(p.b_bytes), scratch.sum = take(p.sum_bytes);
  if (p.turned) return run_turned(d, p, args, whole, scratch);
  if (p.streamed) return run_streamed(d, p, args, whole, scratch.sum);
  const i64 rows = whole.m_end - whole.m_begin, cols = whole.n_end - whole.n_begin;
  const float* b_peak = nullptr;
  if (has_peaks(p)) {
    scratch.a_peak = take(rows * 4), scratch.b_peak = take(cols * 4);
    std::fill(scratch.a_peak, scratch.b_peak + cols, 0.0f);
    b_peak = d.packed ? static_cast<const float*>(whole.b) + gemm_packed_panels(d.K, d.N, *p.kernel) + whole.n_begin
                      : scratch.b_peak;
  }
  scratch.repair = take(0);
  const Repair repair = {d, p, args, whole, scratch, b_peak};
  for (i64 r = 0; r < d.pairs; ++r) run_pair(d, p, args, pair_of(d, args, whole, r), repair, r == 0, r + 1 == d.pairs);
}

}  // namespace

bool gemm_run(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args) {
  if (d.M == 0 || d.N == 0 || d.batch == 0) return true;
  std::atomic<bool> trusted{true};
  ArenaLease scratch(p.workspace_bytes());
  const i64 parts = d.batch * p.grid_m * p.grid_n;
  parallel(p.threads, [&](int thread, int threads) {
    if (p.kernel->helpers->begin) p.kernel->helpers->begin();
    char* const own = scratch.data() + thread * p.per_thread_bytes();
    for (i64 i = parts * thread / threads, end = parts * (thread + 1) / threads; i < end; ++i) {
      const Part part = part_at(d, p, args, i);
      if (!p.strips)
        run_part(d, p, args, part, own);
      else if (!gemm_run_strips(d, p, args, part, own))
        trusted = false;
    }
    if (p.kernel->helpers->end) p.kernel->helpers->end();
  });
  return trusted;
}

i64 gemm_packed_steps(i64 depth, const GemmKernel& kernel) {
  return round_up(depth, kernel.k_step) / kernel.k_unit * kernel.planes;
}

i64 gemm_packed_panels(i64 K, i64 N, const GemmKernel& kernel) {
  return round_up(N, kernel.nr) * gemm_packed_steps(K, kernel);
}

i64 gemm_repair_bytes(const GemmPlan& p, i64 rows, i64 cols) {
  const i64 operands = Repair::repair_floats(*p.repair, p.repair->mr) + Repair::repair_floats(*p.repair, p.kernel->nr);
  return 4 * (i64{p.kernel->mr} * p.kernel->nr + operands + (has_peaks(p) ? rows + cols : 0));
}
i64 gemm_repaired() { return g_repaired.load(std::memory_order_relaxed); }
void gemm_add_repaired(i64 elements) { g_repaired.fetch_add(elements, std::memory_order_relaxed); }

i64 gemm_pack_size(i64 K, i64 N, const GemmKernel& kernel) {
  const bool peaks = kernel.helpers->suspects && kernel.dtype == DType::f32;
  return gemm_packed_panels(K, N, kernel) + (peaks ? round_up(N, kernel.nr) : 0);
}

void gemm_pack_panels(const void* b, i64 b_row, i64 b_col, i64 K, i64 N, const GemmKernel& kernel, float* out,
                      float* peak) {
  GemmDesc d = {};
  d.b_row = b_row, d.b_col = b_col, d.dtype = kernel.dtype;
  gemm_pack_block(d, kernel, b, K, N, K, out, peak);
}

void gemm_pack_b(const void* b, i64 b_row, i64 b_col, i64 K, i64 N, const GemmKernel& kernel, float* out) {
  GemmDesc d = {};
  d.b_row = b_row;
  d.b_col = b_col;
  d.dtype = kernel.dtype;
  const i64 nr = kernel.nr, size = gemm_packed_panels(K, N, kernel), all = gemm_pack_size(K, N, kernel);
  float* const peak = all > size ? out + size : nullptr;
  std::fill(out + size, out + all, 0.0f);
  gemm_pack_block(d, kernel, b, K, N, K, out, peak);
  for (i64 j0 = 0; peak && j0 < N; j0 += nr) {
    const i64 n = std::min(nr, N - j0);
    const auto tiny = [](float x) { return x < kTinyPeak && x > 0; };
    if (std::none_of(peak + j0, peak + j0 + n, tiny)) continue;
    std::vector<float> scaled(static_cast<std::size_t>(K * n));
    for (i64 k = 0; k < K; ++k)
      for (i64 j = 0; j < n; ++j)
        scaled[static_cast<std::size_t>(k * n + j)] =
            static_cast<const float*>(b)[k * b_row + (j0 + j) * b_col] * (tiny(peak[j0 + j]) ? kTinyScale : 1);
    d.b_row = n, d.b_col = 1;
    gemm_pack_block(d, kernel, scaled.data(), K, n, K, out + j0 * gemm_packed_steps(K, kernel), nullptr);
  }
}

void gemm_activation_grad(const void* dy, const void* z, i64 count, Activation activation, void* dz, DType dtype,
                          Isa isa, int threads) {
  const GemmHelpers& helpers = *gemm_pack_kernel(isa, dtype).helpers;
  constexpr i64 kUnit = 1024, kSerial = 1 << 14;
  const i64 units = ceil_div(count, kUnit);
  parallel(count < kSerial ? 1 : threads, [&](int thread, int n) {
    const i64 begin = units * thread / n * kUnit, end = std::min(count, units * (thread + 1) / n * kUnit);
    if (begin < end)
      helpers.activation_grad(at(dy, begin, dtype), at(z, begin, dtype), end - begin, activation, at(dz, begin, dtype));
  });
}

void gemm_sum_rows(const void* x, const RowsDesc& d, void* out, Isa isa, int threads) {
  const GemmHelpers& helpers = *gemm_pack_kernel(isa, d.dtype).helpers;
  constexpr i64 kUnit = 64, kSerial = 1 << 16;  // columns a share; elements below which one thread is faster
  i64 outer = 1;
  for (int i = 0; i + 1 < d.dims; ++i) outer *= d.size[i];
  const i64 rows = d.dims ? d.size[d.dims - 1] : 1, row = d.dims ? d.stride[d.dims - 1] : 0;
  const i64 units = ceil_div(d.cols, kUnit);
  const bool narrow = d.dtype != DType::f32;
  ArenaLease scratch(narrow ? d.cols * 4 : 0);
  float* const sum = narrow ? reinterpret_cast<float*>(scratch.data()) : static_cast<float*>(out);
  parallel(outer * rows * d.cols < kSerial ? 1 : threads, [&](int thread, int n) {
    const i64 begin = units * thread / n * kUnit, end = std::min(d.cols, units * (thread + 1) / n * kUnit);
    if (begin >= end) return;
    if (outer == 0) helpers.sum_rows(x, 0, end - begin, row, d.col, sum + begin, false);
    for (i64 o = 0; o < outer; ++o) {
      i64 offset = begin * d.col;
      for (i64 i = d.dims - 2, rest = o; i >= 0; rest /= d.size[i--]) offset += rest % d.size[i] * d.stride[i];
      helpers.sum_rows(at(x, offset, d.dtype), rows, end - begin, row, d.col, sum + begin, o > 0);
    }
    if (!narrow) return;
    FinishArgs f = {};
    f.sum = sum + begin, f.c = at(out, begin, d.dtype), f.m = 1, f.n = static_cast<int>(end - begin);
    helpers.finish(f);
  });
}

}  // namespace fastdl
