// The schedule of tiles where what they get wrong can be told afterwards, or never happens: strips of 32 rows of A
// against a block of B in L2. Rows of C are written in order, and nobody waits for them (kernel_strip.h). bfloat16 is
// read as it lies where its rows are tile rows. Sums of float32 wait in C past kc along K.
//
// Loads of tiles bound bfloat16: a step of a block takes 64 cycles of products, 32 lines of B from L2, and 32 of A,
// from L1 as long as the strip stays there (K <= 512), past it from L2, too. (Granite Rapids, products alone, of the
// peak: A in L1 100%, in L2 85%; B of 1.2 MB 95 and 85%, 1.5 MB 84 and 69%, 2 MB 58 and 45%.) Six products of parts
// hide their loads.
#include "gemm/cpu/part.h"

namespace fastdl {
namespace {

class Strips {
 public:
  Strips(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& part, char* memory)
      : d_(d), p_(p), args_(args), part_(part), kernel_(*p.kernel), helpers_(*p.kernel->helpers) {
    packed_a_ = reinterpret_cast<float*>(memory);
    packed_b_ = reinterpret_cast<float*>(memory + p.a_bytes);
    t_.sums = reinterpret_cast<float*>(memory + p.a_bytes + p.b_bytes);
    if (p.repair_bytes > 0) {
      const i64 rows = part.m_end - part.m_begin, cols = part.n_end - part.n_begin;
      a_peak_ = reinterpret_cast<float*>(memory + p.a_bytes + p.b_bytes + p.sum_bytes);
      b_peak_ = a_peak_ + rows;
      std::fill_n(a_peak_, rows + cols, 0.0f);
    }
    kept_ = p.pack_a && part.n_begin + p.nc < part.n_end;
    for (i64 i = 0; i < kGemmStripRows; ++i) row_at_[i] = i * args.c_row;
    t_.b_panel = (d.packed ? gemm_packed_steps(d.K, kernel_) : gemm_packed_steps(p.kc, kernel_)) * kernel_.nr;
    t_.runs = &first_, t_.run_count = 1;
    t_.row_at = row_at_;
    t_.waiting = &waiting_;
  }

  bool run() {
    for (i64 k0 = 0; k0 < d_.K || k0 == 0; k0 += p_.kc) {
      for (i64 m0 = part_.m_begin; m0 < part_.m_end; m0 += p_.mc)
        for (i64 n0 = part_.n_begin; n0 < part_.n_end; n0 += p_.nc) block(k0, m0, n0);
      t_.finish.n = 0;
      helpers_.strip(t_);
    }
    return waiting_.special == 0 && !(a_peak_ && tiny());
  }

 private:
  void block(i64 k0, i64 m0, i64 n0) {
    k0_ = k0, m0_ = m0, n0_ = n0;
    depth_ = std::min(p_.kc, d_.K - k0), steps_ = gemm_packed_steps(depth_, kernel_);
    const i64 nr = kernel_.nr, n = std::min(p_.nc, part_.n_end - n0), rows = std::min(p_.mc, part_.m_end - m0);
    const void* const source = at(part_.b, k0 * d_.b_row + n0 * d_.b_col, d_.dtype);
    float* const peak = b_peak_ ? b_peak_ + n0 - part_.n_begin : nullptr;
    if (p_.pack_b && !p_.by_panel) gemm_pack_block(d_, kernel_, source, depth_, n, p_.kc, packed_b_, peak);
    const float* const panels =
        d_.packed ? static_cast<const float*>(part_.b) + n0 / nr * t_.b_panel + gemm_packed_steps(k0, kernel_) * nr
                  : packed_b_;
    for (i64 i = 0; i < rows; i += kGemmStripRows) {
      const i64 m = std::min(kGemmStripRows, rows - i);
      point_at_rows(i, m, std::min(kGemmStripRows, rows - i - m));
      // The first strip packs the panels of B, each just before it needs it, or has the next one fetched.
      const bool first = i == 0, packs = p_.by_panel && first;
      const i64 width = packs || (d_.packed && first) ? nr : n;
      for (i64 j = 0; j < n; j += width, t_.ahead[0] = {}) {
        const int cols = static_cast<int>(std::min(width, n - j));
        const i64 offset = j / nr * t_.b_panel;
        if (d_.packed && first && n0 + j + nr < part_.n_end)
          t_.ahead[0] = share(panels + offset + t_.b_panel, 0, 2 * steps_, 1, 0, 1, 1);
        if (packs)
          helpers_.pack_b(at(source, j * d_.b_col, d_.dtype), d_.b_row, d_.b_col, depth_, cols, kernel_.nr,
                          packed_b_ + offset, peak ? peak + j : nullptr);
        t_.b = panels + offset;
        multiply(i, m, j, cols);
      }
    }
  }

