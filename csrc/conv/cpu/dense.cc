// Forward and dgrad. Every pass of every phase (ConvAxis) is a product of output pixels with packed weights: the rows
// of a tile point into a copy of the image, in which all of a pixel's taps and channels lie at offsets that pixels
// share. Tiles read rows that are evenly apart: flat, with the pixels between the rows of the band, or gathered first,
// for all columns of a part.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/dense_band.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

using namespace dense;

// A part whose sums wait in scratch, or in what is written, until all is summed.
class Part : Band {
 public:
  Part(const Problem& problem, char* scratch, i64 index)
      : Band(problem, index, scratch), scratch_(scratch), index_(index) {
    char* const own = scratch + p_.band_bytes + p_.pointer_bytes + p_.strip_bytes;
    sum_ = reinterpret_cast<float*>(own);
    float* tile = reinterpret_cast<float*>(own + p_.sum_bytes);
    gathered_ = tile, tile += is_tiled(kernel_) ? kernel_.mr * kernel_.kc : 0;
    stage_ = tile, tile += p_.stage_floats;
    sum_row_ = conv_sum_row(kernel_, columns_);
    const i64 nr = kernel_.nr;
    if (writes_in_place()) {
      sum_ = static_cast<float*>(x_.out.data) + out_at(0, 0, 0) + (group_ * x_.columns + k0_) * x_.out.c_step;
      sum_row_ = x_.out.step[2];
      written_ = true;
    }
    weights_ = x_.pack + x_.panel_at(*phase_, group_, k0_ / nr);
    if (conv_has_peaks(kernel_)) {
      w_peak_ = x_.pack + x_.peaks_at(*phase_, group_, k0_ / nr);
      band_peak_ = tile, tile += p_.band_pixels;
      row_peak_ = tile, tile += pixels_;
      std::fill_n(row_peak_, pixels_, 0.0f);
    }
    again_ = tile;
  }

  void run() {
    if (p_.strips) return repair_strips();
    sum_all();
    if (!finite_) sum_apart();
    if (p_.repair && started_) repair();
    const ConvArgs& a = x_.args;
    if (finished_) return;
    if (!written_ || a.bias || a.residual || a.pre || a.activation != Activation::none) finish(0, pixels_, sum_);
  }

 private:
  // What strips would have written, looked at first.
  void repair_strips() {
    run_strips(x_, index_, scratch_, {sum_, sum_row_, row_peak_});
    repair();
    finish(0, pixels_, sum_);
  }

  void sum_all() {
    started_ = false;
    for (i64 c0 = 0; c0 < x_.channels; c0 += p_.c_block) {
      take_channels(std::min(p_.c_block, x_.channels - c0));
      i64 position = all_taps() * x_.units(c0);  // of the weights of the band to come
      const i64 n1 = p_.shared[1] ? axis(1).taps : 1, n2 = p_.shared[2] ? axis(2).taps : 1;
      const bool last_channels = c0 + p_.c_block >= x_.channels;
      if (in_place_) {
        point_into_image(c0);
        multiply(position, 1, 1, last_channels);
        continue;
      }
      if (!flat_) set_pointers();
      for (i64 t0 = 0; t0 < axis(0).taps; ++t0) {
        for (i64 t1 = 0; t1 < axis(1).taps; t1 += n1) {
          for (i64 t2 = 0; t2 < width_taps(); t2 += n2) {
            copy(c0, t0, t1, t2);
            if (p_.mixes_groups()) look_at_groups();
            if (!finite_ && only_ < 0) return;
            const bool last = t0 + 1 >= axis(0).taps && t1 + n1 >= axis(1).taps && t2 + n2 >= width_taps();
            multiply(position, n1, n2, last_channels && last);
            position += n1 * n2 * units_;
          }
        }
      }
    }
    for (i64 i = 0; i < pixels_ && !started_; ++i) std::fill_n(sum_ + i * sum_row_, columns_, 0.0f);
  }

