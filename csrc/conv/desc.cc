#include "conv/desc.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"

namespace fastdl {

const char* conv_pass_name(ConvPass pass) {
  constexpr const char* kNames[] = {"forward", "dgrad", "wgrad"};
  return kNames[static_cast<int>(pass)];
}

std::string describe(const ConvDesc& d) {
  const auto three = [](const i64* x) { return concat(x[0], "x", x[1], "x", x[2]); };
  return concat(conv_pass_name(d.pass), " ", dtype_name(d.dtype, d.precision), d.channels_last ? " NHWC" : " NCHW",
                " N=", d.N, " C=", d.C, " K=", d.K, " groups=", d.groups, " in=", three(d.in), " out=", three(d.out),
                " kernel=", three(d.kernel), " stride=", three(d.stride), " pad=", three(d.pad),
                " dilation=", three(d.dilation), d.frozen ? " frozen" : "");
}

ConvAxis conv_axis(const ConvDesc& d, int i, i64 phase) {
  const i64 s = d.stride[i], dilation = d.dilation[i], kernel = d.kernel[i];
  if (d.pass != ConvPass::dgrad) return {d.out[i], s, -d.pad[i], kernel, dilation, 1, 0, 0, 1};
  // Taps t with (phase + pad - t*dilation) divisible by s: every q-th one, if any. The last comes first: it meets the
  // first position.
  const i64 g = std::gcd(dilation, s), q = s / g, count = phase < d.in[i] ? (d.in[i] - 1 - phase) / s + 1 : 0;
  const auto at = [&](i64 t) { return phase + d.pad[i] - t * dilation; };
  for (i64 t = 0; t < std::min(kernel, q); ++t) {
    if (at(t) % s != 0) continue;
    const i64 taps = (kernel - 1 - t) / q + 1, last = t + (taps - 1) * q;
    return {count, 1, at(last) / s, taps, dilation / g, s, phase, last, -q};
  }
  return {count, 1, 0, 0, 1, s, phase, 0, 1};
}

}  // namespace fastdl
