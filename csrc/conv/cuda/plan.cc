#include "conv/cuda/plan.h"

#include <algorithm>

#include "base/check.h"

namespace fastdl {
namespace {

i64 aligned(i64 bytes) { return round_up(bytes, 256); }

constexpr i64 kMostCount = i64{1} << 30;  // of pixels, of products of a sum, of channels
constexpr i64 kMostGroups = 65535;        // of a grid's second dimension
constexpr i64 kMostPartial = i64{1} << 30;
constexpr i64 kMostMerged = 64;  // columns of groups that are one: those of the smaller tile

bool multiply(i64 a, i64 b, i64* out) { return !__builtin_mul_overflow(a, b, out) && *out <= kMostCount; }

// One dimension in 32 bits; false where a position or a step may be too large.
bool narrow(const ConvAxis& a, GatherAxis* out) {
  if (a.count > kMostPosition || a.taps > kMostPosition) return false;
  const i64 in_step = a.count > 1 ? a.in_step : 0, tap_step = a.taps > 1 ? a.tap_step : 0;
  const i64 out_step = a.count > 1 ? a.out_step : 0;
  for (i64 step : {in_step, tap_step, out_step, a.first, a.out_first, a.tap_first, a.tap_inc})
    if (step >= kMostPosition || step <= -kMostPosition) return false;
  const i64 last = (a.count - 1) * in_step + a.first, reach = (a.taps - 1) * tap_step;
  for (i64 z : {last, reach, (a.count - 1) * out_step + a.out_first, (a.taps - 1) * a.tap_inc + a.tap_first})
    if (z >= kMostPosition || z <= -kMostPosition) return false;
  const auto n = [](i64 x) { return static_cast<int>(x); };
  *out = {n(a.count),  n(in_step),     n(a.first),     n(a.taps),   n(tap_step),
          n(out_step), n(a.out_first), n(a.tap_first), n(a.tap_inc)};
  return true;
}

// How many groups tiles take as one. Of a tile's 64 columns a group of c uses c, and reads its channels 2 * c bytes at
// a time: as many groups as have 64 columns are multiplied together, by weights that are zeros from one group to
// another. That costs no more products (64 columns x taps x c channels a group, before c x taps rounded up to a step),
// channels come in whole chunks of 16 bytes, and results leave in whole lines. Not of float32, whose rows pass
// judgement on the largest magnitude of a sum's operands: it would be that of other groups.
i64 merged_groups(const ConvDesc& d) {
  if (d.dtype == DType::f32 || d.groups == 1) return 1;
  const i64 columns = (d.pass == ConvPass::dgrad ? d.C : d.K) / d.groups;
  i64 most = 1;
  for (i64 m = 2; m * std::max<i64>(1, columns) <= kMostMerged; ++m)
    if (d.groups % m == 0) most = m;
  return most;
}

// The gathers of all phases, `merged` groups as one; "" or why 32 bits do not hold them.
const char* plan_gather(const ConvDesc& d, i64 merged, CudaConvPlan* p) {
  const bool dgrad = d.pass == ConvPass::dgrad;
  p->merged = static_cast<int>(merged), p->groups = d.groups / merged;
  const i64 channels = (dgrad ? d.K : d.C) / p->groups, columns = (dgrad ? d.C : d.K) / p->groups;
  i64 phases[3], count = 1;
  for (int i = 0; i < 3; ++i) {
    phases[i] = dgrad ? std::min(d.stride[i], std::max<i64>(1, d.in[i])) : 1;
    if (phases[i] > kMostPhases || (count *= phases[i]) > kMostPhases) return "more than 16 phases";
    if ((dgrad ? d.out[i] : d.in[i]) >= kMostPosition) return "positions beyond 2^29";
  }
  if (d.C > kMostCount || d.K > kMostCount) return "more than 2^30 channels";
  p->channels = static_cast<int>(channels), p->columns = static_cast<int>(columns);
  p->phases = static_cast<int>(count);
  i64 pack = 0, pixels_before = 0;
  for (int i = 0; i < p->phases; ++i) {
    GatherPhase& x = p->phase[i];
    const i64 index[3] = {i / phases[2] / phases[1], i / phases[2] % phases[1], i % phases[2]};
    i64 pixels = d.N, depth = channels;
    if (pixels > kMostCount) return "more than 2^30 pixels";
    for (int j = 0; j < 3; ++j) {
      GatherAxis& a = x.axis[j];
      if (!narrow(conv_axis(d, j, index[j]), &a)) return "positions beyond 2^29";
      x.by_count[j] = fast_div(std::max(1, a.count)), x.by_taps[j] = fast_div(std::max(1, a.taps));
      if (!multiply(pixels, a.count, &pixels)) return "more than 2^30 pixels";
      if (!multiply(depth, a.taps, &depth)) return "sums of more than 2^30 products";
    }
    x.pixels = static_cast<int>(pixels), x.depth = static_cast<int>(depth);
    x.first_pixel = static_cast<int>(pixels_before);
    x.pack_row = static_cast<int>(ceil_div(depth, kPackUnit) * kPackUnit);
    x.pack = pack;
    pack += p->groups * columns * x.pack_row;
    if ((pixels_before += pixels) > kMostCount) return "more than 2^30 pixels";
  }
  return "";
}

// How well a tile of this size uses a multiprocessor, against the largest: operands that it reads for a product.
double efficiency(const CudaConvKernel& k) { return 2.0 * k.tile_m * k.tile_n / (k.tile_m + k.tile_n) / 128; }

i64 tiles_of(const CudaConvPlan& p, const CudaConvKernel& k, CudaConvPlan* out) {
  const i64 tiles_n = ceil_div(p.columns, k.tile_n);
  i64 tiles = 0;
  for (int i = 0; i < p.phases; ++i) {
    const i64 tiles_m = ceil_div(p.phase[i].pixels, k.tile_m);
    if (out) out->phase[i].first_tile = static_cast<int>(tiles), out->phase[i].tiles_m = static_cast<int>(tiles_m);
    tiles += tiles_m * tiles_n;
  }
  if (out) out->tiles_n = static_cast<int>(tiles_n), out->tiles = static_cast<int>(tiles);
  return tiles;
}
i64 wgrad_tiles(const CudaConvPlan& p, const CudaConvKernel& k) {
  return ceil_div(p.columns, k.tile_m) * ceil_div(p.phase[0].depth, k.tile_n);
}

i64 all_tiles(const CudaConvPlan& p, const CudaConvKernel& k) {
  return p.groups * (k.kind == CudaConvKind::kWgrad ? wgrad_tiles(p, k) : tiles_of(p, k, nullptr));
}

// Products of bfloat16 of a product of float32, by precision: less exact rows make fewer.
constexpr double kProducts[] = {1, 6, 3, 1};

double cost(const CudaConvPlan& p, const CudaConvKernel& k, const Gpu& gpu) {
  const i64 tiles = all_tiles(p, k);
  const double waves = static_cast<double>(ceil_div(std::max<i64>(1, tiles), gpu.multiprocessors));
  return waves * k.tile_m * k.tile_n / efficiency(k) * kProducts[static_cast<int>(k.precision)];
}

// Chunks of a sum of `steps`, so that `blocks` of each fill the GPU: at least `least` steps a chunk.
void cut(CudaConvPlan* p, i64 steps, i64 blocks, i64 wanted, i64 least, i64 most_chunks) {
  i64 chunks = blocks >= wanted ? 1 : std::min(ceil_div(wanted, std::max<i64>(1, blocks)), steps / least);
  chunks = std::max<i64>(1, std::min(chunks, most_chunks));
  p->chunk = static_cast<int>(std::max<i64>(1, ceil_div(steps, chunks)));
  p->chunks = static_cast<int>(std::max<i64>(1, ceil_div(steps, p->chunk)));
}

void plan_tile(const ConvDesc& d, const Gpu& gpu, CudaConvPlan* p) {
  const CudaConvKernel& k = *p->kernel;
  tiles_of(*p, k, p);
  i64 steps = 0, pixels = 0, pack = 0;
  for (int i = 0; i < p->phases; ++i) {
    const GatherPhase& x = p->phase[i];
    steps = std::max(steps, ceil_div(x.depth, k.tile_k)), pixels += x.pixels;
    pack = x.pack + p->groups * p->columns * x.pack_row;
  }
  p->pack_bytes = aligned(pack * item_size(d.dtype));
  // A block alone takes 8 steps to pay for writing its sums and reading them again.
  const i64 sum_bytes = 4 * pixels * p->columns * p->groups;
  cut(p, steps, p->tiles * p->groups, gpu.multiprocessors, 8,
      std::min<i64>(64, kMostPartial / std::max<i64>(1, sum_bytes)));
  p->partial_bytes = p->chunks > 1 ? aligned(p->chunks * sum_bytes) : 0;
}

// Pixels of a chunk of dbias, or of a depthwise dw: enough blocks, and sums of a thread that stay short.
constexpr i64 kSumPixels = 2048;

void plan_wgrad(const ConvDesc& d, const Gpu& gpu, CudaConvPlan* p) {
  const CudaConvKernel& k = *p->kernel;
  const GatherPhase& x = p->phase[0];
  p->tiles_n = static_cast<int>(ceil_div(x.depth, k.tile_n));
  p->tiles = static_cast<int>(wgrad_tiles(*p, k));
  // 16-bit sums are not promoted: tensor cores cut each of a chunk's additions, 8192 / 16 of them at most.
  constexpr i64 kMostSteps = 256;
  const i64 steps = ceil_div(x.pixels, k.tile_k), dw_bytes = 4 * d.K * (x.depth / p->merged);
  const i64 most = std::max<i64>(1, std::min<i64>(4096, kMostPartial / std::max<i64>(1, dw_bytes)));
  const i64 blocks = p->tiles * p->groups;
  cut(p, steps, blocks, std::max<i64>(2 * gpu.multiprocessors, blocks * ceil_div(steps, kMostSteps)), 8, most);
  p->partial_bytes = aligned(p->chunks * dw_bytes);
}

void plan_bias_sums(const ConvDesc& d, CudaConvPlan* p) {
  const i64 pixels = p->phase[0].pixels;
  p->bias_chunk = static_cast<int>(std::max<i64>(1, std::max(kSumPixels, ceil_div(pixels, 1024))));
  p->bias_chunks = static_cast<int>(std::max<i64>(1, ceil_div(pixels, p->bias_chunk)));
  p->bias_bytes = aligned(4 * p->bias_chunks * d.K);
}

bool is_depthwise(const ConvDesc& d) { return d.groups > 1 && d.C == d.groups && d.K == d.groups; }

// Whether tiles waste so much on groups of few channels that FMA is faster. By the peaks it does a sixteenth of the
// products of tensor cores (19.5 against 312 TFLOP/s of an A100); the direct kernel loads five operands for four
// products, of which 32 against 64 come in a cycle, and turns each into a float: a quarter of its peak. Its wgrad loads
// two for one, and divides to find where: another sixteenth.
// 3x3, 64 channels in groups of 4 (ResNeXt), a pixel on an A100: 256 bytes of bfloat16 take 165 ps; 64 x 576 products
// by tiles 236 ps, 64 x 36 by FMA 236 ps at its peak and about 950 here. float32: 330 ps of bytes; tiles of each group
// for itself make six products of 64 x 64 for 4 x 36, 2500 ps, and FMA wins.
constexpr i64 kDirectProducts = 64, kDirectWgradProducts = 1024;

bool fma_wins(const ConvDesc& d, const CudaConvPlan& p, const CudaConvKernel& k) {
  if (d.groups == 1) return false;
  const bool wgrad = k.kind == CudaConvKind::kWgrad;
  i64 depth = 1;
  for (int i = 0; i < p.phases; ++i) depth = std::max<i64>(depth, p.phase[i].depth);
  const int tile_m = wgrad ? k.tile_m : k.tile_n, tile_n = wgrad ? k.tile_n : k.tile_k;
  const double useful = static_cast<double>(p.columns) * static_cast<double>(depth) / p.merged;
  const double made =
      static_cast<double>(ceil_div(p.columns, tile_m) * tile_m) * static_cast<double>(ceil_div(depth, tile_n) * tile_n);
  return (wgrad ? kDirectWgradProducts : kDirectProducts) * useful < kProducts[static_cast<int>(k.precision)] * made;
}

CudaConvKind tile_kind(const ConvDesc& d) {
  return d.pass == ConvPass::wgrad ? CudaConvKind::kWgrad : CudaConvKind::kTile;
}

bool is_tile(const CudaConvKernel& k) { return k.kind == CudaConvKind::kTile || k.kind == CudaConvKind::kWgrad; }

// One problem's gathers: every group for itself, and as tiles take them.
struct Gathers {
  CudaConvPlan apart, tiles;
  const char *apart_why, *tiles_why;  // "" or why there is none

