// The plan of a dense convolution: what a band holds, how outputs are cut into parts, and whether strips multiply them.
#include <algorithm>
#include <cmath>

#include "conv/cpu/dense_problem.h"
#include "gemm/cpu/cost.h"

namespace fastdl::dense {

bool folds(const ConvDesc& d, const ConvKernel& k) {
  const i64 channels = (d.pass == ConvPass::dgrad ? d.K : d.C) / d.groups, taps = d.kernel[2], all = taps * channels;
  if (k.k_unit == 1 || d.pass == ConvPass::wgrad || d.dilation[2] != 1) return false;
  if (is_tiled(k) && channels >= k.k_step) return false;
  constexpr i64 kMost = 192;
  if (taps < 2 || d.stride[2] > taps || all > kMost || channels == 0) return false;
  return conv_units(k, all) < taps * conv_units(k, channels);
}

i64 merged_groups(const ConvDesc& d, const ConvKernel& k) {
  const bool forward = d.pass != ConvPass::dgrad;
  const i64 channels = (forward ? d.C : d.K) / d.groups, columns = (forward ? d.K : d.C) / d.groups;
  if (!k.functions->finite || d.groups == 1 || channels % 2 != 0 || columns == 0 || channels == 0) return 0;
  i64 merge = std::min(d.groups, std::min<i64>(k.k_step / channels, k.nr / columns));
  while (merge > 1 && d.groups % merge != 0) --merge;
  return merge;
}

namespace {

// Positions of the image that n outputs in a row meet.
i64 extent(const ConvAxis& a, i64 n, bool shared) {
  return shared ? (n - 1) * a.in_step + (a.taps - 1) * a.tap_step + 1 : n;
}

constexpr i64 kPixels = 512;   // of a part: their sums, the band and a panel stay in L2
constexpr i64 kColumns = 256;  // output channels of a part

// Not float16: what strips get wrong is summed in float32 by them again, for the repair.
bool has_strips(const ConvKernel& k) { return is_tiled(k) && conv_tiles(k).helpers->strip && k.dtype != DType::f16; }

struct Blocks {
  const ConvDesc& d;
  ConvPlan& p;
  i64 l2, channels;
  bool one_phase, several;  // images in a part, before it is cut for threads
  i64 size[3];              // of the image
  ConvAxis axis[3];         // the longest of every phase

