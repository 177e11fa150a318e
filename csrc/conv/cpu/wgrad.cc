// The weight gradient: a product of x, seen through the taps, and dy over all output pixels. A block of pixels of both
// is packed into scratch once and serves all taps of a part; the sums of a part stay in L2.
#include <algorithm>
#include <cstring>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/conv.h"
#include "gemm/gemm.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }
i64 even(i64 size, i64 limit) { return size <= limit ? size : ceil_div(size, ceil_div(size, limit)); }
i64 page(i64 bytes) { return round_up(bytes, 4096); }
const void* at(const void* p, i64 elements, DType dtype) {
  return static_cast<const char*>(p) + elements * kItemSize[static_cast<int>(dtype)];
}
void* at(void* p, i64 elements, DType dtype) {
  return static_cast<char*>(p) + elements * kItemSize[static_cast<int>(dtype)];
}

constexpr i64 kSlack = 64;                                    // floats: what packing writes past its rows
constexpr i64 kRuns = 256;                                    // pixels of a block at most
constexpr i64 kSumBytes = 640 << 10, kBandBytes = 512 << 10;  // and of staging
constexpr i64 kNarrowRows = 28;  // rows of outputs so narrow are packed once a tap: all of a block's are one run then

int vector_width(const ConvKernel& kernel) { return kernel.nr / 2; }

// Pixels of a block at most: one product's.
i64 block_pixels(const ConvKernel& kernel) { return kernel.kc / kernel.planes * kernel.k_unit; }

const GemmKernel& exact_kernel(DType dtype) { return gemm_pack_kernel(Isa::kAvx512, dtype, Precision::fma); }

// Bytes of tiles: a panel of x and one of ones, dy, elements of either in their order, sums with peaks.
void measure_tiles(const ConvKernel& kernel, ConvWgradPlan* plan) {
  ConvWgradPlan& p = *plan;
  const i64 pixels = p.rows * p.w_block, steps = conv_units(kernel, pixels),
            lines = p.box[0] * p.box[1] * p.box[2] * p.c_block + 1;
  p.band_bytes = page(steps * (kernel.mr + 16) * 4);
  p.y_bytes = page(steps * p.k_block * 4);
  p.stage_bytes = page(round_up(pixels, 32) * kernel.mr * kItemSize[static_cast<int>(kernel.dtype)]);
  const i64 width = vector_width(kernel), taps = p.box[0] * p.box[1] * p.box[2];
  const i64 leave = taps * width * width + 2 * width * round_up(taps, width) + 4 * kSlack;
  p.stage_bytes = std::max(p.stage_bytes, page(leave * 4));
  p.sum_bytes = page((p.k_block * lines + (conv_has_peaks(kernel) ? p.k_block + lines : 0)) * 4);
  const GemmKernel& exact = exact_kernel(kernel.dtype);
  p.again_bytes = conv_tiles(kernel).helpers->suspects
                      ? page((i64{kernel.mr} * kernel.nr + exact.kc * (exact.mr + kernel.nr) + kSlack) * 4)
                      : 0;
}

// Packed rows, columns and bytes that follow from the box, c_block, k_block, rows and w_block.
void measure(const ConvDesc& d, const ConvKernel& kernel, ConvWgradPlan* plan) {
  if (conv_is_tiled(kernel)) return measure_tiles(kernel, plan);
  ConvWgradPlan& p = *plan;
  const i64 unit = kernel.k_unit, width = vector_width(kernel);
  const i64 groups = std::min(p.rows, (p.rows - 1) / std::max<i64>(1, d.out[1]) + 2);
  p.span = (std::min(p.rows, d.out[1]) - 1) * d.stride[1] + (p.box[1] - 1) * d.dilation[1] + 1;
  p.shared_rows = p.rows > 1 && groups * p.span < p.rows * p.box[1];
  p.slots = p.box[0] * (p.shared_rows ? groups * p.span : p.rows * p.box[1]);
  const i64 wide = (p.w_block - 1) * d.stride[2] + (p.box[2] - 1) * d.dilation[2] + 1, tap = p.box[2];
  p.shared_cols = unit == 1 && (p.fold || (p.w_block > kNarrowRows && wide <= tap * p.w_block && tap > 1));
  const i64 lines = p.fold && unit > 1 ? p.c_block * tap : p.c_block;
  p.cols = p.shared_cols ? wide : ceil_div(p.w_block, unit);
  const i64 copies = p.shared_cols || p.fold ? 1 : tap;
  // What packing writes past a row is overwritten by the next one, but must not reach into another copy.
  p.pitch = lines <= width && copies == 1 ? lines : round_up(lines, width);
  p.band_bytes = page((copies * p.slots * p.cols * p.pitch + kSlack) * 4);
  p.y_bytes = page((p.rows * ceil_div(p.w_block, unit) * p.k_block + kSlack) * 4);
  // Pairs are formed of a row as it lies in memory, with its padding; in another layout by way of float32.
  const i64 staged = p.fold ? wide : p.w_block;
  const i64 finish = p.box[0] * p.box[1] * p.box[2];
  const i64 leave = finish * width * width + 2 * width * round_up(finish, width) + 4 * kSlack;
  const i64 stage = unit == 1 ? 0 : staged * (round_up(p.c_block, 2) / 2 + round_up(p.c_block, width)) + 4 * kSlack;
  p.stage_bytes = page(std::max(stage, leave) * 4);
  const i64 sums = p.k_block * (p.box[0] * p.box[1] * p.box[2] * p.c_block + 1);
  p.sum_bytes = page(sums * 4);
}