  Gathers(const ConvDesc& d, const Gpu& gpu) : apart{}, tiles{} {
    const i64 merged = merged_groups(d);
    apart_why = tiles_why = plan_gather(d, 1, &apart);
    apart.multiprocessors = gpu.multiprocessors, tiles = apart;
    if (merged > 1) tiles_why = plan_gather(d, merged, &tiles);
  }
  const CudaConvPlan& of(const CudaConvKernel& k) const { return is_tile(k) ? tiles : apart; }
};

// "" or why this row cannot run it.
std::string refusal(const ConvDesc& d, const Gathers& gathers, const CudaConvKernel& k) {
  if (k.dtype != d.dtype) return concat("needs ", dtype_name(k.dtype));
  if (k.kind == CudaConvKind::kDirect) return "";
  const CudaConvPlan& p = gathers.of(k);
  const char* gather = is_tile(k) ? gathers.tiles_why : gathers.apart_why;
  if (*gather) return gather;
  if (k.kind == CudaConvKind::kDepthwise) {
    if (!is_depthwise(d)) return "needs one channel a group, in and out";
    constexpr int kMostTaps = 1 << 16;  // blocks of a grid's second dimension take several each
    return p.phase[0].depth > kMostTaps ? "more than 2^16 taps" : "";
  }
  if (k.kind != tile_kind(d)) return "another pass";
  if (p.groups > kMostGroups) return "more than 65535 groups";
  if (d.dtype == DType::f32 && k.precision > d.precision) return "less exact than asked";
  return all_tiles(p, k) > kMostCount ? "more than 2^30 tiles" : "";
}

}  // namespace

const std::vector<CudaConvKernel>& cuda_conv_kernels() {
#define CUDA_CONV_TILE(name, dtype, kind, precision, parts, M, N, warp_m, warp_n, stages) \
  {#name, DType::dtype, CudaConvKind::kind, Precision::precision, M, N, 32, M / warp_m * (N / warp_n) * 32},
#define CUDA_CONV_ROW(name, dtype, kind) {#name, DType::dtype, CudaConvKind::kind, Precision::fma, 0, 0, 0, 256},
  static const std::vector<CudaConvKernel> table = {
#include "conv/cuda/kernels.inc"
  };
#undef CUDA_CONV_TILE
#undef CUDA_CONV_ROW
  return table;
}

const char* cuda_conv_kind_name(CudaConvKind kind) {
  constexpr const char* kNames[] = {"tile", "wgrad", "depthwise", "direct"};
  return kNames[static_cast<int>(kind)];
}

CudaConvPlan cuda_conv_plan(const ConvDesc& d, const Gpu& gpu, const CudaConvKernel* forced) {
  const Gathers gathers(d, gpu);
  const CudaConvKernel* kernel = forced;
  const char* why = "forced";
  if (forced) {
    const std::string refused = refusal(d, gathers, *forced);
    if (!refused.empty()) fail("fastdl.conv: kernel '", forced->name, "': cannot run this: ", refused);
  } else {
    const CudaConvKernel* direct = nullptr;
    bool slower = false;
    double best = -1;
    for (const CudaConvKernel& k : cuda_conv_kernels()) {
      if (!refusal(d, gathers, k).empty()) continue;
      if (k.kind == CudaConvKind::kDepthwise) {
        kernel = &k, why = "one channel a group";
        break;
      }
      if (k.kind == CudaConvKind::kDirect) direct = &k;
      if (!is_tile(k)) continue;
      if (fma_wins(d, gathers.tiles, k)) {
        slower = true;
        continue;
      }
      const double c = cost(gathers.tiles, k, gpu);
      if (best < 0 || c < best)
        best = c, kernel = &k,
        why = gathers.tiles.merged > 1 ? "the fewest waves of tiles, of several groups each"
                                       : "the fewest waves of tiles";
    }
    if (!kernel)
      kernel = direct, why = *gathers.tiles_why ? gathers.tiles_why : slower ? "groups of few channels" : "FMA";
  }
  CudaConvPlan p = gathers.of(*kernel);
  p.kernel = kernel, p.why = why;
  switch (p.kernel->kind) {
    case CudaConvKind::kTile:
      plan_tile(d, gpu, &p);
      break;
    case CudaConvKind::kWgrad:
      plan_wgrad(d, gpu, &p);
      plan_bias_sums(d, &p);
      break;
    case CudaConvKind::kDepthwise:
      if (d.pass != ConvPass::wgrad) {
        i64 taps = 0;
        for (int i = 0; i < p.phases; ++i) p.phase[i].pack = taps * d.C, taps += p.phase[i].depth;
        p.pack_bytes = aligned(4 * taps * d.C);
      } else {
        const GatherPhase& x = p.phase[0];
        p.chunk = static_cast<int>(std::max<i64>(1, std::max(kSumPixels, ceil_div(x.pixels, 1024))));
        p.chunks = static_cast<int>(std::max<i64>(1, ceil_div(x.pixels, p.chunk)));
        p.partial_bytes = aligned(4 * p.chunks * d.K * x.depth);
        plan_bias_sums(d, &p);
      }
      break;
    case CudaConvKind::kDirect:
      break;
  }
  p.grid[0] = p.tiles, p.grid[1] = static_cast<int>(std::min(p.groups, kMostGroups)), p.grid[2] = p.chunks;
  return p;
}

std::vector<std::string> cuda_conv_candidates(const ConvDesc& d, const CudaConvPlan& chosen) {
  const Gathers gathers(d, Gpu{});
  std::vector<std::string> lost;
  for (const CudaConvKernel& k : cuda_conv_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype) continue;
    const std::string why = refusal(d, gathers, k);
    lost.push_back(concat(k.name, ": ", why.empty() ? "another is faster" : why));
  }
  return lost;
}

std::string describe(const ConvDesc& d, const CudaConvPlan& p) {
  return concat("conv ", describe(d), " -> ", p.kernel->name, " phases=", p.phases, " merged=", p.merged,
                " tiles=", p.tiles, " chunks=", p.chunks, " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