  bool share(int dim, i64 n) const {  // taps of a dimension meet the same positions: copy them once
    const ConvAxis& a = axis[dim];
    return a.taps > 1 && extent(a, n, true) <= a.taps * n;
  }
  // No phase has a longer one.
  Line line(int dim, i64 n) const {
    Line l = line_of(axis[dim], 0, n, p.shared[dim], 0, size[dim]);
    if (!one_phase || n < axis[dim].count) l.each = l.longest();
    return l;
  }
  i64 pixels() const { return p.flat ? flat_pixels() : p.planes * p.rows * p.w_block; }
  // Those between rows are computed too.
  i64 flat_pixels() const {
    return ((p.planes - 1) * line(1, p.rows).each + p.rows - 1) * line(2, p.w_block).each + p.w_block;
  }
  i64 band_pixels() const {
    const Line h = line(1, p.rows), w = line(2, p.w_block);
    return h.step * w.step * sub_pixels(h, w, p.planes) + (p.flat ? 16 : 0);  // whole tiles are read
  }
  i64 pixel_floats() const {
    return conv_pixel_floats(p, conv_units(*p.kernel, (p.fold ? axis[2].taps : 1) * p.c_block));
  }
  // Floats that a column is summed over.
  i64 depth() const {
    return axis[0].taps * axis[1].taps *
           (p.fold ? conv_units(*p.kernel, axis[2].taps * p.c_block) : axis[2].taps * conv_units(*p.kernel, p.c_block));
  }
  // Whether tiles read pixels where they lie in the band, those between its rows, too: gathering 32 elements of 16 rows
  // takes as long as kGathered columns. Sums that may need repair are then not those of the output itself: a deep sum
  // makes up for the copy. (Granite Rapids, two threads, gathered / flat in GFLOP/s: bfloat16 8x64x56x56 k3 1110 /
  // 1630, 8x128x28x28 1610 / 2100, 8x256x14x14, a third of whose pixels lie between, 1660 / 1530; float32 360 / 360,
  // 470 / 540, 460 / 460.)
  bool flat() const {
    constexpr double kGathered = 24, kDeep = 1024;
    if (p.strips) return true;
    const auto taps = static_cast<double>(axis[0].taps * axis[1].taps * axis[2].taps);
    if (!is_tiled(*p.kernel)) return false;
    if (p.repair && taps * static_cast<double>(p.c_block) < kDeep) return false;
    const double extra = static_cast<double>(flat_pixels()) / static_cast<double>(p.planes * p.rows * p.w_block) - 1;
    return static_cast<double>(p.k_block) * extra < kGathered;
  }
  // Pixels between rows, and images if a part may have several, are less than a third of all. How parts are cut among
  // threads has no say: strips sum in another order.
  bool few_between() const {
    const i64 h = axis[1].count, w = p.w_block;
    return 2 * (several ? line(1, h).each : h) * line(2, w).each < 3 * h * w;
  }
  bool strips() const {
    if (!has_strips(*p.kernel) || !d.channels_last || p.mixes_groups()) return false;
    // Sums of several blocks of channels wait in what is written, of float32. (Granite Rapids, two threads, float32,
    // GFLOP/s, without / with: 3x3 512 -> 512 of 8x14x14 389 / 464, 8x7x7 305 / 360; stride 2 of 8x28x28 341 / 295, 1x1
    // stride 2 1024 -> 2048 of 8x14x14 275 / 200.)
    const bool near = axis[1].in_step * axis[2].in_step == 1 && axis[1].taps * axis[2].taps > 1;
    if (p.c_block < channels && (d.dtype != DType::f32 || !near)) return false;
    if (axis[0].taps > 1 || axis[1].taps * axis[2].taps > kMaxRuns) return false;
    for (int i = 1; i < 3; ++i)
      if (axis[i].taps > 1 && !p.shared[i] && !(i == 2 && p.fold)) return false;
    return few_between();
  }
  void count_bytes() const {
    p.strips = strips();
    p.flat = flat();
    p.band_bytes = pages(band_pixels() * pixel_floats() * 4);
    p.stage_floats = p.fold ? extent(axis[2], p.w_block, true) * p.c_block : 0;
    p.band_pixels = is_tiled(*p.kernel) ? band_pixels() : 0;
    p.pointer_bytes = pages((pixels() + (p.strips ? kGemmStripRows : 0)) * 8);
    p.strip_bytes = p.sum_bytes = p.tile_bytes = 0;
    const i64 peaks = conv_has_peaks(*p.kernel) ? p.band_pixels : 0;
    if (p.strips) {
      p.n_block = strip_columns(l2, depth() * 4, p.kernel->nr);
      p.strip_bytes = pages((kGemmStripFloats + kGemmStripRows * pixel_floats() + p.stage_floats + peaks) * 4);
      if (!p.repair) return;
    }
    p.sum_bytes = pages(pixels() * conv_sum_row(*p.kernel, p.k_block) * (p.mixes_groups() ? 8 : 4));
    i64 floats = is_tiled(*p.kernel) ? p.kernel->mr * p.kernel->kc + p.stage_floats : p.stage_floats;
    if (peaks) floats += peaks + pixels();
    if (p.repair)  // a vector of slack: see PackFunction
      floats += i64{p.kernel->mr} * p.kernel->nr + p.repair->kc * (p.repair->mr + p.kernel->nr) + 16;
    p.tile_bytes = pages(floats * 4);
  }
};

// Cuts parts smaller where that shares the work better among threads. The time of a part, an element of the sum apart:
// products, reading weights (kReadCost), copying the image (kCopyCost).
constexpr double kReadCost = 4, kCopyCost = 8;
void balance(const ConvDesc& d, const Blocks& b, i64 columns, int threads) {
  ConvPlan& p = b.p;
  if (threads == 1) return;
  const i64 mr = p.kernel->mr, nr = p.kernel->nr, planes = d.N * b.axis[0].count, height = b.axis[1].count;
  if (planes == 0 || height == 0 || columns == 0) return;
  double phases = 1, taps = 1;
  for (int i = 0; i < 3; ++i) taps *= static_cast<double>(b.axis[i].taps);
  if (d.pass == ConvPass::dgrad)
    for (int i = 0; i < 3; ++i) phases *= static_cast<double>(std::min(d.stride[i], std::max<i64>(1, d.in[i])));
  const i64 rows0 = p.rows, planes0 = p.planes, columns0 = p.k_block;
  double best = -1;
  for (i64 cut_k = 1; cut_k <= threads && ceil_div(columns0, cut_k) >= nr; ++cut_k) {
    const i64 k_block = round_up(ceil_div(columns0, cut_k), nr);
    for (i64 cut = 1; cut <= 4 * threads && cut <= planes0 * rows0; ++cut) {
      // Whole planes while there are several, then rows.
      const i64 many = std::max<i64>(1, ceil_div(planes0, cut));
      const i64 more = cut <= planes0 ? 0 : ceil_div(cut, planes0) - 1;
      const i64 rows = ceil_div(height, ceil_div(height, rows0) + more);
      const i64 blocks = ceil_div(planes, many) * ceil_div(height, rows) * ceil_div(b.axis[2].count, p.w_block);
      const i64 group_block = std::clamp<i64>(k_block / columns, 1, p.group_block);
      const double parts =
          phases * static_cast<double>(ceil_div(d.groups, group_block) * blocks * ceil_div(columns, k_block));
      const double rounds = std::ceil(parts / threads);
      const double pixels = static_cast<double>(round_up(many * rows * p.w_block, mr));
      const double halo = static_cast<double>(extent(b.axis[1], rows, p.shared[1])) / static_cast<double>(rows);
      const double cost =
          rounds * (static_cast<double>(k_block) * (pixels + kReadCost) + kCopyCost / taps * pixels * halo);
      if (best >= 0 && cost >= best * 0.99) continue;
      best = cost;
      p.k_block = k_block, p.planes = many, p.rows = rows;
    }
  }
  if (p.rows < height) p.planes = 1;
  if (p.group_block > 1) {
    const i64 channels = p.c_block / p.group_block;
    p.group_block = std::clamp<i64>(p.k_block / columns, 1, p.group_block), p.c_block = p.group_block * channels;
  }
  b.count_bytes();
}

}  // namespace

void plan_dense(const ConvDesc& desc, const Machine& machine, ConvPlan* plan) {
  ConvPlan& p = *plan;
  const ConvKernel& kernel = *p.kernel;
  const i64 merge = merged_groups(desc, kernel);
  p.merge = std::max<i64>(1, merge);
  const ConvDesc d = conv_merged(desc, p.merge);
  const bool forward = d.pass == ConvPass::forward;
  const i64 columns = (forward ? d.K : d.C) / d.groups, channels = (forward ? d.C : d.K) / d.groups;
  Blocks b = {d, p, machine.l2, channels, true, false, {}, {}};
  i64 phases[3];
  for (int i = 0; i < 3; ++i) {
    phases[i] = forward ? 1 : d.frozen ? d.stride[i] : std::min(d.stride[i], std::max<i64>(1, d.in[i]));
    for (i64 s = 0; s < phases[i]; ++s) {
      const ConvAxis a = conv_axis(d, i, s);
      if (s == 0) b.axis[i] = a;
      b.axis[i].count = std::max(b.axis[i].count, a.count), b.axis[i].taps = std::max(b.axis[i].taps, a.taps);
      b.axis[i].tap_step = std::max(b.axis[i].tap_step, a.tap_step);
    }
    b.axis[i].taps = std::max<i64>(1, b.axis[i].taps);
    b.size[i] = forward ? d.in[i] : d.out[i], b.one_phase = b.one_phase && phases[i] == 1;
  }

  // What fixes the order of sums: it must not depend on the number of threads.
  const i64 height = std::max<i64>(1, b.axis[1].count), width = std::max<i64>(1, b.axis[2].count);
  const i64 planes = std::max<i64>(1, d.N * b.axis[0].count);
  p.k_block = even_block(std::max<i64>(1, columns), kColumns, kernel.nr);
  // Channels of a band. Sizes have no say: frozen packs do not know them. (Zen 4, 64 for 3x3, so that a run of taps is
  // one product, against 256: ten shapes of ResNet forward 1% slower in the mean, up to 5%.)
  const bool strips = has_strips(kernel);
  const bool one_tap = d.kernel[0] * d.kernel[1] * d.kernel[2] == 1;
  const i64 units = !strips             ? 256
                    : kernel.planes > 1 ? 384
                    : one_tap           ? 2048
                                        : 512;  // strips of 16 bits need all in one band
  const i64 channel_limit = kernel.k_unit * units / kernel.planes / kernel.k_step * kernel.k_step;
  p.c_block = even_block(std::max<i64>(1, channels), channel_limit, kernel.k_step);
  p.fold = folds(d, kernel);
  if (p.fold) p.c_block = channels;
  if (merge > 0) {
    p.k_block = even_block(d.groups * columns, kColumns, kernel.nr);
    p.group_block = std::clamp<i64>(std::min(p.k_block / columns, channel_limit / channels), 1, d.groups);
    p.c_block = p.group_block * channels;
    p.fold = false;
  }
  if (is_tiled(kernel) && conv_tiles(kernel).helpers->suspects)
    p.repair = &gemm_pack_kernel(Isa::kAvx512, d.dtype, Precision::fma);
  p.w_block = even_block(width, kPixels, 1);
  p.rows = even_block(height, std::max<i64>(1, kPixels / p.w_block), 1);
  p.planes = p.rows == height ? std::clamp<i64>(kPixels / (p.rows * p.w_block), 1, planes) : 1;
  p.shared[0] = false;
  for (int i = 1; i < 3; ++i) p.shared[i] = b.share(i, i == 1 ? p.rows : p.w_block) && !(p.fold && i == 2);
  if (b.axis[2].taps > 1 && !p.shared[2] && !p.fold) p.shared[1] = false;  // see run: a band's weights lie side by side
  b.several = p.planes > 1;
  // Strips keep no sums: one band for all columns. (1x1, stride 2, 8x1024x14x14 -> 2048: 1280 -> 1690 GFLOP/s.)
  b.count_bytes();
  if (p.strips && !p.repair) p.k_block = even_block(std::max<i64>(1, columns), 8 * kColumns, kernel.nr);
  const auto large = [&] {
    b.count_bytes();
    if (!p.strips && p.merge == 1 && p.group_block == 1)
      p.k_block = even_block(std::max<i64>(1, columns), kColumns, kernel.nr), b.count_bytes();
    return p.per_thread_bytes() > kConvThreadBytes || (p.strips && p.repair && p.band_bytes > (i64{896} << 10));
  };
  while (large()) {
    if (p.planes > 1) {
      p.planes /= 2;
    } else if (p.rows > 4) {
      p.rows /= 2;
    } else if (p.shared[1]) {
      p.shared[1] = false;
    } else if (p.w_block > 64) {
      p.w_block /= 2;
    } else if (p.shared[2]) {
      p.shared[2] = false;
    } else {
      p.rows = std::max<i64>(1, p.rows / 2);
    }
  }

  balance(d, b, columns, p.threads);

  i64 floats = 0, part = 0;
  const i64 panels = ceil_div(columns, kernel.nr);
  for (i64 i = 0; i < phases[0] * phases[1] * phases[2]; ++i) {
    ConvPhase x = {};
    x.axis[0] = conv_axis(d, 0, i / phases[2] / phases[1]);
    x.axis[1] = conv_axis(d, 1, i / phases[2] % phases[1]);
    x.axis[2] = conv_axis(d, 2, i % phases[2]);
    const i64 rows = x.axis[0].taps * x.axis[1].taps, taps = x.axis[2].taps;
    x.steps =
        p.fold ? rows * conv_units(kernel, taps * channels)
               : rows * taps *
                     (channels / p.c_block * conv_units(kernel, p.c_block) + conv_units(kernel, channels % p.c_block));
    x.pack = floats;
    floats += x.steps * panels * kernel.nr;
    x.peaks = floats;
    if (conv_has_peaks(kernel)) floats += panels * kernel.nr;
    const i64 all = d.N * x.axis[0].count;
    x.row_blocks = p.planes > 1 ? ceil_div(all, p.planes) : all * ceil_div(x.axis[1].count, p.rows);
    x.w_blocks = ceil_div(x.axis[2].count, p.w_block);
    if (x.axis[1].count == 0) x.row_blocks = 0;
    x.part = part;
    part += ceil_div(d.groups, p.group_block) * ceil_div(columns, p.k_block) * x.row_blocks * x.w_blocks;
    p.phases.push_back(x);
  }
  p.parts = part;
  p.group_floats = floats;
  p.w_bytes = d.frozen ? 0 : pages(floats * d.groups * 4);
}

}  // namespace fastdl::dense
