#include "conv/cpu/dense_band.h"

#include <cstring>

namespace fastdl::dense {

Band::Band(const Problem& problem, i64 index, char* scratch)
    : x_(problem),
      p_(problem.p),
      kernel_(*problem.p.kernel),
      band_(reinterpret_cast<float*>(scratch)),
      pointers_(reinterpret_cast<const float**>(scratch + problem.p.band_bytes)) {
  std::size_t i = p_.phases.size() - 1;
  while (p_.phases[i].part > index) --i;
  phase_ = &p_.phases[i];
  index -= phase_->part;
  const i64 k_blocks = ceil_div(x_.columns, p_.k_block);
  // Groups of the same pixels follow each other: their channels share lines and pages.
  const i64 group_blocks = ceil_div(x_.d.groups, p_.group_block);
  const i64 k = index % k_blocks, w = index / k_blocks / group_blocks % phase_->w_blocks;
  const i64 row = index / k_blocks / group_blocks / phase_->w_blocks;
  group_ = index / k_blocks % group_blocks * p_.group_block;
  groups_ = std::min(p_.group_block, x_.d.groups - group_);
  k0_ = k * p_.k_block, columns_ = std::min(p_.k_block, x_.columns - k0_) * groups_;
  w0_ = w * p_.w_block, width_ = std::min(p_.w_block, axis(2).count - w0_);
  if (p_.planes > 1) {
    plane_ = row * p_.planes, planes_ = std::min(p_.planes, x_.d.N * axis(0).count - plane_);
    h0_ = 0, rows_ = axis(1).count;
  } else {
    const i64 blocks = ceil_div(axis(1).count, p_.rows);
    plane_ = row / blocks, planes_ = 1;
    h0_ = row % blocks * p_.rows, rows_ = std::min(p_.rows, axis(1).count - h0_);
  }
  in_place_ = reads_in_place();
  flat_ = p_.flat && !in_place_ && axis(0).taps * axis(1).taps * axis(2).taps > 0;
  h_ = line_of(axis(1), h0_, rows_, p_.shared[1], 0, x_.size[1]);
  w_ = line_of(axis(2), w0_, width_, p_.shared[2], 0, x_.size[2]);
  sub_pixels_ = sub_pixels(h_, w_, planes_);
  line_ = flat_ ? w_.each : width_;
  plane_lines_ = flat_ ? h_.each : rows_;
  pixels_ = ((planes_ - 1) * plane_lines_ + rows_ - 1) * line_ + width_;
}

void Band::take_channels(i64 count) {
  channels_ = count, units_ = x_.units(lump() * channels_);
  if (p_.mixes_groups()) channels_ *= groups_;
  floats_ = conv_pixel_floats(p_, x_.units(lump() * channels_));
}

// Inf and NaN of one group, times the zeros of another's weights for it, would be the other's, too: those merged with
// it, and, where a run of channels is not a whole step, those that follow. The last run ends between pixels.
void Band::look_at_groups() {
  const i64 pixels = h_.step * w_.step * sub_pixels_, used = x_.units(channels_);
  for (i64 i = 0; i < pixels; ++i) std::fill(band_ + i * floats_ + used, band_ + (i + 1) * floats_, 0.0f);
  if (finite_) finite_ = kernel_.functions->finite(band_, pixels * floats_);
  const i64 all = groups_ * p_.merge, floats = x_.channels / p_.merge / 2;
  for (i64 g = 0; only_ >= 0 && g < all; ++g)
    for (i64 i = 0; !kept(g) && i < pixels; ++i) std::fill_n(band_ + i * floats_ + g * floats, floats, 0.0f);
}

void Band::raise_peaks(i64 n1, i64 n2, float* row_peak) const {
  for (i64 i = 0; i < pixels_; ++i) {
    const float* const peak = band_peak_ + (flat_ ? i : (pointers_[i] - band_) / floats_);
    for (i64 t1 = 0; t1 < n1; ++t1)
      for (i64 t2 = 0; t2 < n2; ++t2) row_peak[i] = std::max(peak[tap_at(t1, t2)], row_peak[i]);
  }
}

void Band::set_pointers() {
  const float** out = pointers_;
  for (i64 s = 0; s < planes_; ++s)
    for (i64 h = 0; h < rows_; ++h)
      for (i64 w = 0; w < width_; ++w) *out++ = band_ + ((s * h_.each + h) * w_.each + w) * floats_;
}

// Pixels a multiple of 4096 bytes apart fall on one set of L1, which holds 8 lines: the rows of a tile evict each
// other. (Zen 4, a core, 1x1 stride 2 of 1024 -> 2048 channels, 8x14x14: copied, float32 73 -> 90 GFLOP/s, bfloat16
// 148 -> 174. At 2048 bytes copying loses 5%.)
bool Band::pixels_collide() const {
  const i64 step = axis(2).in_step * x_.in.step[2] * item_size(x_.d.dtype);
  return !is_tiled(kernel_) && step % 4096 == 0;
}

// One tap, whose pixels are all in the image, and channels as the tiles read them: nothing to copy.
bool Band::reads_in_place() const {
  for (int i = 0; i < 3; ++i) {
    const ConvAxis& a = axis(i);
    if (a.taps != 1 || a.first < 0 || (a.count - 1) * a.in_step + a.first >= x_.size[i]) return false;
  }
  const ConvTensor& in = x_.in;
  if (in.c_step != 1 && x_.channels > 1) return false;
  if (pixels_collide() || p_.mixes_groups()) return false;
  if (kernel_.k_unit == 1) return x_.d.dtype == DType::f32;
  if (is_tiled(kernel_) && (x_.d.dtype != DType::bf16 || x_.channels % kernel_.k_step != 0)) return false;
  const bool whole_pairs = (x_.channels | in.n_step | in.step[0] | in.step[1] | in.step[2]) % 2 == 0;
  return whole_pairs && reinterpret_cast<std::uintptr_t>(in.data) % sizeof(float) == 0 &&
         (!p_.strips || evenly_in_place());
}

// Pixels follow each other as those of a row do.
bool Band::evenly_in_place() const {
  const ConvTensor& in = x_.in;
  const i64 row = width_ * axis(2).in_step * in.step[2], plane = rows_ * row, image = axis(0).count * plane;
  if (rows_ > 1 && axis(1).in_step * in.step[1] != row) return false;
  if (planes_ > 1 && axis(0).count > 1 && axis(0).in_step * in.step[0] != plane) return false;
  return planes_ == 1 || x_.d.N == 1 || in.n_step == image;
}

const void* Band::image_at(i64 c0, i64 s, i64 h) const {
  const ConvTensor& in = x_.in;
  const i64 n = (plane_ + s) / axis(0).count, z = (plane_ + s) % axis(0).count;
  return at(in.data,
            n * in.n_step + (group_ * x_.channels + c0) * in.c_step +
                (z * axis(0).in_step + axis(0).first) * in.step[0] +
                ((h0_ + h) * axis(1).in_step + axis(1).first) * in.step[1] +
                (w0_ * axis(2).in_step + axis(2).first) * in.step[2],
            x_.d.dtype);
}

void Band::point_into_image(i64 c0) {
  const float** out = pointers_;
  for (i64 s = 0; s < planes_; ++s)
    for (i64 h = 0; h < rows_; ++h)
      for (i64 w = 0; w < width_; ++w)
        *out++ = static_cast<const float*>(at(image_at(c0, s, h), w * axis(2).in_step * x_.in.step[2], x_.d.dtype));
}

void Band::copy(i64 c0, i64 t0, i64 t1, i64 t2) {
  const ConvTensor& in = x_.in;
  const Line h = line_of(axis(1), h0_, rows_, p_.shared[1], t1, x_.size[1]);
  // Folded, positions of the image are copied first, as where taps are shared, then the taps of each output pixel.
  const Line w = p_.fold ? folded_line(axis(2), w0_, width_, x_.size[2])
                         : line_of(axis(2), w0_, width_, p_.shared[2], t2, x_.size[2]);
  if (band_peak_) std::fill_n(band_peak_, h_.step * w_.step * sub_pixels_, 0.0f);
  for (i64 s = 0; s < planes_; ++s) {
    const i64 n = (plane_ + s) / axis(0).count;
    const i64 z = (plane_ + s) % axis(0).count * axis(0).in_step + axis(0).first + t0 * axis(0).tap_step;
    const bool plane_inside = z >= 0 && z < x_.size[0];
    for (i64 i = 0; i < h.positions; ++i) {
      const i64 pixel = i % h.step * w_.step * sub_pixels_ + (s * h_.each + i / h.step) * w_.each;
      const bool inside = plane_inside && i >= h.begin && i < h.end && w.begin < w.end;
      const i64 offset = n * in.n_step + (group_ * x_.channels + c0) * in.c_step + z * in.step[0] +
                         (h.first + i * h.stride) * in.step[1];
      copy_row(inside ? at(in.data, offset, x_.d.dtype) : nullptr, w, band_ + pixel * floats_,
               band_peak_ ? band_peak_ + pixel : nullptr);
    }
  }
}

// out = the positions w of a row of the image; null: one outside of it.
void Band::copy_row(const void* row, const Line& w, float* out, float* peak) {
  const ConvTensor& in = x_.in;
  const i64 each = p_.fold ? width_ : w.positions / w.step;
  for (i64 f = 0; f < w.step; ++f, out += sub_pixels_ * floats_, peak += peak ? sub_pixels_ : 0) {
    if (!row) {
      std::fill_n(out, each * floats_, 0.0f);
      continue;
    }
    ConvBandArgs b = {};
    b.row = floats_;
    if (p_.fold) {
      stage_row(at(row, (w.first + w.begin) * in.step[2], x_.d.dtype), w.begin, w.end, w.positions);
      b.src = stage_, b.pixel_step = axis(2).in_step * channels_, b.c_step = 1;
      b.pixels = width_, b.channels = lump() * channels_, b.dst = out, b.peak = peak;
      kernel_.functions->band(b);
      continue;
    }
    // Those of this sub-image that are inside.
    const i64 begin = w.begin_of(f), end = w.end_of(f);
    std::fill_n(out, begin * floats_, 0.0f);
    std::fill_n(out + end * floats_, (each - end) * floats_, 0.0f);
    b.src = at(row, (w.first + (f + begin * w.step) * w.stride) * in.step[2], x_.d.dtype);
    b.pixel_step = w.step * w.stride * in.step[2], b.c_step = in.c_step;
    b.pixels = end - begin, b.channels = channels_;
    b.dst = out + begin * floats_, b.peak = peak ? peak + begin : nullptr;
    kernel_.functions->band(b);
  }
}

// stage = positions of a row of the image and their channels, side by side; zeros but for those from begin to end.
void Band::stage_row(const void* src, i64 begin, i64 end, i64 positions) {
  const ConvTensor& in = x_.in;
  const i64 item = item_size(x_.d.dtype), pixel = channels_ * item;
  const auto bytes = [](i64 n) { return static_cast<std::size_t>(n); };
  const char* const from = static_cast<const char*>(src);
  char* const to = reinterpret_cast<char*>(stage_);
  std::memset(to, 0, bytes(begin * pixel));
  std::memset(to + end * pixel, 0, bytes((positions - end) * pixel));
  if (in.c_step == 1 && in.step[2] == channels_) {
    std::memcpy(to + begin * pixel, from, bytes((end - begin) * pixel));
    return;
  }
  for (i64 c = 0; c < channels_; ++c)
    for (i64 i = 0; i < end - begin; ++i)
      std::memcpy(to + ((begin + i) * channels_ + c) * item, from + (i * in.step[2] + c * in.c_step) * item,
                  bytes(item));
}

}  // namespace fastdl::dense