void count_parts(const ConvDesc& d, ConvWgradPlan* p) {
  for (int i = 0; i < 3; ++i) p->boxes[i] = ceil_div(d.kernel[i], p->box[i]);
  p->c_parts = std::max<i64>(1, ceil_div(d.C / d.groups, p->c_block));
  p->k_parts = ceil_div(d.K / d.groups, p->k_block);
}

// --- packing -------------------------------------------------------------------------------------------------------
struct Range {
  i64 begin, end;
  i64 size() const { return end - begin; }
};
// The o in [0, count) for which start + o*step lies in [0, size).
Range inside(i64 start, i64 step, i64 count, i64 size) {
  const i64 begin = start >= 0 ? 0 : std::min(count, ceil_div(-start, step));
  const i64 end = start >= size ? 0 : std::min(count, (size - 1 - start) / step + 1);
  return {begin, std::max(begin, end)};
}

struct Scratch {
  float* band;
  float* y;
  float* stage;
  float* sums;
  float* again;
};

struct Row {
  i64 n, z, h;
};

// One part: a box of taps x channels x output channels of one group, and a range of blocks.
struct Part {
  const ConvDesc& d;
  const ConvWgradPlan& p;
  const ConvArgs& args;
  const ConvKernel& kernel;
  const GemmKernel& packer;   // in the form that tiles read
  const GemmKernel& widener;  // to float32
  const GemmKernel& plain;    // float32
  i64 chunk, group;
  i64 tap[3], taps[3];  // the box
  Range c, k;           // within the group
  Range blocks;

  i64 all_taps() const { return taps[0] * taps[1] * taps[2]; }
  i64 panel_rows() const { return all_taps() * c.size() + 1; }  // the last one is the bias
  bool with_bias() const { return args.dbias && tap[0] + tap[1] + tap[2] + c.begin == 0; }
  // Behind the sums, where the kernel needs them: the largest magnitudes of the columns and of the rows.
  i64 sum_floats() const { return round_up(k.size(), kernel.nr) * panel_rows(); }
  i64 peak_floats() const { return conv_has_peaks(kernel) ? round_up(k.size(), kernel.nr) + panel_rows() : 0; }
  float* column_peaks(float* sums) const { return conv_has_peaks(kernel) ? sums + sum_floats() : nullptr; }
  float* row_peaks(float* sums) const {
    return conv_has_peaks(kernel) ? sums + sum_floats() + round_up(k.size(), kernel.nr) : nullptr;
  }
};

// A block of output pixels.
struct Block {
  Row rows[kRuns];
  int sub[kRuns];    // rows that share packed rows
  i64 first[kRuns];  // the first h of each
  int count;
  i64 w, width;  // of all rows
  i64 steps;     // of a row, packed
  i64 cols;      // packed columns
};

void find_block(const Part& x, i64 index, Block* out) {
  const ConvDesc& d = x.d;
  Block& b = *out;
  const i64 segment = index % x.p.segments, row = index / x.p.segments * x.p.rows;
  b.count = static_cast<int>(std::min(x.p.rows, d.N * d.out[0] * d.out[1] - row));
  b.w = d.out[2] * segment / x.p.segments;
  b.width = d.out[2] * (segment + 1) / x.p.segments - b.w;
  b.steps = ceil_div(b.width, x.kernel.k_unit);
  b.cols = x.p.shared_cols ? (b.width - 1) * d.stride[2] + (x.taps[2] - 1) * d.dilation[2] + 1 : b.steps;
  int sub = -1;
  for (int r = 0; r < b.count; ++r) {
    const i64 i = row + r;
    b.rows[r] = {i / d.out[1] / d.out[0], i / d.out[1] % d.out[0], i % d.out[1]};
    if (r == 0 || b.rows[r].h == 0) b.first[++sub] = b.rows[r].h;
    b.sub[r] = sub;
  }
}

// Few channels: element by element costs less than a vector store each pixel that reaches over its neighbours.
constexpr i64 kFewChannels = 4;
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

// The packed row that output row r meets with tap (t0, t1).
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

// dy of the block: panels [steps][nr], one behind the other.
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

// Asks for the dy of the next block while tiles work on this one: [row][segment][line].
class Ahead {
 public:
  Ahead(const Part& x, const Block* next) : x_(x), next_(next) {
    if (!next) return;
    const ConvTensor& t = x.args.y;
    const i64 item = kItemSize[static_cast<int>(x.d.dtype)];
    const bool across = t.c_step == 1;  // a segment is the channels of a pixel, else the pixels of a channel
    if (!across && t.step[2] != 1) return;
    segments_ = across ? next->width : x.k.size();
    step_ = (across ? t.step[2] : t.c_step) * item;
    bytes_ = (across ? x.k.size() : next->width) * item;
    if (across && step_ == bytes_) bytes_ *= segments_, segments_ = 1;  // the whole row is one
    lines_ = next->count * segments_ * ceil_div(bytes_, kLine);
    enter();
  }
  i64 lines() const { return lines_; }
  void fetch(i64 lines) {
    for (; lines > 0 && row_ < next_->count; --lines) {
      __builtin_prefetch(at_ + byte_, 0, 2);
      if ((byte_ += kLine) < bytes_) continue;
      byte_ = 0, at_ += step_;
      if (++segment_ < segments_) continue;
      segment_ = 0;
      if (++row_ < next_->count) enter();
    }
  }

