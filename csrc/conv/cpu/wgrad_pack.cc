// The weight gradient's blocks in scratch: x as all taps of a part meet it, dy as panels.
#include <cstring>

#include "conv/cpu/wgrad_part.h"
#include "simd/vec.h"

namespace fastdl::wgrad {
namespace {

template <class T, class U>
void copy_few(const void* src, i64 pixel_step, i64 c_step, i64 count, i64 n, U* out) {
  const T* const x = static_cast<const T*>(src);
  for (i64 j = 0; j < n; ++j)
    for (i64 o = 0; o < count; ++o) {
      if constexpr (sizeof(U) == 4) {
        out[o * n + j] = widen(x[o * pixel_step + j * c_step]);
      } else {
        out[o * n + j] = x[o * pixel_step + j * c_step];
      }
    }
}

// dst[o*pitch + j] = src[(start + o*step)*w_step + j*c_step], zero outside [0, size): float32.
void pack_line(const Part& x, const void* src, i64 start, i64 step, i64 count, i64 n, i64 pitch, float* dst) {
  const ConvTensor& t = x.args.x;
  const Range in = inside(start, step, count, x.d.in[2]);
  std::memset(dst, 0, static_cast<std::size_t>(in.begin * pitch) * 4);
  const void* const first = at(src, (start + in.begin * step) * t.step[2], x.d.dtype);
  const i64 pixel_step = step * t.step[2];
  float* const out = dst + in.begin * pitch;
  if (pitch == n && x.d.dtype == DType::f32 && (n == 1 || t.c_step == 1) && pixel_step == n) {
    std::memcpy(out, first, static_cast<std::size_t>(in.size() * n) * 4);
  } else if (pitch == n && n <= kFewChannels && x.d.dtype == DType::f32) {
    copy_few<float>(first, pixel_step, t.c_step, in.size(), n, out);
  } else if (pitch == n && n <= kFewChannels && x.d.dtype == DType::bf16 && x.kernel.k_unit == 1) {
    copy_few<bf16>(first, pixel_step, t.c_step, in.size(), n, out);
  } else if (in.size() > 0) {
    x.packer.helpers->pack_a(first, pixel_step, t.c_step, in.size(), static_cast<int>(n), static_cast<int>(pitch), out,
                             nullptr);
  }
  std::memset(dst + in.end * pitch, 0, static_cast<std::size_t>((count - in.end) * pitch) * 4);
}

// As pack_line to 16-bit elements as they are, [count][n], in stage.
const void* stage_line(const Part& x, const void* src, i64 start, i64 step, i64 count, i64 n, float* stage) {
  const ConvTensor& t = x.args.x;
  const Range in = inside(start, step, count, x.d.in[2]);
  char* const out = reinterpret_cast<char*>(stage);
  const auto bytes = [&](i64 pixels) { return static_cast<std::size_t>(pixels * n) * 2; };
  std::memset(out, 0, bytes(in.begin));
  std::memset(out + bytes(in.end), 0, bytes(count - in.end));
  if (in.size() == 0) return out;
  src = at(src, (start + in.begin * step) * t.step[2], x.d.dtype);
  if (t.c_step == 1 && step * t.step[2] == n) {
    std::memcpy(out + bytes(in.begin), src, bytes(in.size()));
  } else if (t.c_step == 1) {
    for (i64 o = 0; o < in.size(); ++o)
      std::memcpy(out + bytes(in.begin + o), at(src, o * step * t.step[2], x.d.dtype), bytes(1));
  } else if (n <= kFewChannels) {
    copy_few<bf16>(src, step * t.step[2], t.c_step, in.size(), n, reinterpret_cast<bf16*>(out + bytes(in.begin)));
  } else {
    const i64 width = vector_width(x.kernel), pitch = n <= width ? n : round_up(n, width);
    float* const wide = stage + ceil_div(count * n, 2) + kSlack;
    x.widener.helpers->pack_a(src, step * t.step[2], t.c_step, in.size(), static_cast<int>(n), static_cast<int>(pitch),
                              wide, nullptr);
    FinishArgs f = {};
    f.sum = wide, f.sum_row = pitch, f.c = out + bytes(in.begin), f.c_row = n;
    f.m = static_cast<int>(in.size()), f.n = static_cast<int>(n);
    x.packer.helpers->finish(f);
  }
  return out;
}

// What a block's output pixels meet of one row of x. copy: floats from one tap's columns to the next's.
void pack_x_row(const Part& x, const Block& b, i64 n, i64 z, i64 h, float* dst, i64 copy, float* stage) {
  const ConvDesc& d = x.d;
  const ConvWgradPlan& p = x.p;
  const i64 channels = x.c.size(), row = b.cols * p.pitch;
  const bool copies = !p.shared_cols && !p.fold;
  if (z < 0 || z >= d.in[0] || h < 0 || h >= d.in[1]) {
    for (i64 t = 0; t < (copies ? x.taps[2] : 1); ++t)
      std::memset(dst + t * copy, 0, static_cast<std::size_t>(row) * 4);
    return;
  }
  const ConvTensor& t = x.args.x;
  const i64 channel = x.group * (d.C / d.groups) + x.c.begin;
  const void* src = at(t.data, n * t.n_step + channel * t.c_step + z * t.step[0] + h * t.step[1], d.dtype);
  const i64 step = d.stride[2], start = b.w * step - d.pad[2] + x.tap[2] * d.dilation[2];
  if (p.shared_cols) {
    pack_line(x, src, start, 1, b.cols, channels, p.pitch, dst);
  } else if (p.fold) {
    const i64 wide = (b.width - 1) * step + x.taps[2];
    const void* line = stage_line(x, src, start, 1, wide, channels, stage);
    x.packer.helpers->pack_a(line, step * channels, 1, b.width, static_cast<int>(x.taps[2] * channels),
                             static_cast<int>(p.pitch), dst, nullptr);
  } else {
    for (i64 i = 0; i < x.taps[2]; ++i) {
      const i64 first = start + i * d.dilation[2];
      const Range in = inside(first, step, b.width, d.in[2]);
      if (x.kernel.k_unit == 1 || in.size() == b.width) {
        pack_line(x, src, first, step, b.width, channels, p.pitch, dst + i * copy);
      } else {
        const void* line = stage_line(x, src, first, step, b.width, channels, stage);
        x.packer.helpers->pack_a(line, channels, 1, b.width, static_cast<int>(channels), static_cast<int>(p.pitch),
                                 dst + i * copy, nullptr);
      }
    }
  }
}

}  // namespace

i64 slot(const Part& x, const Block& b, int r, i64 t0, i64 t1) {
  const ConvWgradPlan& p = x.p;
  if (!p.shared_rows) return (t0 * x.taps[1] + t1) * p.rows + r;
  return (b.sub[r] * x.taps[0] + t0) * p.span + (b.rows[r].h - b.first[b.sub[r]]) * x.d.stride[1] +
         t1 * x.d.dilation[1];
}

void pack_x(const Part& x, const Block& b, const Scratch& s) {
  const ConvDesc& d = x.d;
  const i64 row = b.cols * x.p.pitch, copy = x.p.slots * row;
  const auto in = [&](int dim, i64 o, i64 t) {
    return o * d.stride[dim] - d.pad[dim] + (x.tap[dim] + t) * d.dilation[dim];
  };
  if (!x.p.shared_rows) {
    for (i64 t0 = 0; t0 < x.taps[0]; ++t0)
      for (i64 t1 = 0; t1 < x.taps[1]; ++t1)
        for (int r = 0; r < b.count; ++r)
          pack_x_row(x, b, b.rows[r].n, in(0, b.rows[r].z, t0), in(1, b.rows[r].h, t1),
                     s.band + slot(x, b, r, t0, t1) * row, copy, s.stage);
    return;
  }
  for (int begin = 0, end; begin < b.count; begin = end) {
    for (end = begin + 1; end < b.count && b.sub[end] == b.sub[begin];) ++end;
    const i64 rows = (end - begin - 1) * d.stride[1] + (x.taps[1] - 1) * d.dilation[1] + 1;
    for (i64 t0 = 0; t0 < x.taps[0]; ++t0)
      for (i64 i = 0; i < rows; ++i)
        pack_x_row(x, b, b.rows[begin].n, in(0, b.rows[begin].z, t0), in(1, b.rows[begin].h, 0) + i,
                   s.band + (slot(x, b, begin, t0, 0) + i) * row, copy, s.stage);
  }
}

void pack_y(const Part& x, const Block& b, float* dst) {
  const ConvDesc& d = x.d;
  const ConvTensor& t = x.args.y;
  const i64 nr = x.kernel.nr, unit = x.kernel.k_unit, panel = b.count * b.steps * nr;
  const i64 channel = x.group * (d.K / d.groups) + x.k.begin;
  const auto offset = [&](int r) {
    return b.rows[r].n * t.n_step + channel * t.c_step + b.rows[r].z * t.step[0] + b.rows[r].h * t.step[1] +
           b.w * t.step[2];
  };
  // Memory is read along its rows: a few pixels at a time of all panels, or all pixels of a panel.
  constexpr i64 kPixels = 8;
  for (int begin = 0, end; begin < b.count; begin = end) {
    for (end = begin + 1; end < b.count && b.width % unit == 0 && offset(end) == offset(end - 1) + b.width * t.step[2];)
      ++end;
    const void* src = at(t.data, offset(begin), d.dtype);
    const i64 pixels = (end - begin) * b.width, some = t.c_step == 1 ? kPixels : pixels;
    for (i64 i = 0; i < pixels; i += some)
      for (i64 j = 0; j < x.k.size(); j += nr)
        x.packer.helpers->pack_b(at(src, i * t.step[2] + j * t.c_step, d.dtype), t.step[2], t.c_step,
                                 std::min(some, pixels - i), static_cast<int>(std::min(nr, x.k.size() - j)),
                                 x.kernel.nr, dst + j / nr * panel + (begin * b.steps + i / unit) * nr, nullptr);
  }
}

}  // namespace fastdl::wgrad