  // A few groups at a time, the others' channels zero; of the sums their own columns are kept.
  void sum_apart() {
    const i64 columns = x_.columns / p_.merge;
    float* const kept_sums = sum_ + pixels_ * sum_row_;
    for (only_ = 0; only_ < p_.merge * group_turns(); ++only_) {
      sum_all();
      for (i64 g = 0; g < groups_ * p_.merge; ++g)
        for (i64 i = 0; kept(g) && i < pixels_; ++i)
          std::copy_n(sum_ + i * sum_row_ + g * columns, columns, kept_sums + i * sum_row_ + g * columns);
    }
    sum_ = kept_sums;
  }

  // Sums in what is written itself, where its pixels follow each other as those of the part do.
  bool writes_in_place() const {
    const ConvTensor& out = x_.out;
    const i64 row = out.step[2];
    if (flat_ || x_.d.dtype != DType::f32 || !x_.d.channels_last || row < columns_) return false;
    if (axis(0).out_step != 1 || axis(1).out_step != 1 || axis(2).out_step != 1) return false;
    if (rows_ * planes_ == 1) return true;
    if (width_ != axis(2).count || out.step[1] != width_ * row) return false;
    if (planes_ == 1) return true;
    const bool depths = axis(0).count == 1 || out.step[0] == rows_ * out.step[1];
    return depths && (x_.d.N == 1 || out.n_step == axis(0).count * rows_ * out.step[1]);
  }

  // sums += band * weights, the taps n1 x n2 of the band; last: that is all of them.
  void multiply(i64 position, i64 n1, i64 n2, bool last) {
    const bool fold = taps_follow();
    const i64 run = fold ? n2 * units_ : units_, count = fold ? n1 : n1 * n2;
    // All at once where sums go on in their tiles and wait nowhere. Else a few weights serve all pixels, sums beside
    // them in L2; what is gathered must fit its panel.
    const bool at_once = flat_ && !p_.repair && last && !started_;
    const i64 kc = at_once ? std::max(kernel_.kc, run * count) : kernel_.kc;
    const i64 step = x_.units(1), pieces = ceil_div(run, kc), piece = ceil_div(run, pieces * step) * step;
    const i64 together = pieces > 1 ? 1 : std::min(kMaxRuns, std::max<i64>(1, kc / run));
    const i64 groups = ceil_div(count, together);
    for (i64 g = 0; g < groups; ++g) {
      const i64 r0 = count * g / groups, r1 = count * (g + 1) / groups;
      for (i64 k = 0; k < run; k += piece) {
        i64 runs[kMaxRuns];
        for (i64 r = r0; r < r1; ++r) runs[r - r0] = k + (fold ? tap_at(r, 0) : tap_at(r / n2, r % n2)) * floats_;
        if (is_tiled(kernel_)) {
          const bool complete = last && g + 1 == groups && k + piece >= run;
          panels(position + r0 * run + k, runs, r1 - r0, std::min(piece, run - k), complete);
        } else {
          tiles(position + r0 * run + k, runs, r1 - r0, std::min(piece, run - k));
        }
      }
    }
    if (band_peak_) raise_peaks(n1, n2, row_peak_);
  }

  // Floats from row to row of m pixels, where they are the same: tiles of 16 rows read them where they lie. 0:
  // elsewhere.
  static i64 even_step(const float* const* rows, int m) {
    const i64 step = m > 1 ? rows[1] - rows[0] : 0;
    for (int i = 1; i < m; ++i)
      if (rows[i] - rows[i - 1] != step) return 0;
    return m % 16 == 0 && step > 0 ? step : 0;
  }