  // A of m rows of the block from its row i on: as they lie, or packed; `next` rows follow.
  void point_at_rows(i64 i, i64 m, i64 next) {
    const i64 item = item_size(d_.dtype), lines = ceil_div(depth_ * item, 64), rest = depth_ % kernel_.k_step;
    const i64 strip = gemm_packed_steps(p_.kc, kernel_) * kGemmStripRows;
    t_.a = at(part_.a, (m0_ + i) * d_.a_row + k0_ * d_.a_col, d_.dtype), t_.a_row = d_.a_row * item;
    t_.ahead[0] = d_.a_col == 1 ? share(at(t_.a, m * d_.a_row, d_.dtype), t_.a_row, lines, next, 0, 1, 1) : Ahead{};
    t_.tail = nullptr, t_.a_packed = p_.pack_a || m % 16 != 0, t_.run = steps_;
    if (t_.a_packed) {
      float* const to = packed_a_ + (kept_ ? i / kGemmStripRows * strip : 0);
      if (kept_ && n0_ > part_.n_begin)  // it was for the block of columns before
        t_.ahead[0] = share(to + strip, 0, 2 * steps_, next > 0, 0, 1, 1);
      else
        helpers_.pack_a(t_.a, d_.a_col, d_.a_row, depth_, static_cast<int>(m), kGemmStripRows, to,
                        a_peak_ ? a_peak_ + m0_ + i - part_.m_begin : nullptr);
      t_.a = to;
    } else if (rest > 0) {
      helpers_.pack_a(at(t_.a, depth_ - rest, d_.dtype), 1, d_.a_row, rest, static_cast<int>(m), kGemmStripRows,
                      packed_a_, nullptr);
      t_.tail = packed_a_, t_.run -= kernel_.k_step / kernel_.k_unit;
    }
  }

  // Columns j to j + cols of the strip from row i of the block on. The first blocks along K write their sums, the
  // others add theirs, the last ones finish them.
  void multiply(i64 i, i64 m, i64 j, int cols) {
    t_.finish = epilogue_at(d_, args_, part_, m0_ + i, n0_ + j);
    if (k0_ + p_.kc < d_.K) {
      const FinishArgs all = t_.finish;
      t_.finish = {}, t_.finish.c = all.c, t_.finish.c_row = all.c_row;
    }
    t_.finish.accumulate |= k0_ > 0;
    t_.finish.m = static_cast<int>(m), t_.finish.n = cols;
    helpers_.strip(t_);
  }

  bool tiny() const {
    const i64 rows = part_.m_end - part_.m_begin, cols = part_.n_end - part_.n_begin;
    const float* const b =
        d_.packed ? static_cast<const float*>(args_.b) + gemm_packed_panels(d_.K, d_.N, kernel_) + part_.n_begin
                  : b_peak_;
    return tiles_lose(least_peak(a_peak_, rows), least_peak(b, cols));
  }

  const GemmDesc& d_;
  const GemmPlan& p_;
  const GemmArgs& args_;
  const Part& part_;
  const GemmKernel& kernel_;
  const GemmHelpers& helpers_;
  float* packed_a_;
  float* packed_b_;
  float* a_peak_ = nullptr;  // the largest magnitudes of the part's rows and columns, where tiles may lose them
  float* b_peak_ = nullptr;
  bool kept_;          // packed A, for the blocks of columns to come
  i64 k0_, m0_, n0_;   // the block at hand begins there,
  i64 depth_, steps_;  // so deep
  i64 row_at_[kGemmStripRows];
  const i64 first_ = 0;
  GemmStripWaiting waiting_ = {};
  GemmStripArgs t_ = {};
};

}  // namespace

bool gemm_run_strips(const GemmDesc& d, const GemmPlan& p, const GemmArgs& args, const Part& part, char* memory) {
  return Strips(d, p, args, part, memory).run();
}

}  // namespace fastdl
