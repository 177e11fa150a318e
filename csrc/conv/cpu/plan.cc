// Which kernel, which blocks, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "conv/cpu/dense_problem.h"
#include "conv/cpu/direct.h"
#include "gemm/cpu/cost.h"
#include "gemm/gemm.h"

namespace fastdl {
namespace {

using namespace dense;

double serial_nanoseconds(const ConvDesc& d) {
  double pixels = static_cast<double>(d.N), taps = 1, in = static_cast<double>(d.N);
  for (int i = 0; i < 3; ++i) {
    pixels *= static_cast<double>(d.out[i]), taps *= static_cast<double>(d.kernel[i]);
    in *= static_cast<double>(d.in[i]);
  }
  const double c = static_cast<double>(d.C) / static_cast<double>(d.groups), k = static_cast<double>(d.K);
  return pixels * taps * c * k * 2 / 100 + (pixels * k + in * static_cast<double>(d.C) + taps * c * k) * 4 / 30;
}

ConvKind kind_of(const ConvDesc& d) { return d.pass == ConvPass::wgrad ? ConvKind::kWgrad : ConvKind::kDense; }

const ConvKernel* find(const ConvDesc& d, Isa isa, Precision precision, ConvKind kind) {
  for (const ConvKernel& k : conv_kernels())
    if (k.isa <= isa && k.dtype == d.dtype && k.precision <= precision && k.kind == kind) return &k;
  return nullptr;
}

// Whether tiles, which multiply groups with zeros between them, beat direct kernels, which have an eighth of their
// rate. (Granite Rapids, two threads, k3, 32 groups, direct / tiles in GFLOP/s: 4 channels 85 / 190, 8 110 / 450, 16
// 150 / 840, 32 180 / 1000. One merged group a part instead of 256 channels: 16 channels of 8x56x56 450, as its lines
// are far apart. Images of fewer than kTilePixels pixels do not pay for the packing.)
bool tiles_pay(const ConvDesc& d, const ConvKernel& k) {
  constexpr i64 kTilePixels = 32;
  if (d.groups == 1 || !k.functions->finite) return false;
  const bool forward = d.pass != ConvPass::dgrad;
  const i64* const size = forward ? d.out : d.in;
  const double pixels = static_cast<double>(d.N) * static_cast<double>(size[0]) * static_cast<double>(size[1]) *
                        static_cast<double>(size[2]);
  if (!d.frozen && pixels < kTilePixels) return false;
  const i64 merge = std::max<i64>(1, merged_groups(d, k)), groups = d.groups / merge;
  const i64 channels = (forward ? d.C : d.K) / groups, columns = (forward ? d.K : d.C) / groups;
  return round_up(channels, k.k_step) * round_up(columns, k.nr / 2) <= 8 * (channels * columns / merge);
}

// Time of a pass, an output channel: in multiply-adds of the float32 FMA kernel, of which a core does 122e9 a second
// where tiles exist. Tiles take 16 rows, and 32 of what is summed over, at a time, and each operand is split into parts
// first; kGather: a row of 32 elements, a load and a store of 64 bytes, in the place of 40 multiply-adds. Frozen packs
// know no sizes: large images then.
constexpr double kGather = 40.0 / 32;
// Weights beyond kNearWeights bytes are read, written packed and read again at twice the time of L3's bytes: few pixels
// leave them to the smaller pack. (Granite Rapids, two threads, float32, in parts / FMA, ms: 3x3 512 -> 512 of 1x7x7
// 1.7 / 1.3, its dgrad 2.0 / 1.3, 8x7x7 6.1 / 6.1; 1x1 stride 2 1024 -> 2048 of 1x14x14 1.8 / 1.2.)
constexpr double kNearWeights = 4 << 20;
// The weight gradient of one tap in parts: x is turned for few products. (256 -> 64 of 8x56x56, ms: 5.4 / 3.3.)
constexpr double kTurnInParts = 3;
double cost(const ConvDesc& d, const ConvKernel& k) {
  const bool tiled = is_tiled(k), forward = d.pass != ConvPass::dgrad;
  const i64 channels = (forward ? d.C : d.K) / d.groups;
  const double columns = std::max(1.0, static_cast<double>((forward ? d.K : d.C) / d.groups));
  double taps = 1, pixels = d.frozen ? 1e6 : static_cast<double>(d.N);
  for (int i = 0; i < 3; ++i) {
    const double phases = forward ? 1 : static_cast<double>(std::min(d.stride[i], d.kernel[i]));
    taps *= static_cast<double>(d.kernel[i]) / phases;
    if (!d.frozen) pixels *= forward ? static_cast<double>(d.out[i]) : std::ceil(static_cast<double>(d.in[i]) / phases);
  }
  const auto blocks = [&](double n, double of) { return tiled ? std::ceil(n / of) * of : n; };
  const double pack = pack_cost(k), gather = kGather * k.planes;
  const double some = static_cast<double>(channels);
  if (d.pass == ConvPass::wgrad) {  // tiles: x is packed for each tap
    const double turn = k.planes == 3 && taps == 1 ? kTurnInParts : 1;
    const double image = tiled ? taps * some * (turn * pack + gather) : some * pack;
    const double width = static_cast<double>(d.kernel[2]);
    return blocks(pixels, 32) * (taps / width * blocks(width * some, 16) / rate(k) + image / columns + pack);
  }
  const bool fold = folds(d, k);
  const i64 lump = fold ? d.kernel[2] : 1;
  const double padded = static_cast<double>(round_up(lump * channels, k.k_step)) / static_cast<double>(lump);
  const double image = padded * (pack + (tiled ? taps * gather : 0));
  const double item = static_cast<double>(item_size(d.dtype)), packed = tiled ? 2.0 * k.planes : 4.0 / k.k_unit;
  const bool far = taps * some * columns * item > kNearWeights;
  const double weight = far ? std::max(pack, 2 * kL3Byte * (item + 2 * packed)) : pack;
  return blocks(pixels, 16) * taps * padded / rate(k) + pixels * image / columns +
         (d.frozen ? 0 : taps * some * weight);
}

// The most exact row that is as exact as asked; tiles only where their shape fits.
const ConvKernel* choose(const ConvDesc& d, Isa isa, const char** why) {
  const ConvKernel* const most = find(d, isa, d.precision, kind_of(d));
  const ConvKernel* const below = find(d, std::min(isa, Isa::kAvx512Bf16), Precision::fma, kind_of(d));
  *why = "the level's own for this pass and dtype";
  if (most == below || cost(d, *most) < cost(d, *below)) return most;
  *why = "too few channels or pixels to pay for tiles";
  return below;
}

// --- direct --------------------------------------------------------------------------------------------------------
bool direct(ConvKind kind) { return kind == ConvKind::kDepthwise || kind == ConvKind::kGrouped; }

// Whether sums of channels side by side, to be turned over, beat planes of pixels: those are taken apart for strides,
// and short rows leave their vectors' ends empty. Time of planes / of these on Zen 4: stride 2 1.1 to 4, 14 pixels 1.05
// to 1.6; 28 pixels 0.8 to 1.1, 112 pixels 0.7 to 1; 12 channels 0.65.
constexpr i64 kTurnChannels = 16, kTurnPixels = 24;
bool turning_pays(const ConvDesc& d) {
  const DirectSides s = direct_sides(d);
  for (i64 f = 0; f < s.phases[2]; ++f) {
    const ConvAxis a = conv_axis(d, 2, f);
    if (a.taps > 0 && (a.tap_step != 1 || !slides(a.taps, a.in_step))) return false;
  }
  return d.C >= kTurnChannels && (d.stride[2] > 1 || s.out[2] < kTurnPixels);
}

// Whether a direct row can do it; then *plan is how.
bool plan_direct(const ConvDesc& d, const ConvKernel& kernel, ConvPlan* plan) {
  i64 size = d.groups > 1 && !d.frozen ? d.N : 0;
  for (int i = 0; i < 3; ++i) size = size && d.in[i] && d.out[i] ? size : 0;
  if (!size || !d.C || !d.K) return false;
  const DirectOps& ops = *kernel.functions->direct;
  DirectPlan& q = plan->direct;
  if (!(kernel.kind == ConvKind::kDepthwise ? plan_depthwise(d, ops, &q) : plan_grouped(d, ops, &q))) return false;
  plan->c_block = q.channels, plan->planes = q.block[0], plan->rows = q.block[1], plan->w_block = q.block[2];
  plan->w_bytes = q.partial_bytes, plan->band_bytes = q.per_thread_bytes();
  return true;
}

}  // namespace

ConvPlan conv_plan(const ConvDesc& d, const Machine& machine, const ConvKernel* forced) {
  ConvPlan p = {};
  p.kernel = forced;
  p.why = "forced";
  if (!forced) {
    const ConvKernel* const tiles = find(d, machine.isa, d.precision, kind_of(d));
    const bool pay = tiles_pay(d, *tiles);
    if (pay && merged_groups(d, *tiles) > 0) p.kernel = tiles, p.why = "groups of few channels, several at a time";
    for (const ConvKernel& k : conv_kernels()) {
      if (pay || p.kernel || k.isa > machine.isa || k.dtype != d.dtype || !direct(k.kind)) continue;
      if (k.kind == ConvKind::kDepthwise && turns(d) && !turning_pays(d)) continue;
      if (!plan_direct(d, k, &p)) continue;
      p.kernel = &k;
      p.why = k.kind == ConvKind::kDepthwise ? "one channel a group" : "groups of few channels";
    }
  }
  if (!p.kernel) p.kernel = choose(d, machine.isa, &p.why);
  const ConvKernel& kernel = *p.kernel;
  if (forced && direct(kernel.kind) && kernel.dtype == d.dtype && !plan_direct(d, kernel, &p))
    fail("fastdl.conv: kernel '", kernel.name, "': expected several groups",
         kernel.kind == ConvKind::kDepthwise ? " of one channel" : "", " that fit its scratch");
  if (kernel.dtype != d.dtype || !(direct(kernel.kind) || kernel.kind == kind_of(d)))
    fail("fastdl.conv: kernel '", kernel.name, "': expected ", dtype_name(kernel.dtype),
         direct(kernel.kind)               ? ""
         : kernel.kind == ConvKind::kWgrad ? " wgrad"
                                           : " forward or dgrad",
         ", got ", dtype_name(d.dtype), " ", conv_pass_name(d.pass));
  p.threads = team_for(serial_nanoseconds(d), machine);
  if (kernel.kind == ConvKind::kDense) plan_dense(d, machine, &p);
  if (kernel.kind == ConvKind::kWgrad) {
    p.wgrad = conv_wgrad_plan(d, kernel, p.threads);
    p.c_block = p.wgrad.c_block, p.k_block = p.wgrad.k_block, p.rows = p.wgrad.rows, p.w_block = p.wgrad.w_block;
    p.parts = p.wgrad.parts() * d.groups * p.wgrad.chunks;
  }
  return p;
}

ConvDesc conv_unfrozen(const ConvDesc& desc, const Machine& machine) {
  ConvDesc d = desc;
  d.frozen = false;
  return desc.frozen && desc.groups > 1 && direct(conv_plan(d, machine).kernel->kind) ? d : desc;
}

std::vector<std::string> conv_candidates(const ConvDesc& d, const Machine& machine, const ConvPlan& chosen) {
  std::vector<std::string> lost;
  for (const ConvKernel& k : conv_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype) continue;
    std::string reason = chosen.why;
    if (k.isa > machine.isa) {
      reason = concat("needs ", isa_name(k.isa));
    } else if (ConvPlan other = {}; direct(k.kind)) {
      reason = plan_direct(d, k, &other) ? "another is faster" : "not what it is for";
    } else if (k.kind != kind_of(d)) {
      reason = "another pass";
    } else if (k.precision > d.precision) {
      reason = "less exact than asked";
    } else if (is_tiled(k) != is_tiled(*chosen.kernel)) {
      reason = concat("estimated at ", std::round(cost(d, k) / cost(d, *chosen.kernel) * 100) / 100, " times the time");
    }
    lost.push_back(concat(k.name, ": ", reason));
  }
  return lost;
}

std::string describe(const ConvDesc& d, const ConvPlan& p) {
  return concat("conv ", describe(d), " -> ", p.kernel->name, " c_block=", p.c_block, " k_block=", p.k_block,
                " planes=", p.planes, " rows=", p.rows, " w_block=", p.w_block, p.flat ? " flat" : "",
                p.strips ? concat(" strips n_block=", p.n_block) : "",
                p.mixes_groups() ? concat(" merge=", p.merge, " group_block=", p.group_block) : "",
                " phases=", p.phases.size(), " chunks=", p.wgrad.chunks, " threads=", p.threads,
                " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