  // As tiles(), but all columns of 32 pixels at a time, gathered once if they do not lie as tiles read them. A gathered
  // line of 16 floats is a load and a store, 1 to 2 cycles, and serves columns / 16 products of 16 rows in 16.
  // Complete sums that need no repair are finished while they are hot, and where they are complete at once, all in one
  // place.
  void panels(i64 position, const i64* runs, i64 count, i64 run, bool complete) {
    const bool hot = complete && !p_.repair && !written_ && finite_, at_once = hot && !started_;
    const i64 mr = kernel_.mr, nr = kernel_.nr;
    ConvTileArgs rows = {};
    rows.run_count = count, rows.run = run;
    TileArgs t = {};
    t.b_row = nr, t.b_col = 1, t.c_row = sum_row_, t.accumulate = started_, t.k = run;
    const i64 columns = columns_ / groups_;  // of a group, whose channels begin at offset[0] of the runs
    i64 offset[kMaxRuns];
    for (i64 i = 0; i < pixels_; i += mr) {
      rows.rows = pointers_ + i, rows.m = t.m = static_cast<int>(std::min(mr, pixels_ - i));
      const i64 step = flat_ ? floats_ : even_step(rows.rows, t.m);
      for (i64 g = 0; g < groups_; ++g) {
        if (!in_turn(g)) continue;
        for (i64 r = 0; r < count; ++r) offset[r] = runs[r] + g * x_.channels / 2;
        t.a = flat_ ? band_ + i * floats_ : rows.rows[0], t.a_row = step, t.a_col = 1;
        if (step == 0) {
          rows.runs = groups_ > 1 ? offset : runs;
          kernel_.functions->gather(rows, gathered_);
          t.a = gathered_, t.a_row = 1, t.a_col = kernel_.mr;
        }
        const float* const weights = weights_ + g * p_.group_floats + position * nr;
        for (i64 j = 0; j < columns; j += nr) {
          t.b = weights + j * phase_->steps;
          t.n = static_cast<int>(std::min(nr, columns - j));
          t.c = sum_ + (at_once ? 0 : i * sum_row_) + g * columns + j;
          kernel_.functions->product(t, step == 0 ? nullptr : groups_ > 1 ? offset : runs, count);
        }
      }
      if (hot) finish(i, t.m, sum_ + (at_once ? 0 : i * sum_row_));
    }
    started_ = true, finished_ = hot;
  }

  void tiles(i64 position, const i64* runs, i64 count, i64 run) {
    const i64 nr = kernel_.nr;
    ConvTileArgs t = {};
    t.runs = runs, t.run_count = count, t.run = run, t.c_row = sum_row_, t.accumulate = started_;
    // The panel to come is asked for while this one is used: weights come from L3 or memory.
    constexpr i64 kLine = 16;
    const i64 lines = count * run * nr / kLine;
    for (i64 j = 0; j < columns_; j += nr) {
      t.b = weights_ + j * phase_->steps + position * nr;
      t.n = static_cast<int>(std::min(nr, columns_ - j));
      const i64 rows = kernel_.functions->rows(t.n), m_tiles = ceil_div(pixels_, rows);
      const float* const next = j + nr < columns_ ? t.b + nr * phase_->steps : weights_ + (position + count * run) * nr;
      for (i64 i = 0; i < m_tiles; ++i) {
        for (i64 l = lines * i / m_tiles; l < lines * (i + 1) / m_tiles; ++l)
          __builtin_prefetch(next + l * kLine, 0, 2);
        const i64 begin = pixels_ * i / m_tiles;
        t.m = static_cast<int>(pixels_ * (i + 1) / m_tiles - begin);
        // An image read where it lies comes from memory: ask for the rows of the next tile. (Zen 4, 1x1 256 -> 64 of
        // 8x56x56: float32 150 -> 189, bfloat16 299 -> 390 GFLOP/s. Finishing tiles while hot gained nothing.)
        if (in_place_ && j == 0)
          for (i64 r = begin + t.m; r < std::min(pixels_, begin + t.m + rows); ++r)
            for (i64 l = 0; l < run; l += kLine) __builtin_prefetch(pointers_[r] + runs[0] + l, 0, 2);
        t.rows = pointers_ + begin;
        t.c = sum_ + begin * sum_row_ + j;
        kernel_.functions->tile(t);
      }
    }
    started_ = true;
  }