 private:
  static constexpr i64 kLine = 64;
  void enter() {
    const ConvTensor& t = x_.args.y;
    const Row& r = next_->rows[row_];
    const i64 channel = x_.group * (x_.d.K / x_.d.groups) + x_.k.begin;
    at_ = static_cast<const char*>(
        at(t.data, r.n * t.n_step + channel * t.c_step + r.z * t.step[0] + r.h * t.step[1] + next_->w * t.step[2],
           x_.d.dtype));
  }
  const Part& x_;
  const Block* next_;
  const char* at_ = nullptr;
  i64 segments_ = 0, step_ = 0, bytes_ = 0, lines_ = 0, segment_ = 0, byte_ = 0;
  int row_ = 0;
};

// --- products ------------------------------------------------------------------------------------------------------
void run_block(const Part& x, const Block& b, const Block* next, const Scratch& s, bool accumulate) {
  const ConvDesc& d = x.d;
  const ConvWgradPlan& p = x.p;
  const i64 row = b.cols * p.pitch, nr = x.kernel.nr, panel = b.count * b.steps * nr;
  const i64 lines = p.fold ? x.taps[2] * x.c.size() : x.c.size(), tiles = ceil_div(lines, x.kernel.mr);
  const i64 tap_step = p.shared_cols ? d.dilation[2] * p.pitch : p.slots * row;
  ConvWgradRun runs[kRuns];
  Ahead ahead(x, next);
  const i64 calls =
      panel == 0 ? 1 : ceil_div(x.k.size(), nr) * x.taps[0] * x.taps[1] * (p.fold ? 1 : x.taps[2]) * tiles;
  const i64 each = ceil_div(ahead.lines(), std::max<i64>(1, calls));
  ConvWgradArgs t = {};
  t.a_step = p.shared_cols ? d.stride[2] * p.pitch : p.pitch;
  t.runs = runs, t.nr = nr;
  // A pair of ones in bfloat16 has the bits of the one and, in its upper half, of the other.
  const float one = x.kernel.k_unit == 1 ? 1.0f : float_of(0x3f803f80u);
  for (i64 j = 0; j < x.k.size(); j += nr) {
    t.b = s.y + j / nr * panel;
    t.n = static_cast<int>(std::min(nr, x.k.size() - j));
    t.accumulate = accumulate;
    float* c = s.sums + j * x.panel_rows();
    for (i64 t0 = 0; t0 < x.taps[0]; ++t0) {
      for (i64 t1 = 0; t1 < x.taps[1]; ++t1) {
        t.run_count = 0;
        for (int r = 0; r < b.count; ++r) {
          const i64 a = slot(x, b, r, t0, t1) * row;
          ConvWgradRun* last = runs + t.run_count - 1;
          if (r > 0 && a == last->a + last->steps * t.a_step) {
            last->steps += b.steps;
          } else {
            runs[t.run_count++] = {a, r * b.steps * nr, b.steps};
          }
        }
        for (i64 t2 = 0; t2 < (p.fold ? 1 : x.taps[2]); ++t2, c += lines * nr) {
          for (i64 i = 0; i < tiles; ++i) {
            const i64 begin = lines * i / tiles;
            t.m = static_cast<int>(lines * (i + 1) / tiles - begin);
            t.a = s.band + t2 * tap_step + begin;
            t.c = c + begin * nr;
            x.kernel.functions->wgrad_tile(t);
            if (each > 0) ahead.fetch(each);
          }
        }
      }
    }
    if (!x.with_bias()) continue;
    ConvWgradArgs bias = t;
    ConvWgradRun all = {0, 0, b.count * b.steps};
    bias.a = &one, bias.a_step = 0, bias.m = 1, bias.c = c, bias.runs = &all, bias.run_count = 1;
    x.kernel.functions->wgrad_tile(bias);
  }
}

// --- tiles -----------------------------------------------------------------------------------------------------------
// One row of a block in a tensor: pixels [begin, end) of it lie in memory from `first` on, the others are zeros.
struct Line {
  const char* first;
  i64 begin, end;
};

// Some channels of a block's pixels, as they lie in memory, and how they are copied: [pixel][32] or [row][pixels].
struct Pixels {
  const Line* lines;  // of the first channel
  i64 pixel_step, c_step;
  int n;
  bool by_pixel;
};
// Whichever runs along memory; a copy of few elements costs as much as one of an element.
bool by_pixel(const ConvTensor& t, i64 channels) { return t.c_step == 1 && channels > kFewChannels; }

bool follow_each_other(const Part& x, const Block& b, const Pixels& p) {
  const i64 bytes = b.width * p.pixel_step * kItemSize[static_cast<int>(x.d.dtype)];
  for (int r = 0; r < b.count; ++r) {
    if (p.lines[r].begin != 0 || p.lines[r].end != b.width) return false;
    if (r > 0 && p.lines[r].first != p.lines[r - 1].first + bytes) return false;
  }
  return true;
}

