// Parts in strips (gemm/cpu/kernel_strip.h): 32 pixels at a time, read where they lie in the band or in the image,
// against a block of the weights in L2. All that is summed is summed at once, and nobody waits for what is written.
#include "conv/cpu/dense_band.h"
#include "gemm/cpu/part.h"

namespace fastdl::dense {
namespace {

class Strips : Band {
 public:
  Strips(const Problem& problem, i64 index, char* scratch) : Band(problem, index, scratch) {
    take_channels(p_.c_block);  // no block has more
    row_at_ = reinterpret_cast<i64*>(pointers_ + kGemmStripRows);
    t_.sums = reinterpret_cast<float*>(scratch + p_.band_bytes + p_.pointer_bytes), t_.waiting = &waiting_;
    gathered_ = t_.sums + kGemmStripFloats;
    stage_ = gathered_ + kGemmStripRows * floats_;
    if (conv_has_peaks(kernel_)) band_peak_ = stage_ + p_.stage_floats;
  }

  bool run(const Sums& sums) {
    if (sums.sum) {
      std::fill_n(sums.peak, pixels_, 0.0f);
      for (i64 i = 0; i < pixels_; ++i) row_at_[i] = i * sums.row;
    } else {
      list_rows();
    }
    for (i64 c0 = 0; c0 < x_.channels || c0 == 0; c0 += p_.c_block)  // once for no channels, too
      if (!add_channels(c0, std::min(p_.c_block, x_.channels - c0), sums)) return false;
    return waiting_.special == 0;
  }

 private:
  // Those of the first block write what they sum to, the others add to it, the last ones finish it.
  bool add_channels(i64 c0, i64 count, const Sums& sums) {
    take_channels(count);
    list_runs();
    const bool summed = t_.run_count > 0;
    if (!in_place_ && summed) copy(c0, 0, 0, 0);
    if (sums.sum && summed) raise_peaks(axis(1).taps, width_taps(), sums.peak);
    if (!sums.sum && band_peak_ && summed && tiny()) return false;
    t_.b_panel = phase_->steps * kernel_.nr;
    const i64 column = group_ * x_.columns + k0_;
    const float* const weights =
        x_.pack + x_.panel_at(*phase_, group_, k0_ / kernel_.nr) + all_taps() * x_.units(c0) * kernel_.nr;
    for (i64 k = 0; k < columns_; k += p_.n_block) {
      t_.finish = sums.sum ? FinishArgs{} : epilogue(column + k, c0 + count == x_.channels);
      if (sums.sum) t_.finish.c = sums.sum + k;
      t_.finish.accumulate = c0 > 0;
      t_.finish.n = static_cast<int>(std::min(p_.n_block, columns_ - k));
      t_.b = weights + k * phase_->steps;
      const bool last = k + p_.n_block >= columns_;
      for (i64 i = 0; i < pixels_; i += kGemmStripRows) strip(i, last);
    }
    t_.finish.n = 0;
    x_.helpers.strip(t_);
    return true;
  }

  void list_runs() {
    const bool fold = taps_follow();
    const i64 n1 = in_place_ ? 1 : axis(1).taps, n2 = in_place_ ? 1 : width_taps();
    run_ = fold ? n2 * units_ : units_;
    t_.run_count = axis(0).taps == 0 || run_ == 0 ? 0 : fold ? n1 : n1 * n2;
    for (i64 r = 0; r < t_.run_count; ++r) runs_[r] = (fold ? tap_at(r, 0) : tap_at(r / n2, r % n2)) * floats_;
  }

  // Whether values are so small that tiles may lose them.
  bool tiny() const {
    return tiles_lose(least_peak(band_peak_, h_.step * w_.step * sub_pixels_),
                      least_peak(x_.pack + x_.peaks_at(*phase_, group_, k0_ / kernel_.nr), columns_));
  }

