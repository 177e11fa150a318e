// Blocks, boxes and chunks of the weight gradient.
#include "conv/cpu/wgrad_part.h"

namespace fastdl {
namespace {

using wgrad::kSlack, wgrad::kRuns, wgrad::vector_width;

i64 even(i64 size, i64 limit) { return size <= limit ? size : ceil_div(size, ceil_div(size, limit)); }

constexpr i64 kSumBytes = 640 << 10, kBandBytes = 512 << 10;  // and of staging
constexpr i64 kNarrowRows = 28;  // rows of outputs so narrow are packed once a tap: all of a block's are one run then

// Pixels of a block at most: one product's.
i64 block_pixels(const ConvKernel& kernel) { return kernel.kc / kernel.planes * kernel.k_unit; }

// Pixels of a flat block: those of 32 channels stay in L1. (Granite Rapids, a core, products and sums alone, by pixels:
// 256 2.1, 416 2.4, 512 2.5, 640 2.5, 832 1.7, 2048 2.1 TFLOP/s.)
constexpr i64 kFlatPixels = 512;

// Whether turning x once beats making a panel of it for each tap: several of them meet a pixel, and few pixels lie
// between the rows.
bool flat_pays(const ConvDesc& d, const ConvKernel& kernel) {
  if (conv_has_peaks(kernel) && d.kernel[0] > 1) return false;           // peaks know no depths
  if (kernel.planes > 1 && d.stride[1] * d.stride[2] > 1) return false;  // the parts of sub-images leave L2
  // Few taps do not pay for parts of two copies of x (WaveNet, k2, forward and backward, ms: flat 7.5, else 5.5).
  constexpr i64 kTapsInParts = 5;
  if (kernel.planes > 1 && d.kernel[1] * d.kernel[2] < kTapsInParts) return false;
  if (!kernel.functions->flat || d.kernel[1] * d.kernel[2] == 1 || d.out[1] == 0 || d.out[2] == 0) return false;
  if (d.C / d.groups < wgrad::kTileRows || d.K / d.groups < wgrad::kTileRows / 2) return false;
  const i64 tap[3] = {}, width = even(d.out[2], kFlatPixels);
  for (int i = 1; i < 3; ++i) {
    const i64 n = i == 1 ? std::min(d.out[1], std::max<i64>(1, kFlatPixels / width)) : width;
    if ((n - 1) * d.stride[i] + (d.kernel[i] - 1) * d.dilation[i] + 1 > 2 * d.kernel[i] * n) return false;
  }
  const wgrad::Flat f = wgrad::flat_of(d, tap, d.kernel, 0, d.out[1], 0, d.out[2], 2);
  return 2 * (f.h.each * f.w.each) <= 3 * d.out[1] * d.out[2];
}

void measure_flat(const ConvDesc& d, const ConvKernel& kernel, ConvWgradPlan* plan) {
  ConvWgradPlan& p = *plan;
  const i64 tap[3] = {}, rows = std::min(p.rows, d.out[1]), planes = p.rows / rows;
  const wgrad::Flat f = wgrad::flat_of(d, tap, p.box, 0, rows, 0, p.w_block, planes);
  dense::Line h = f.h, w = f.w;  // no block has longer ones
  h.each = std::max(h.each, h.longest()), w.each = std::max(w.each, round_up(w.longest(), 2));
  p.x_floats = wgrad::flat_x_floats(dense::sub_pixels(h, w, planes), p.c_block);
  p.y_row = wgrad::flat_y_row(kernel, ((planes - 1) * h.each + rows) * w.each);
  const i64 subs = h.step * w.step;
  p.band_bytes = pages((2 * subs * kernel.planes * p.x_floats + wgrad::flat_peaks(subs, p.k_block, p.c_block)) * 4);
  p.y_bytes = pages(p.k_block * p.y_row);
}

// Bytes of tiles: a panel of x and one of ones, dy, elements of either in their order, sums with peaks.
void measure_tiles(const ConvDesc& d, const ConvKernel& kernel, ConvWgradPlan* plan) {
  ConvWgradPlan& p = *plan;
  const i64 pixels = p.rows * p.w_block, steps = conv_units(kernel, pixels),
            lines = p.box[0] * p.box[1] * p.box[2] * (p.flat ? round_up(p.c_block, wgrad::kTileRows) : p.c_block) + 1;
  p.band_bytes = pages(steps * (kernel.mr + 16) * 4);
  p.y_bytes = pages(steps * p.k_block * 4);
  if (p.flat) measure_flat(d, kernel, &p);
  p.stage_bytes = pages(p.flat ? p.y_bytes * item_size(kernel.dtype) / 2 / kernel.planes
                               : round_up(pixels, 32) * kernel.mr * item_size(kernel.dtype));
  const i64 width = vector_width(kernel), taps = p.box[0] * p.box[1] * p.box[2];
  const i64 leave = taps * width * width + 2 * width * round_up(taps, width) + 4 * kSlack;
  p.stage_bytes = std::max(p.stage_bytes, pages(leave * 4));
  p.sum_bytes = pages((p.k_block * lines + (conv_has_peaks(kernel) ? p.k_block + lines : 0)) * 4);
  const GemmKernel& exact = wgrad::exact_kernel(kernel.dtype);
  p.again_bytes = conv_tiles(kernel).helpers->suspects
                      ? pages((i64{kernel.mr} * kernel.nr + exact.kc * (exact.mr + kernel.nr) + kSlack) * 4)
                      : 0;
}

// Packed rows, columns and bytes that follow from the box, c_block, k_block, rows and w_block.
void measure(const ConvDesc& d, const ConvKernel& kernel, ConvWgradPlan* plan) {
  if (is_tiled(kernel)) return measure_tiles(d, kernel, plan);
  ConvWgradPlan& p = *plan;
  const i64 unit = kernel.k_unit, width = vector_width(kernel);
  const i64 groups = std::min(p.rows, (p.rows - 1) / std::max<i64>(1, d.out[1]) + 2);
  p.span = (std::min(p.rows, d.out[1]) - 1) * d.stride[1] + (p.box[1] - 1) * d.dilation[1] + 1;
  p.shared_rows = p.rows > 1 && p.span <= (p.rows * p.box[1] - 1) / groups;
  p.slots = p.box[0] * (p.shared_rows ? groups * p.span : p.rows * p.box[1]);
  const i64 wide = (p.w_block - 1) * d.stride[2] + (p.box[2] - 1) * d.dilation[2] + 1, tap = p.box[2];
  p.shared_cols = unit == 1 && (p.fold || (p.w_block > kNarrowRows && wide <= tap * p.w_block && tap > 1));
  const i64 lines = p.fold && unit > 1 ? p.c_block * tap : p.c_block;
  p.cols = p.shared_cols ? wide : ceil_div(p.w_block, unit);
  const i64 copies = p.shared_cols || p.fold ? 1 : tap;
  // What packing writes past a row is overwritten by the next one, but must not reach into another copy.
  p.pitch = lines <= width && copies == 1 ? lines : round_up(lines, width);
  p.band_bytes = pages((copies * p.slots * p.cols * p.pitch + kSlack) * 4);
  p.y_bytes = pages((p.rows * ceil_div(p.w_block, unit) * p.k_block + kSlack) * 4);
  // Pairs are formed of a row as it lies in memory, with its padding; in another layout by way of float32.
  const i64 staged = p.fold ? wide : p.w_block;
  const i64 finish = p.box[0] * p.box[1] * p.box[2];
  const i64 leave = finish * width * width + 2 * width * round_up(finish, width) + 4 * kSlack;
  const i64 stage = unit == 1 ? 0 : staged * (round_up(p.c_block, 2) / 2 + round_up(p.c_block, width)) + 4 * kSlack;
  p.stage_bytes = pages(std::max(stage, leave) * 4);
  const i64 sums = p.k_block * (p.box[0] * p.box[1] * p.box[2] * p.c_block + 1);
  p.sum_bytes = pages(sums * 4);
}

void count_parts(const ConvDesc& d, ConvWgradPlan* p) {
  for (int i = 0; i < 3; ++i) p->boxes[i] = ceil_div(d.kernel[i], p->box[i]);
  p->c_parts = std::max<i64>(1, ceil_div(d.C / d.groups, p->c_block));
  p->k_parts = ceil_div(d.K / d.groups, p->k_block);
}

}  // namespace

ConvWgradPlan conv_wgrad_plan(const ConvDesc& d, const ConvKernel& kernel, int threads, bool may_be_flat) {
  ConvWgradPlan p = {};
  p.flat = may_be_flat && flat_pays(d, kernel);
  const i64 C = std::max<i64>(1, d.C / d.groups), K = std::max<i64>(1, d.K / d.groups), unit = kernel.k_unit;
  const i64 taps = d.kernel[2], mr = kernel.mr, nr = kernel.nr;
  const bool tiled = is_tiled(kernel);
  const i64 c_unit = tiled ? mr : unit;
  std::copy(d.kernel, d.kernel + 3, p.box);
  p.fold = !tiled && taps > 1 && d.dilation[2] == 1 && C < mr && (unit > 1 || C <= vector_width(kernel)) &&
           ceil_div(taps * C, mr) < taps * ceil_div(C, mr);
  // What fixes the order of sums does not depend on the number of threads.
  const i64 rows = d.N * d.out[0] * d.out[1],
            limit = tiled ? block_pixels(kernel) : std::min<i64>(kRuns, kernel.kc * unit);
  p.w_block = std::max<i64>(1, even(d.out[2], p.flat ? kFlatPixels : limit));
  p.rows = std::clamp<i64>((tiled ? limit : limit + limit / 6) / p.w_block, 1, std::max<i64>(1, std::min(rows, kRuns)));
  i64 image = rows;
  if (p.flat) {
    const i64 most = std::min(kRuns, std::max<i64>(1, kFlatPixels / p.w_block)), planes = most / d.out[1];
    if (planes > 0) {
      p.rows = std::min(planes, d.N * d.out[0]) * d.out[1];
    } else {
      p.rows = even(d.out[1], most), image = d.out[1];
    }
  }
  p.segments = std::max<i64>(1, ceil_div(d.out[2], p.w_block));
  p.blocks = d.out[2] == 0 ? 0 : ceil_div(image, p.rows) * (rows / std::max<i64>(1, image)) * p.segments;

  const i64 columns = tiled ? kBandBytes / 4 / conv_units(kernel, limit) : 512;  // tiles: dy of a block is half of it
  p.k_block = p.flat ? round_up(K, nr) : round_up(even(round_up(K, nr), columns / nr * nr), nr);
  p.c_block = C;
  constexpr i64 kMinChannels = 32, kTaps = 512;
  for (measure(d, kernel, &p);; measure(d, kernel, &p)) {
    const i64 all = p.box[0] * p.box[1] * p.box[2];
    const bool wide = p.band_bytes > (p.flat ? kSumBytes : kBandBytes);
    const bool large = p.sum_bytes > kSumBytes || wide || p.stage_bytes > kBandBytes;
    if (!large && all <= kTaps) break;
    if (p.flat && !wide && p.k_block > nr && p.k_block >= p.c_block) {  // turning dy costs as much as pairing x
      p.k_block = round_up(p.k_block / 2, nr);
    } else if (p.c_block > kMinChannels && !p.fold) {
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

}  // namespace fastdl