// Copies them to rows `at` and on of a panel in stage.
void stage_pixels(const Part& x, const Block& b, const Pixels& p, int at, float* stage) {
  const i64 item = kItemSize[static_cast<int>(x.d.dtype)];
  const i64 step = p.by_pixel ? x.kernel.mr : 1, row = p.by_pixel ? 1 : b.count * b.width;
  char* const to = reinterpret_cast<char*>(stage) + at * row * item;
  const auto bytes = [&](i64 count) { return static_cast<std::size_t>(count * item); };
  for (int r = 0; r < b.count; ++r) {
    const Line& line = p.lines[r];
    const i64 count = line.end - line.begin;
    if (p.by_pixel) {
      char* const dst = to + r * b.width * step * item;
      for (i64 i = 0; i < line.begin; ++i) std::memset(dst + i * step * item, 0, bytes(p.n));
      for (i64 i = 0; i < count; ++i)
        std::memcpy(dst + (line.begin + i) * step * item, line.first + i * p.pixel_step * item, bytes(p.n));
      for (i64 i = line.end; i < b.width; ++i) std::memset(dst + i * step * item, 0, bytes(p.n));
      continue;
    }
    for (int c = 0; c < p.n; ++c) {
      char* const dst = to + (c * row + r * b.width) * item;
      const char* const src = line.first + c * p.c_step * item;
      std::memset(dst, 0, bytes(line.begin));
      std::memset(dst + line.end * item, 0, bytes(b.width - line.end));
      if (p.pixel_step == 1) {
        std::memcpy(dst + line.begin * item, src, bytes(count));
      } else if (item == 4) {
        for (i64 i = 0; i < count; ++i) std::memcpy(dst + (line.begin + i) * 4, src + i * p.pixel_step * 4, 4);
      } else {
        for (i64 i = 0; i < count; ++i) std::memcpy(dst + (line.begin + i) * 2, src + i * p.pixel_step * 2, 2);
      }
    }
  }
}

// n staged rows as tiles.
void pack_staged(const Part& x, const Block& b, bool pixels_first, int n, PackFunction* pack, int panel,
                 const float* stage, float* out, float* peak) {
  const i64 pixels = b.count * b.width, row = pixels_first ? x.kernel.mr : pixels;
  pack(stage, pixels_first ? row : 1, pixels_first ? 1 : row, pixels, n, panel, out, peak);
}

// What output row r, `width` wide from w on, meets of x with a tap, channels from c on.
Line line_of_x(const Part& x, const Row& r, i64 w, i64 width, const i64* tap, i64 c) {
  const ConvDesc& d = x.d;
  const ConvTensor& t = x.args.x;
  const i64 z = r.z * d.stride[0] - d.pad[0] + (x.tap[0] + tap[0]) * d.dilation[0];
  const i64 h = r.h * d.stride[1] - d.pad[1] + (x.tap[1] + tap[1]) * d.dilation[1];
  if (z < 0 || z >= d.in[0] || h < 0 || h >= d.in[1]) return {nullptr, 0, 0};
  const i64 start = w * d.stride[2] - d.pad[2] + (x.tap[2] + tap[2]) * d.dilation[2];
  const Range in = inside(start, d.stride[2], width, d.in[2]);
  if (in.size() == 0) return {nullptr, 0, 0};
  const i64 offset = r.n * t.n_step + (x.group * (d.C / d.groups) + x.c.begin + c) * t.c_step + z * t.step[0] +
                     h * t.step[1] + (start + in.begin * d.stride[2]) * t.step[2];
  return {static_cast<const char*>(at(t.data, offset, d.dtype)), in.begin, in.end};
}

const char* row_of_y(const Part& x, const Row& r, i64 w, i64 k) {
  const ConvTensor& t = x.args.y;
  const i64 channel = x.group * (x.d.K / x.d.groups) + x.k.begin + k;
  return static_cast<const char*>(
      at(t.data, r.n * t.n_step + channel * t.c_step + r.z * t.step[0] + r.h * t.step[1] + w * t.step[2], x.d.dtype));
}