  FinishArgs epilogue(i64 column, bool complete) const {
    const DType dtype = x_.d.dtype;
    const ConvArgs& a = x_.args;
    const i64 offset = column * x_.out.c_step;
    FinishArgs f = {};
    f.c = at(x_.out.data, offset, dtype);
    if (!complete) return f;
    f.activation = a.activation, f.bias_step = a.bias_step;
    if (a.bias) f.bias = at(a.bias, column * a.bias_step, dtype);
    if (a.residual) f.residual = at(a.residual, offset, dtype);
    if (a.pre) f.pre = at(a.pre, offset, dtype);
    return f;
  }

  // Where pixels are written.
  void list_rows() {
    const i64 step = axis(2).out_step * x_.out.step[2];
    i64* to = row_at_;
    for (i64 s = 0; s < planes_; ++s) {
      for (i64 h = 0; h < plane_lines_; ++h) {
        const i64 width = h < rows_ ? width_ : 0, first = h < rows_ ? out_at(s, h, 0) : 0;
        const i64 line = std::min(line_, row_at_ + pixels_ - to);
        for (i64 w = 0; w < line; ++w) *to++ = w < width ? first + w * step : -1;
      }
    }
  }

  void strip(i64 i, bool last) {
    const i64 m = std::min(kGemmStripRows, pixels_ - i);
    t_.finish.m = static_cast<int>(m);
    t_.row_at = row_at_ + i;
    t_.runs = runs_, t_.run = run_;
    const i64 step = in_place_ ? axis(2).in_step * x_.in.step[2] / 2 : floats_;
    const float* const first = in_place_ ? static_cast<const float*>(image_at(0, 0, 0)) : band_;
    t_.a = first + i * step, t_.a_row = step * 4;
    // Nothing may be read behind the image.
    t_.a_packed = in_place_ && m % 16 != 0;
    t_.ahead[0] = last ? ahead(i, m) : Ahead{};
    if (t_.a_packed) {
      ConvTileArgs rows = {};
      for (i64 r = 0; r < m; ++r) pointers_[r] = first + (i + r) * step;
      rows.rows = pointers_, rows.runs = runs_, rows.run_count = t_.run_count, rows.run = run_;
      rows.m = static_cast<int>(m);
      kernel_.functions->gather(rows, gathered_);
      t_.a = gathered_;
    }
    x_.helpers.strip(t_);
  }

  // What will be read next, while strip i is multiplied: in place the strip that follows, else its share of as many
  // rows of the image as the part has, behind them. (Granite Rapids, two threads, without / with, GFLOP/s: 8x64x56x56
  // -> 64 k3 2870 / 3050, 8x64x112x112 -> 128 k3 2740 / 3130, 8x256x56x56 -> 64 k1 1420 / 1700. Asking for the lines
  // of the result, too, gains nothing.)
  Ahead ahead(i64 i, i64 m) const {
    const ConvTensor& in = x_.in;
    const i64 item = item_size(x_.d.dtype);
    if (in_place_)
      return share(static_cast<const char*>(t_.a) + m * t_.a_row, t_.a_row, ceil_div(units_, 16), m, 0, 1, 1);
    if (in.c_step != 1) return {};
    const i64 plane = plane_ + planes_ - 1, h = h_.first + (h_.positions - 1) * h_.stride + 1;
    const i64 offset = plane / axis(0).count * in.n_step + h * in.step[1];
    return share(at(in.data, offset, x_.d.dtype), in.step[1] * item, ceil_div(in.step[1] * item, 64),
                 planes_ * rows_ * axis(1).in_step, i, i + m, pixels_);
  }

  i64 runs_[kMaxRuns], run_;
  i64* row_at_;
  float* gathered_;
  GemmStripWaiting waiting_ = {};
  GemmStripArgs t_ = {};
};

}  // namespace

bool run_strips(const Problem& problem, i64 part, char* scratch, const Sums& sums) {
  return Strips(problem, part, scratch).run(sums);
}

}  // namespace fastdl::dense
