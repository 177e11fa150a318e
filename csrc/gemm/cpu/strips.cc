// The schedule of tiles of bfloat16 where K fits one block: strips of 32 rows of A, as they lie in memory, against a
// block of B in L2. Rows of C are written in order, and nobody waits for them (kernel_strip.h).
//
// Loads of tiles bound it: a step of a block takes 64 cycles of products, 32 lines of B from L2, and 32 of A, from L1
// as long as the strip stays there (K <= 512), past it from L2, too. (Granite Rapids, products alone, of the peak: A in
// L1 100%, in L2 85%; B of 1.2 MB 95 and 85%, 1.5 MB 84 and 69%, 2 MB 58 and 45%.)
#include "gemm/cpu/part.h"

namespace fastdl {
namespace {

// Rows of A that are tile rows as they lie, but for the last, shorter step along K: whole tiles.
bool lies(const GemmDesc& d, i64 m) { return d.a_col == 1 && m % 16 == 0; }

}  // namespace

void gemm_run_strips(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& part, char* memory) {
  const GemmKernel& kernel = *p.kernel;
  const GemmHelpers& helpers = *kernel.helpers;
  float* const packed_a = reinterpret_cast<float*>(memory);
  float* const packed_b = reinterpret_cast<float*>(memory + p.a_bytes);
  const i64 nr = kernel.nr, item = item_size(d.dtype), lines = ceil_div(d.K * item, 64), rest = d.K % kernel.k_step;
  const bool kept = p.pack_a && part.n_begin + p.nc < part.n_end;  // packed A, for the blocks of B to come
  const i64 depth = gemm_packed_steps(d.K, kernel), first = 0;     // floats of a packed column
  i64 row_at[kGemmStripRows];
  for (i64 i = 0; i < kGemmStripRows; ++i) row_at[i] = i * args.c_row;
  GemmStripWaiting waiting = {};
  GemmStripArgs t = {};
  t.b_panel = depth * nr, t.runs = &first, t.run_count = 1;
  t.row_at = row_at, t.waiting = &waiting;
  t.sums = reinterpret_cast<float*>(memory + p.a_bytes + p.b_bytes);

  const auto strips = [&](i64 m0, i64 m_end, i64 n0, i64 n) {
    const void* const source = at(part.b, n0 * d.b_col, d.dtype);
    if (p.pack_b && !p.by_panel) gemm_pack_block(d, kernel, source, d.K, n, d.K, packed_b, nullptr);
    const float* const panels = d.packed ? static_cast<const float*>(part.b) + n0 / nr * t.b_panel : packed_b;
    for (i64 i = m0; i < m_end; i += kGemmStripRows) {
      const i64 m = std::min(kGemmStripRows, m_end - i), next = std::min(kGemmStripRows, m_end - i - m);
      t.a = at(part.a, i * d.a_row, d.dtype), t.a_row = d.a_row * item;
      const bool again = kept && n0 > part.n_begin;
      t.ahead[0] = d.a_col == 1 ? share(at(t.a, m * d.a_row, d.dtype), t.a_row, lines, next, 0, 1, 1) : Ahead{};
      t.tail = nullptr, t.a_packed = !lies(d, m), t.run = depth;
      if (t.a_packed) {
        float* const to = packed_a + (kept ? (i - m0) * depth : 0);
        if (!again) helpers.pack_a(t.a, d.a_col, d.a_row, d.K, static_cast<int>(m), kGemmStripRows, to, nullptr);
        if (again) t.ahead[0] = share(to + m * depth, 0, 2 * depth, next > 0, 0, 1, 1);
        t.a = to;
      } else if (rest > 0) {
        helpers.pack_a(at(t.a, d.K - rest, d.dtype), 1, d.a_row, rest, static_cast<int>(m), kGemmStripRows, packed_a,
                       nullptr);
        t.tail = packed_a, t.run -= kernel.k_step / kernel.k_unit;
      }
      // The first strip packs the panels of B, each just before it needs it.
      const bool packs = p.by_panel && i == m0;
      const i64 width = packs ? nr : n;
      for (i64 j = 0; j < n; j += width, t.ahead[0] = {}) {
        const int cols = static_cast<int>(std::min(width, n - j));
        const i64 offset = j / nr * t.b_panel;
        if (packs)
          helpers.pack_b(at(source, j * d.b_col, d.dtype), d.b_row, d.b_col, d.K, cols, kernel.nr, packed_b + offset,
                         nullptr);
        t.b = panels + offset, t.finish = epilogue_at(d, args, part, i, n0 + j);
        t.finish.m = static_cast<int>(m), t.finish.n = cols;
        helpers.strip(t);
      }
    }
  };
  for (i64 m0 = part.m_begin; m0 < part.m_end; m0 += p.mc)
    for (i64 n0 = part.n_begin; n0 < part.n_end; n0 += p.nc)
      strips(m0, std::min(m0 + p.mc, part.m_end), n0, std::min(p.nc, part.n_end - n0));
  t.finish.n = 0;
  helpers.strip(t);
}

}  // namespace fastdl