void run_tiles(const Part& x, const Block& b, const Scratch& s, bool accumulate) {
  const i64 nr = x.kernel.nr, mr = x.kernel.mr, pixels = b.count * b.width, steps = conv_units(x.kernel, pixels);
  float* const column_peaks = x.column_peaks(s.sums);
  float* const row_peaks = x.row_peaks(s.sums);
  if (!accumulate && column_peaks) std::fill_n(column_peaks, x.peak_floats(), 0.0f);
  const GemmHelpers& helpers = *x.packer.helpers;
  Line lines[kRuns];
  for (i64 j = 0; j < x.k.size(); j += nr) {
    const ConvTensor& y = x.args.y;
    for (int r = 0; r < b.count; ++r) lines[r] = {row_of_y(x, b.rows[r], b.w, j), 0, b.width};
    const Pixels p = {lines, y.step[2], y.c_step, static_cast<int>(std::min(nr, x.k.size() - j)),
                      by_pixel(y, x.k.size())};
    float* const out = s.y + j * steps;
    float* const peak = column_peaks ? column_peaks + j : nullptr;
    if (follow_each_other(x, b, p)) {
      helpers.pack_b(lines[0].first, p.pixel_step, p.c_step, pixels, p.n, x.kernel.nr, out, peak);
    } else {
      stage_pixels(x, b, p, 0, s.stage);
      pack_staged(x, b, p.by_pixel, p.n, helpers.pack_b, x.kernel.nr, s.stage, out, peak);
    }
  }
  TileArgs t = {};
  t.a_row = 1, t.b_row = nr, t.b_col = 1, t.c_row = nr, t.k = steps, t.accumulate = accumulate;
  const auto products = [&](const float* a, i64 row, int m) {
    t.a = a, t.a_col = round_up(m, 16), t.m = m;
    for (i64 j = 0; j < x.k.size(); j += nr) {
      t.b = s.y + j * steps, t.c = s.sums + j * x.panel_rows() + row * nr;
      t.n = static_cast<int>(std::min(nr, x.k.size() - j));
      x.packer.tile(t);
    }
  };
  // Rows are taps along the width times channels, 32 at a time: of few channels several taps.
  const ConvTensor& in = x.args.x;
  const i64 C = x.c.size(), lines_of_tap = x.taps[2] * C;
  for (i64 tap = 0; tap < x.taps[0] * x.taps[1]; ++tap) {
    for (i64 first = 0; first < lines_of_tap; first += mr) {
      const int m = static_cast<int>(std::min(mr, lines_of_tap - first)), panel = (m + 15) / 16 * 16;
      const i64 row = tap * lines_of_tap + first;
      float* const peak = row_peaks ? row_peaks + row : nullptr;
      bool packed = false;
      for (int i = 0; i < m;) {
        const i64 taps[3] = {tap / x.taps[1], tap % x.taps[1], (first + i) / C}, c = (first + i) % C;
        for (int r = 0; r < b.count; ++r) lines[r] = line_of_x(x, b.rows[r], b.w, b.width, taps, c);
        const Pixels p = {lines, x.d.stride[2] * in.step[2], in.c_step, static_cast<int>(std::min<i64>(m - i, C - c)),
                          by_pixel(in, C)};
        packed = p.n == m && follow_each_other(x, b, p);
        if (packed) {
          helpers.pack_a(lines[0].first, p.pixel_step, p.c_step, pixels, m, panel, s.band, peak);
        } else {
          stage_pixels(x, b, p, i, s.stage);
        }
        i += p.n;
      }
      if (!packed) pack_staged(x, b, by_pixel(in, C), m, helpers.pack_a, panel, s.stage, s.band, peak);
      products(s.band, row, m);
    }
  }
  if (!x.with_bias()) return;
  float* const ones = s.band + steps * mr;
  const float one = 1;
  const bf16 narrow_one = {0x3f80};
  const f16 half_one = {0x3c00};
  const void* const kOnes[] = {&one, &narrow_one, &half_one};
  helpers.pack_a(kOnes[static_cast<int>(x.d.dtype)], 0, 0, pixels, 1, 16, ones, nullptr);
  if (row_peaks) row_peaks[x.panel_rows() - 1] = 1;
  products(ones, x.panel_rows() - 1, 1);
}

// By FMA: sums of m rows from `row` on, channels from c on of one tap, or of ones where it is null.
void compute_again(const Part& x, const Scratch& s, const SuspectArgs& suspect, const unsigned* columns, i64 j,
                   const i64* tap, i64 c, float* sums) {
  const ConvDesc& d = x.d;
  const GemmKernel& exact = exact_kernel(d.dtype);
  const int nr = x.kernel.nr;
  float* const out = s.again;
  float* const a = out + i64{x.kernel.mr} * nr;
  float* const b = a + exact.kc * exact.mr;
  std::fill_n(out, i64{x.kernel.mr} * nr, 0.0f);
  const i64 item = kItemSize[static_cast<int>(d.dtype)], pixel_step = d.stride[2] * x.args.x.step[2];
  const auto element = [&](const Line& line, i64 channel, i64 pixel) {
    if (!tap) return 1.0f;
    if (pixel < line.begin || pixel >= line.end) return 0.0f;
    const char* const p = line.first + ((pixel - line.begin) * pixel_step + channel * x.args.x.c_step) * item;
    return d.dtype == DType::f32 ? widen(*reinterpret_cast<const float*>(p)) : widen(*reinterpret_cast<const f16*>(p));
  };
  for (i64 i = 0; i < d.N * d.out[0] * d.out[1]; ++i) {
    const Row r = {i / d.out[1] / d.out[0], i / d.out[1] % d.out[0], i % d.out[1]};
    for (i64 w = 0; w < d.out[2]; w += exact.kc) {
      const i64 depth = std::min(exact.kc, d.out[2] - w);
      const Line line = tap ? line_of_x(x, r, w, depth, tap, c) : Line{};
      exact.helpers->pack_b(row_of_y(x, r, w, j), x.args.y.step[2], x.args.y.c_step, depth, suspect.n, nr, b, nullptr);
      for (int m = 0; m < suspect.m; m += exact.mr) {
        TileArgs t = {};
        t.m = std::min(exact.mr, suspect.m - m), t.n = suspect.n, t.k = depth;
        for (int l = 0; l < t.m; ++l)
          for (i64 p = 0; p < depth; ++p) a[l * depth + p] = element(line, m + l, p);
        t.a = a, t.a_row = depth, t.a_col = 1, t.b = b, t.b_row = nr, t.b_col = 1;
        t.c = out + i64{m} * nr, t.c_row = nr, t.accumulate = true;
        exact.tile(t);
      }
    }
  }
  i64 count = 0;
  for (int m = 0; m < suspect.m; ++m)
    for (int n = 0; n < suspect.n; ++n)
      if (columns[m] >> n & 1) sums[m * nr + n] = out[m * nr + n], ++count;
  gemm_add_repaired(count);
}