  // What tiles got wrong (GemmHelpers::suspects), once all is summed.
  void repair() {
    const i64 mr = kernel_.mr, nr = kernel_.nr;
    for (i64 i = 0; i < pixels_; i += mr) {
      for (i64 j = 0; j < columns_; j += nr) {
        SuspectArgs s = {};
        s.sum = sum_ + i * sum_row_ + j, s.sum_row = sum_row_;
        if (row_peak_) s.a_peak = row_peak_ + i, s.b_peak = w_peak_ + j;
        s.m = static_cast<int>(std::min(mr, pixels_ - i)), s.n = static_cast<int>(std::min(nr, columns_ - j));
        unsigned columns[32], some = 0;
        if (!x_.helpers.suspects(s, columns)) continue;
        for (int r = 0; r < s.m; ++r) some |= columns[r] = is_written(i + r) ? columns[r] : 0;
        if (some) compute_again(i, j, s, columns);
      }
    }
  }

  // By FMA, from the image and the weights themselves; a frozen pack, whose parts sum to the weights, is unpacked.
  void compute_again(i64 i0, i64 j0, const SuspectArgs& s, const unsigned* columns) {
    int begin = 0, end = s.m;
    while (columns[begin] == 0) ++begin;
    while (columns[end - 1] == 0) --end;
    const GemmKernel& exact = *p_.repair;
    const int nr = kernel_.nr;
    const DType dtype = x_.d.dtype;
    float* const c = again_;
    float* const a = c + i64{kernel_.mr} * nr;
    float* const b = a + exact.kc * exact.mr;
    const ConvTensor& w = x_.args.w;
    bool first = true;
    for (i64 c0 = 0; c0 < x_.channels; c0 += p_.c_block) {
      const i64 block = std::min(p_.c_block, x_.channels - c0);
      for (i64 tap = 0; tap < all_taps(); ++tap) {
        const i64 t[3] = {tap / width_taps() / axis(1).taps, tap / width_taps() % axis(1).taps, tap % width_taps()};
        for (i64 k = 0; k < block; k += exact.kc) {
          const i64 part = std::min(exact.kc, block - k), depth = lump() * part;
          if (x_.d.frozen) {
            const i64 position = all_taps() * x_.units(c0) + tap * x_.units(lump() * block) + x_.units(k);
            x_.helpers.unpack_b(weights_ + j0 * phase_->steps + position * nr, depth, s.n, nr, s.b_peak, b);
          } else {
            for (i64 l = 0; l < lump(); ++l) {
              i64 offset =
                  group_ * (x_.d.K / x_.d.groups) * w.n_step + (k0_ + j0) * x_.w_column + (c0 + k) * x_.w_channel;
              const i64 at_tap[3] = {t[0], t[1], t[2] + l};
              for (int d = 0; d < 3; ++d) offset += (axis(d).tap_first + at_tap[d] * axis(d).tap_inc) * w.step[d];
              exact.helpers->pack_b(at(w.data, offset, dtype), x_.w_channel, x_.w_column, part, s.n, nr,
                                    b + l * part * nr, nullptr);
            }
          }
          for (int i = begin; i < end; i += exact.mr) {
            TileArgs tile = {};
            tile.m = std::min(exact.mr, end - i), tile.n = s.n, tile.k = depth;
            for (int r = 0; r < tile.m; ++r) {
              for (i64 l = 0; l < lump(); ++l) {
                const i64 at_tap[3] = {t[0], t[1], t[2] + l};
                read_pixel(i0 + i + r, at_tap, c0 + k, part, a + r * depth + l * part);
              }
            }
            tile.a = a, tile.a_row = depth, tile.a_col = 1, tile.b = b, tile.b_row = nr, tile.b_col = 1;
            tile.c = c + i64{i} * nr, tile.c_row = nr, tile.accumulate = !first;
            exact.tile(tile);
          }
          first = false;
        }
      }
    }
    i64 count = 0;
    float* const sum = sum_ + i0 * sum_row_ + j0;
    for (int i = begin; i < end; ++i)
      for (int j = 0; j < s.n; ++j)
        if (columns[i] >> j & 1) sum[i * sum_row_ + j] = c[i64{i} * nr + j], ++count;
    gemm_add_repaired(count);
  }

