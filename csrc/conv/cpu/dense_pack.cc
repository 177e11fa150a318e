// The weights of a dense convolution, packed: on every call, or once where they are frozen.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/parallel.h"
#include "conv/cpu/dense_problem.h"

namespace fastdl {
namespace dense {
namespace {

// As pack_columns, taps along the width and channels together: [taps][tap along the width, channel][nr].
void pack_folded(const Problem& x, const ConvPhase& phase, const void* first, const ConvTensor& w, i64 w_channel,
                 i64 w_column, int n, float* out, float* peak) {
  const ConvAxis* const axis = phase.axis;
  const i64 nr = x.p.kernel->nr, all = axis[2].taps * x.channels, step = x.p.kernel->k_step;
  const i64 item = item_size(x.d.dtype);
  float some[32 * 32];  // [column][32]
  for (i64 t = 0; t < axis[0].taps * axis[1].taps; ++t) {
    const i64 t0 = t / axis[1].taps, t1 = t % axis[1].taps;
    const i64 base =
        (axis[0].tap_first + t0 * axis[0].tap_inc) * w.step[0] + (axis[1].tap_first + t1 * axis[1].tap_inc) * w.step[1];
    for (i64 k = 0; k < all; k += step, out += x.units(step) * nr) {
      const i64 depth = std::min(step, all - k);
      char* to = reinterpret_cast<char*>(some);
      for (i64 j = 0; j < n; ++j) {
        for (i64 i = k; i < k + depth; ++i, to += item) {
          const i64 t2 = axis[2].tap_first + i / x.channels * axis[2].tap_inc;
          const void* const from =
              at(first, base + t2 * w.step[2] + i % x.channels * w_channel + j * w_column, x.d.dtype);
          std::memcpy(to, from, static_cast<std::size_t>(item));
        }
      }
      x.helpers.pack_b(some, 1, depth, depth, n, static_cast<int>(nr), out, peak);
    }
  }
}

// n columns of one phase and group: [blocks of channels][taps][channels][nr]. first: element (0, 0) of the first tap.
void pack_columns(const Problem& x, const ConvPhase& phase, const void* first, const ConvTensor& w, i64 w_channel,
                  i64 w_column, int n, float* out, float* peak) {
  const i64 nr = x.p.kernel->nr;
  const i64 taps = phase.axis[0].taps * phase.axis[1].taps * phase.axis[2].taps;
  const i64* const k = x.d.kernel;
  const bool one_run = x.d.pass == ConvPass::forward && w_channel == taps && (k[2] == 1 || w.step[2] == 1) &&
                       (k[1] == 1 || w.step[1] == k[2]) && (k[0] == 1 || w.step[0] == k[1] * k[2]);
  if (one_run && taps > 1 && !x.p.fold) {
    for (i64 c0 = 0; c0 < x.channels; c0 += x.p.c_block) {
      const i64 c = std::min(x.p.c_block, x.channels - c0);
      x.p.kernel->functions->pack({at(first, c0 * taps, x.d.dtype), w_column, taps, c, n, out, peak});
      out += taps * x.units(c) * nr;
    }
    return;
  }
  if (x.p.fold) {
    pack_folded(x, phase, first, w, w_channel, w_column, n, out, peak);
    return;
  }
  for (i64 c0 = 0; c0 < x.channels; c0 += x.p.c_block) {
    const i64 c = std::min(x.p.c_block, x.channels - c0);
    for (i64 t0 = 0; t0 < phase.axis[0].taps; ++t0) {
      for (i64 t1 = 0; t1 < phase.axis[1].taps; ++t1) {
        for (i64 t2 = 0; t2 < phase.axis[2].taps; ++t2) {
          i64 offset = c0 * w_channel;
          const i64 t[3] = {t0, t1, t2};
          for (int i = 0; i < 3; ++i) offset += (phase.axis[i].tap_first + t[i] * phase.axis[i].tap_inc) * w.step[i];
          x.helpers.pack_b(at(first, offset, x.d.dtype), w_channel, w_column, c, n, static_cast<int>(nr), out, peak);
          out += x.units(c) * nr;
        }
      }
    }
  }
}

// As pack_columns, of merged groups: zeros where column and channel belong to different ones.
void pack_merged(const Problem& x, const ConvPhase& phase, i64 group, const ConvTensor& w, float* out) {
  const i64 nr = x.p.kernel->nr, step = x.p.kernel->k_step;
  const i64 channels = x.channels / x.p.merge, columns = x.columns / x.p.merge;
  const i64 rows = x.d.K / x.d.groups / x.p.merge;  // of w, of a group
  const ConvAxis* const axis = phase.axis;
  bf16 some[32 * 32] = {};  // [column][channel]
  for (i64 t = 0; t < axis[0].taps * axis[1].taps * axis[2].taps; ++t, out += x.units(x.channels) * nr) {
    const i64 tap[3] = {t / axis[2].taps / axis[1].taps, t / axis[2].taps % axis[1].taps, t % axis[2].taps};
    i64 offset = 0;
    for (int i = 0; i < 3; ++i) offset += (axis[i].tap_first + tap[i] * axis[i].tap_inc) * w.step[i];
    for (i64 g = 0; g < x.p.merge; ++g) {
      const bf16* const from = static_cast<const bf16*>(w.data) + (group * x.p.merge + g) * rows * w.n_step + offset;
      bf16* const to = some + g * columns * step + g * channels;
      for (i64 j = 0; j < columns; ++j)
        for (i64 c = 0; c < channels; ++c) to[j * step + c] = from[j * x.w_column + c * x.w_channel];
    }
    x.helpers.pack_b(some, 1, step, x.channels, static_cast<int>(x.columns), static_cast<int>(nr), out, nullptr);
  }
}

void pack_panel(const Problem& x, const ConvPhase& phase, i64 group, i64 panel, float* out) {
  const i64 nr = x.p.kernel->nr, j0 = panel * nr;
  const ConvTensor& w = x.args.w;
  if (x.p.merge > 1) return pack_merged(x, phase, group, w, out + x.panel_at(phase, group, panel));
  const void* const first = at(w.data, group * (x.d.K / x.d.groups) * w.n_step + j0 * x.w_column, x.d.dtype);
  float* const peak = conv_has_peaks(*x.p.kernel) ? out + x.peaks_at(phase, group, panel) : nullptr;
  if (peak) std::fill_n(peak, nr, 0.0f);
  pack_columns(x, phase, first, w, x.w_channel, x.w_column, static_cast<int>(std::min(nr, x.columns - j0)),
               out + x.panel_at(phase, group, panel), peak);
}

// Panels `begin` to `end` of one tap whose columns lie side by side: a few rows of all of them at a time, as they
// follow each other in memory. (1x1 stride 2, dgrad of 1024 -> 2048, 1x14x14: 164 -> 330 GFLOP/s.)
void pack_along_rows(const Problem& x, const ConvPhase& phase, i64 group, i64 begin, i64 end, float* out) {
  const i64 nr = x.p.kernel->nr, step = std::max(8, x.p.kernel->k_step);
  const ConvTensor& w = x.args.w;
  i64 first = group * (x.d.K / x.d.groups) * w.n_step;
  for (int i = 0; i < 3; ++i) first += phase.axis[i].tap_first * w.step[i];
  const bool peaks = conv_has_peaks(*x.p.kernel);
  for (i64 p = begin; p < end && peaks; ++p) std::fill_n(out + x.peaks_at(phase, group, p), nr, 0.0f);
  for (i64 c = 0; c < x.channels; c += step) {
    for (i64 p = begin; p < end; ++p) {
      x.helpers.pack_b(at(w.data, first + c * x.w_channel + p * nr, x.d.dtype), x.w_channel, 1,
                       std::min(step, x.channels - c), static_cast<int>(std::min(nr, x.columns - p * nr)),
                       static_cast<int>(nr), out + x.panel_at(phase, group, p) + x.units(c) * nr,
                       peaks ? out + x.peaks_at(phase, group, p) : nullptr);
    }
  }
}

}  // namespace

void pack_weights(const Problem& x, float* out, int threads) {
  const i64 panels = x.panels(), phases = static_cast<i64>(x.p.phases.size());
  const i64 units = x.d.groups * phases * panels;
  const i64* const k = x.d.kernel;
  if (k[0] * k[1] * k[2] == 1 && x.w_column == 1 && !x.p.fold && x.p.merge == 1) {
    parallel(threads, [&](int thread, int n) {
      for (i64 group = 0; group < x.d.groups; ++group)
        for (const ConvPhase& phase : x.p.phases)
          if (phase.steps > 0) pack_along_rows(x, phase, group, panels * thread / n, panels * (thread + 1) / n, out);
    });
    return;
  }
  parallel(threads, [&](int thread, int n) {
    for (i64 u = units * thread / n; u < units * (thread + 1) / n; ++u) {
      const i64 group = u / panels / phases, panel = u % panels;
      const ConvPhase& phase = x.p.phases[static_cast<std::size_t>(u / panels % phases)];
      pack_panel(x, phase, group, panel, out);
    }
  });
}

}  // namespace dense

i64 conv_pack_size(const ConvDesc& d, const Machine& machine) {
  const ConvPlan p = conv_plan(d, machine);
  return p.group_floats * (d.groups / p.merge);
}

void conv_pack(const ConvDesc& d, const Machine& machine, const ConvTensor& w, float* out) {
  const ConvPlan p = conv_plan(d, machine);
  ConvArgs args = {};
  args.w = w;
  const dense::Problem x(d, p, args);
  dense::pack_weights(x, out, p.threads);
  if (!conv_has_peaks(*p.kernel)) return;
  // Columns of tiny values are scaled, so that their parts hold them (kTinyScale).
  const auto tiny = [](float peak) { return peak > 0 && peak < kTinyPeak; };
  const i64 nr = p.kernel->nr, taps = d.kernel[0] * d.kernel[1] * d.kernel[2];
  for (i64 group = 0; group < d.groups; ++group) {
    for (const ConvPhase& phase : p.phases) {
      for (i64 panel = 0; panel < x.panels(); ++panel) {
        const float* const peak = out + x.peaks_at(phase, group, panel);
        const i64 n = std::min(nr, x.columns - panel * nr);
        if (std::none_of(peak, peak + n, tiny)) continue;
        std::vector<float> scaled(static_cast<std::size_t>(n * x.channels * taps));  // [n][taps][channels]
        ConvTensor own = {
            scaled.data(), 0, 0, {d.kernel[1] * d.kernel[2] * x.channels, d.kernel[2] * x.channels, x.channels}};
        const i64 base = group * (d.K / d.groups) * w.n_step + panel * nr * x.w_column;
        auto to = scaled.begin();
        for (i64 j = 0; j < n; ++j)
          for (i64 t = 0; t < taps; ++t)
            for (i64 c = 0; c < x.channels; ++c) {
              const i64 offset = t / d.kernel[2] / d.kernel[1] * w.step[0] + t / d.kernel[2] % d.kernel[1] * w.step[1] +
                                 t % d.kernel[2] * w.step[2];
              *to++ = static_cast<const float*>(w.data)[base + j * x.w_column + c * x.w_channel + offset] *
                      (tiny(peak[j]) ? kTinyScale : 1);
            }
        dense::pack_columns(x, phase, own.data, own, 1, taps * x.channels, static_cast<int>(n),
                            out + x.panel_at(phase, group, panel), nullptr);
      }
    }
  }
}

}  // namespace fastdl