// What tiles got wrong (GemmHelpers::suspects), once all is summed.
void repair(const Part& x, const Scratch& s) {
  if (!x.packer.helpers->suspects) return;
  const i64 nr = x.kernel.nr, mr = x.kernel.mr, C = x.c.size(), last = x.panel_rows() - 1;
  unsigned columns[32];
  for (i64 j = 0; j < x.k.size(); j += nr) {
    SuspectArgs a = {};
    a.sum_row = nr, a.n = static_cast<int>(std::min(nr, x.k.size() - j));
    const auto check = [&](i64 row, i64 m, const i64* tap, i64 c) {
      float* const sums = s.sums + j * x.panel_rows() + row * nr;
      a.sum = sums, a.m = static_cast<int>(m);
      if (conv_has_peaks(x.kernel)) a.a_peak = x.row_peaks(s.sums) + row, a.b_peak = x.column_peaks(s.sums) + j;
      if (x.packer.helpers->suspects(a, columns)) compute_again(x, s, a, columns, j, tap, c, sums);
    };
    for (i64 tap = 0; tap < x.all_taps(); ++tap) {
      const i64 taps[3] = {tap / x.taps[2] / x.taps[1], tap / x.taps[2] % x.taps[1], tap % x.taps[2]};
      for (i64 c = 0; c < C; c += mr) check(tap * C + c, std::min(mr, C - c), taps, c);
    }
    if (x.with_bias()) check(last, 1, nullptr, 0);
  }
}

// --- sums to dw ------------------------------------------------------------------------------------------------------
template <class T>
void scatter(const float* sums, i64 count, i64 step, T* out) {
  for (i64 i = 0; i < count; ++i) narrow(sums[i], out + i * step);
}
void scatter(const float* sums, i64 count, i64 step, void* out, DType dtype) {
  if (dtype == DType::f32) {
    scatter(sums, count, step, static_cast<float*>(out));
  } else if (dtype == DType::bf16) {
    scatter(sums, count, step, static_cast<bf16*>(out));
  } else {
    scatter(sums, count, step, static_cast<f16*>(out));
  }
}

void leave(const Part& x, const Scratch& s) {
  const ConvDesc& d = x.d;
  const ConvTensor& w = x.args.w;
  const i64 nr = x.kernel.nr, taps = x.all_taps(), width = vector_width(x.kernel);
  const i64 all = d.kernel[0] * d.kernel[1] * d.kernel[2], k_first = x.group * (d.K / d.groups) + x.k.begin;
  const bool plain = taps == all && w.c_step == all && (d.kernel[2] == 1 || w.step[2] == 1) &&
                     (d.kernel[1] == 1 || w.step[1] == d.kernel[2]) &&
                     (d.kernel[0] == 1 || w.step[0] == d.kernel[1] * d.kernel[2]);
  const i64 wide = taps <= width ? taps : round_up(taps, width);
  float* const by_k = s.stage;  // [tap][k][width], `width` output channels at a time
  float* const by_c = by_k + taps * width * width + kSlack;
  float* const dense = by_c + width * wide + kSlack;
  for (i64 j = 0; j < x.k.size(); j += width) {
    const float* sums = s.sums + j / nr * nr * x.panel_rows() + j % nr;
    const i64 columns = std::min(width, x.k.size() - j);
    if (x.with_bias())
      scatter(sums + (x.panel_rows() - 1) * nr, columns, x.args.dbias_step,
              at(x.args.dbias, (k_first + j) * x.args.dbias_step, d.dtype), d.dtype);
    for (i64 c = 0; c < x.c.size(); c += width) {
      const i64 n = std::min(width, x.c.size() - c);
      for (i64 t = 0; t < taps; ++t)
        x.plain.helpers->pack_a(sums + (t * x.c.size() + c) * nr, 1, nr, columns, static_cast<int>(n),
                                static_cast<int>(width), by_k + t * width * width, nullptr);
      FinishArgs f = {};
      void* const out = at(w.data, (k_first + j) * w.n_step + (x.c.begin + c) * w.c_step, d.dtype);
      if (w.c_step == 1 || (plain && taps == 1)) {
        for (i64 t = 0; t < taps; ++t) {
          const i64 z = x.tap[0] + t / x.taps[2] / x.taps[1], h = x.tap[1] + t / x.taps[2] % x.taps[1];
          const i64 offset = z * w.step[0] + h * w.step[1] + (x.tap[2] + t % x.taps[2]) * w.step[2];
          f.sum = by_k + t * width * width, f.sum_row = width, f.c = at(out, offset, d.dtype), f.c_row = w.n_step;
          f.m = static_cast<int>(columns), f.n = static_cast<int>(n);
          x.packer.helpers->finish(f);
        }
        continue;
      }
      for (i64 k = 0; k < columns; ++k) {
        void* const to = at(out, k * w.n_step, d.dtype);
        if (plain) {
          x.plain.helpers->pack_a(by_k + k * width, 1, width * width, n, static_cast<int>(taps), static_cast<int>(wide),
                                  by_c, nullptr);
          f.sum = by_c;
          if (wide != taps) {
            for (i64 i = 0; i < n; ++i)
              std::memcpy(dense + i * taps, by_c + i * wide, static_cast<std::size_t>(taps) * 4);
            f.sum = dense;
          }
          f.c = to, f.m = 1, f.n = static_cast<int>(n * taps);
          x.packer.helpers->finish(f);
          continue;
        }
        for (i64 t = 0; t < taps; ++t) {
          const i64 z = x.tap[0] + t / x.taps[2] / x.taps[1], h = x.tap[1] + t / x.taps[2] % x.taps[1];
          const i64 offset = z * w.step[0] + h * w.step[1] + (x.tap[2] + t % x.taps[2]) * w.step[2];
          scatter(by_k + (t * width + k) * width, n, w.c_step, at(to, offset, d.dtype), d.dtype);
        }
      }
    }
  }
}

