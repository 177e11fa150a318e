// The pixels of a part of a dense convolution, and the band: a copy of the part of the image that their taps meet, in
// which all of a pixel's taps and channels lie at offsets that pixels share.
#pragma once
#include "conv/cpu/dense_problem.h"

namespace fastdl::dense {

// A part: output pixels of one phase, planes (n, d) from `plane` on, rows and columns of each.
class Band {
 public:
  // scratch: band_bytes of it, then pointers.
  Band(const Problem& problem, i64 index, char* scratch);

 protected:
  const ConvAxis& axis(int i) const { return phase_->axis[i]; }
  // Taps along the width that a pixel of the band holds, and how many times so many there are.
  i64 lump() const { return p_.fold ? axis(2).taps : 1; }
  i64 width_taps() const { return p_.fold ? std::min<i64>(1, axis(2).taps) : axis(2).taps; }
  i64 all_taps() const { return axis(0).taps * axis(1).taps * width_taps(); }
  // Pixels of the band from that of a tap to that of another, where taps share it.
  i64 tap_at(i64 t1, i64 t2) const {
    const i64 h = p_.shared[1] ? t1 * axis(1).tap_step : 0, w = p_.shared[2] ? t2 * axis(2).tap_step : 0;
    return (h % h_.step * w_.step + w % w_.step) * sub_pixels_ + h / h_.step * w_.each + w / w_.step;
  }
  // Taps along the width are neighbours in the band: one run.
  bool taps_follow() const { return axis(2).tap_step == 1 && w_.step == 1 && floats_ == units_; }

  void take_channels(i64 count);  // the band is to hold so many, of each group
  void copy(i64 c0, i64 t0, i64 t1, i64 t2);
  void look_at_groups();  // see finite_, only_
  // The largest magnitudes that the pixels of the part meet with the taps n1 x n2 of the band.
  void raise_peaks(i64 n1, i64 n2, float* row_peak) const;
  void set_pointers();  // into the band
  void point_into_image(i64 c0);
  // Where the only tap meets the image: a row of the part, its first pixel.
  const void* image_at(i64 c0, i64 s, i64 h) const;
  // Offset of pixel (w0 + w, h0 + h) of plane `plane_ + s` in what is written, in elements, its first channel.
  i64 out_at(i64 s, i64 h, i64 w) const {
    const ConvTensor& out = x_.out;
    const i64 plane = plane_ + s;
    return plane / axis(0).count * out.n_step +
           (plane % axis(0).count * axis(0).out_step + axis(0).out_first) * out.step[0] +
           ((h0_ + h) * axis(1).out_step + axis(1).out_first) * out.step[1] +
           ((w0_ + w) * axis(2).out_step + axis(2).out_first) * out.step[2];
  }
  // Not one between the rows of the band.
  bool is_written(i64 pixel) const { return pixel % line_ < width_ && pixel / line_ % plane_lines_ < rows_; }

  // Groups so far apart, of those a run of channels begins with, that none meets another's: one pass for all of them.
  i64 group_turns() const { return ceil_div(kernel_.k_step, x_.channels); }
  bool kept(i64 g) const { return g % p_.merge == only_ % p_.merge && in_turn(g / p_.merge); }
  bool in_turn(i64 merged) const { return only_ < 0 || merged % group_turns() == only_ / p_.merge; }

  const Problem& x_;
  const ConvPlan& p_;
  const ConvKernel& kernel_;
  const ConvPhase* phase_;
  i64 group_, groups_, plane_, planes_, h0_, rows_, w0_, width_, k0_, columns_, pixels_;
  i64 channels_ = 0, units_ = 0, floats_ = 0;  // floats_: of a pixel of the band; units_: of a group in it
  Line h_, w_;
  i64 sub_pixels_;
  i64 line_, plane_lines_;  // from row to row and plane to plane: pixels, those between them that nobody wants counted
  bool in_place_, flat_;
  bool finite_ = true;  // merged groups: the image so far
  i64 only_ = -1;       // which of them the band holds: see kept; or all
  float* band_;
  const float** pointers_;
  float* stage_;                // [position][channel], elements as they are
  float* band_peak_ = nullptr;  // of the band's pixels

 private:
  bool pixels_collide() const;
  bool reads_in_place() const;
  bool evenly_in_place() const;
  void copy_row(const void* row, const Line& w, float* out, float* peak);
  void stage_row(const void* src, i64 begin, i64 end, i64 positions);
};

// Sums of all pixels of a part, and the largest magnitudes that each of them meets.
struct Sums {
  float* sum = nullptr;
  i64 row = 0;
  float* peak = nullptr;
};
// See dense_strips.cc. Not for sums: whether the part is right, as none of GemmHelpers::suspects is to be expected.
bool run_strips(const Problem& problem, i64 part, char* scratch, const Sums& sums = {});

}  // namespace fastdl::dense