  // Channels of the image that a pixel of the part meets with a tap.
  void read_pixel(i64 pixel, const i64* tap, i64 channel, i64 count, float* out) const {
    const i64 plane = plane_ + pixel / line_ / plane_lines_;
    const i64 o[3] = {plane % axis(0).count, h0_ + pixel / line_ % plane_lines_, w0_ + pixel % line_};
    const ConvTensor& in = x_.in;
    i64 offset = plane / axis(0).count * in.n_step + (group_ * x_.channels + channel) * in.c_step;
    for (int i = 0; i < 3; ++i) {
      const i64 z = o[i] * axis(i).in_step + axis(i).first + tap[i] * axis(i).tap_step;
      if (z < 0 || z >= x_.size[i]) {
        std::fill_n(out, count, 0.0f);
        return;
      }
      offset += z * in.step[i];
    }
    const void* const src = at(in.data, offset, x_.d.dtype);
    for (i64 c = 0; c < count; ++c)
      out[c] = x_.d.dtype == DType::f32 ? static_cast<const float*>(src)[c * in.c_step]
                                        : widen(static_cast<const f16*>(src)[c * in.c_step]);
  }

  // Sums of `count` pixels of the part from the one `first` on.
  void finish(i64 first, i64 count, const float* sum) const {
    const ConvTensor& out = x_.out;
    const ConvArgs& a = x_.args;
    const i64 column = group_ * x_.columns + k0_, w_step = axis(2).out_step * out.step[2];
    const DType dtype = x_.d.dtype;
    const void* bias = a.bias ? at(a.bias, column * a.bias_step, dtype) : nullptr;
    for (i64 pixel = first, m; pixel < first + count; pixel += m, sum += m * sum_row_) {
      const i64 w = pixel % line_;
      m = std::min((w < width_ ? width_ : line_) - w, first + count - pixel);
      if (!is_written(pixel)) continue;
      const i64 offset = out_at(pixel / line_ / plane_lines_, pixel / line_ % plane_lines_, w) + column * out.c_step;
      const void* residual = a.residual ? at(a.residual, offset, dtype) : nullptr;
      void* pre = a.pre ? at(a.pre, offset, dtype) : nullptr;
      if (x_.d.channels_last) {
        FinishArgs f = {};
        f.sum = sum, f.sum_row = sum_row_, f.c = at(out.data, offset, dtype), f.c_row = w_step;
        f.bias = bias, f.bias_step = a.bias_step, f.residual = residual, f.pre = pre;
        f.activation = a.activation, f.m = static_cast<int>(m), f.n = static_cast<int>(columns_);
        x_.helpers.finish(f);
      } else {
        ConvScatterArgs f = {};
        f.sum = sum, f.sum_row = sum_row_, f.c = at(out.data, offset, dtype);
        f.i_step = w_step, f.j_step = out.c_step;
        f.bias = bias, f.bias_step = a.bias_step, f.residual = residual, f.pre = pre;
        f.activation = a.activation, f.m = m, f.n = columns_;
        kernel_.functions->scatter(f);
      }
    }
  }

  char* scratch_;
  i64 index_;
  bool started_ = false, finished_ = false, written_ = false;
  const float* weights_;
  float* sum_;
  i64 sum_row_;
  float* gathered_;                // [kc][mr]
  float* row_peak_ = nullptr;      // of the part's pixels
  const float* w_peak_ = nullptr;  // of the part's columns
  float* again_;
};

}  // namespace

void conv_run_dense(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  if (p.parts == 0) return;
  ArenaLease scratch(p.workspace_bytes());
  Problem x(d, p, args);
  if (d.frozen) {
    x.pack = args.pack;
  } else {
    float* const pack = reinterpret_cast<float*>(scratch.data());
    pack_weights(x, pack, p.threads);
    x.pack = pack;
  }
  parallel(p.threads, [&](int thread, int threads) {
    char* const own = scratch.data() + p.w_bytes + thread * p.per_thread_bytes();
    if (x.helpers.begin) x.helpers.begin();
    for (i64 i = p.parts * thread / threads, end = p.parts * (thread + 1) / threads; i < end; ++i)
      if (!p.strips || !run_strips(x, i, own)) Part(x, own, i).run();
    if (x.helpers.end) x.helpers.end();
  });
}

}  // namespace fastdl