const GemmKernel& widening(const ConvKernel& kernel) {
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= kernel.isa && k.dtype == kernel.dtype && k.kind == GemmKind::kTile && k.k_unit == 1 && k.planes == 1)
      return k;
  return gemm_pack_kernel(Isa::kScalar, kernel.dtype);
}

Part part_at(const ConvDesc& d, const ConvPlan& plan, const ConvArgs& args, i64 index) {
  const ConvWgradPlan& p = plan.wgrad;
  const ConvKernel& kernel = *plan.kernel;
  Part x = {d,
            p,
            args,
            kernel,
            conv_tiles(kernel),
            widening(kernel),
            gemm_pack_kernel(kernel.isa, DType::f32, Precision::fma),
            0,
            0,
            {},
            {},
            {},
            {},
            {}};
  const auto take = [&](i64 count) {
    const i64 i = index % count;
    index /= count;
    return i;
  };
  const i64 C = d.C / d.groups, K = d.K / d.groups, c = take(p.c_parts) * p.c_block, k = take(p.k_parts) * p.k_block;
  x.c = {c, std::min(C, c + p.c_block)}, x.k = {k, std::min(K, k + p.k_block)};
  for (int i = 2; i >= 0; --i) {
    x.tap[i] = take(p.boxes[i]) * p.box[i];
    x.taps[i] = std::min(p.box[i], d.kernel[i] - x.tap[i]);
  }
  x.group = take(d.groups);
  x.chunk = index;
  x.blocks = {p.blocks * x.chunk / p.chunks, p.blocks * (x.chunk + 1) / p.chunks};
  return x;
}

}  // namespace

ConvWgradPlan conv_wgrad_plan(const ConvDesc& d, const ConvKernel& kernel, int threads) {
  ConvWgradPlan p = {};
  const i64 C = std::max<i64>(1, d.C / d.groups), K = std::max<i64>(1, d.K / d.groups), unit = kernel.k_unit;
  const i64 taps = d.kernel[2], mr = kernel.mr, nr = kernel.nr;
  const bool tiled = conv_is_tiled(kernel);
  const i64 c_unit = tiled ? mr : unit;
  std::copy(d.kernel, d.kernel + 3, p.box);
  p.fold = !tiled && taps > 1 && d.dilation[2] == 1 && C < mr && (unit > 1 || C <= vector_width(kernel)) &&
           ceil_div(taps * C, mr) < taps * ceil_div(C, mr);
  // What fixes the order of sums does not depend on the number of threads.
  const i64 rows = d.N * d.out[0] * d.out[1],
            limit = tiled ? block_pixels(kernel) : std::min<i64>(kRuns, kernel.kc * unit);
  p.w_block = std::max<i64>(1, even(d.out[2], limit));
  p.rows = std::clamp<i64>((tiled ? limit : limit + limit / 6) / p.w_block, 1, std::max<i64>(1, std::min(rows, kRuns)));
  p.segments = std::max<i64>(1, ceil_div(d.out[2], p.w_block));
  p.blocks = d.out[2] == 0 ? 0 : ceil_div(rows, p.rows) * p.segments;

  const i64 columns = tiled ? kBandBytes / 4 / conv_units(kernel, limit) : 512;  // tiles: dy of a block is half of it
  p.k_block = round_up(even(round_up(K, nr), columns / nr * nr), nr);
  p.c_block = C;
  constexpr i64 kMinChannels = 32, kTaps = 512;
  for (measure(d, kernel, &p);; measure(d, kernel, &p)) {
    const i64 all = p.box[0] * p.box[1] * p.box[2];
    const bool large = p.sum_bytes > kSumBytes || p.band_bytes > kBandBytes || p.stage_bytes > kBandBytes;
    if (!large && all <= kTaps) break;
    if (p.c_block > kMinChannels && !p.fold) {
      p.c_block = round_up(ceil_div(p.c_block, 2), c_unit);
    } else if (p.k_block > 2 * nr && p.sum_bytes > kSumBytes) {
      p.k_block = round_up(p.k_block / 2, nr);
    } else if (all > 1) {
      int i = p.box[0] > 1 ? 0 : p.box[1] > 1 ? 1 : 2;
      p.box[i] = ceil_div(p.box[i], 2);
    } else if (p.k_block > nr && p.sum_bytes > kSumBytes) {
      p.k_block = round_up(p.k_block / 2, nr);
    } else if (p.c_block > 1 && !p.fold) {
      p.c_block = ceil_div(p.c_block, 2);
    } else {
      break;
    }
  }
  count_parts(d, &p);

  // Chunks: for outputs too small to keep many threads busy, and for the error of very many pixels.
  constexpr i64 kTiles = 64, kBlocks = 64, kChunks = 32, kChunkBytes = i64{8} << 20, kSmall = 512 << 10;
  const i64 tiles = d.groups * ceil_div(taps * d.kernel[0] * d.kernel[1] * C, mr) * ceil_div(K, nr);
  const i64 floats = d.groups * d.kernel[0] * d.kernel[1] * taps * C * round_up(K, nr);
  p.chunks = std::max(ceil_div(kTiles, tiles), ceil_div(p.blocks, kBlocks));
  if (floats * 4 <= kSmall) p.chunks = std::max<i64>(p.chunks, 4);
  p.chunks =
      std::min({p.chunks, kChunks, std::max<i64>(1, kChunkBytes / (floats * 4)), std::max<i64>(1, p.blocks / 2)});

  const auto work = [&] { return p.parts() * d.groups * p.chunks; };
  while (work() < 4 * threads && work() % threads != 0) {
    if (!p.fold && p.c_block >= 2 * mr && p.c_block >= p.k_block / 2) {
      p.c_block = round_up(ceil_div(p.c_block, 2), c_unit);
    } else if (p.k_block >= 2 * nr) {
      p.k_block = round_up(ceil_div(p.k_block, 2), nr);
    } else if (p.box[1] > 1) {
      p.box[1] = ceil_div(p.box[1], 2);
    } else {
      break;
    }
    measure(d, kernel, &p);
    count_parts(d, &p);
  }
  if (p.chunks > 1) {
    p.chunk_bytes = p.chunks * p.parts() * d.groups * p.sum_bytes;
    p.sum_bytes = 0;
  }
  return p;
}

void conv_run_wgrad(const ConvDesc& d, const ConvPlan& plan, const ConvArgs& args) {
  if (d.K == 0) return;
  const ConvWgradPlan& p = plan.wgrad;
  if (d.C == 0 && !args.dbias) return;
  ArenaLease scratch(plan.workspace_bytes());
  const bool tiled = conv_is_tiled(*plan.kernel);
  const i64 parts = p.parts() * d.groups, each = p.chunk_bytes / p.chunks / std::max<i64>(1, parts);
  const auto scratch_of = [&](int thread) {
    char* memory = scratch.data() + p.chunk_bytes + thread * p.per_thread_bytes();
    const auto take = [&](i64 bytes) {
      float* const piece = reinterpret_cast<float*>(memory);
      memory += bytes;
      return piece;
    };
    Scratch s = {};
    s.band = take(p.band_bytes), s.y = take(p.y_bytes), s.stage = take(p.stage_bytes), s.sums = take(p.sum_bytes);
    s.again = take(p.again_bytes);
    return s;
  };
  const auto chunk_sums = [&](i64 index) { return reinterpret_cast<float*>(scratch.data() + index * each); };
  parallel(plan.threads, [&](int thread, int threads) {
    Scratch s = scratch_of(thread);
    const GemmHelpers& helpers = *conv_tiles(*plan.kernel).helpers;
    if (helpers.begin) helpers.begin();
    Block blocks[2];
    const i64 all = parts * p.chunks;
    for (i64 i = all * thread / threads, end = all * (thread + 1) / threads; i < end; ++i) {
      const Part x = part_at(d, plan, args, i);
      if (p.chunks > 1) s.sums = chunk_sums(i);
      if (x.blocks.size() == 0) std::memset(s.sums, 0, static_cast<std::size_t>(x.sum_floats() + x.peak_floats()) * 4);
      if (x.blocks.size() > 0) find_block(x, x.blocks.begin, blocks);
      for (i64 j = 0; j < x.blocks.size(); ++j) {
        const Block& block = blocks[j % 2];
        Block* const next = j + 1 < x.blocks.size() ? blocks + (j + 1) % 2 : nullptr;
        if (next) find_block(x, x.blocks.begin + j + 1, next);
        if (tiled) {
          run_tiles(x, block, s, j > 0);
          continue;
        }
        pack_y(x, block, s.y);
        pack_x(x, block, s);
        run_block(x, block, next, s, j > 0);
      }
      if (p.chunks > 1) continue;
      repair(x, s);
      leave(x, s);
    }
    if (helpers.end) helpers.end();
  });
  if (p.chunks == 1) return;
  parallel(plan.threads, [&](int thread, int threads) {
    Scratch s = scratch_of(thread);
    for (i64 i = parts * thread / threads, end = parts * (thread + 1) / threads; i < end; ++i) {
      const Part x = part_at(d, plan, args, i);
      s.sums = chunk_sums(i);
      FinishArgs f = {};
      f.c = s.sums, f.m = 1, f.n = static_cast<int>(x.sum_floats()), f.accumulate = true;
      for (i64 chunk = 1; chunk < p.chunks; ++chunk) {
        f.sum = chunk_sums(chunk * parts + i);
        x.plain.helpers->finish(f);
        float* const peaks = s.sums + x.sum_floats();
        for (i64 j = 0; j < x.peak_floats(); ++j) peaks[j] = std::max(peaks[j], f.sum[x.sum_floats() + j]);
      }
      repair(x, s);
      leave(x, s);
    }
  });
}

}  // namespace fastdl
