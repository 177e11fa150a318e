// The gradient of the weight, plainly: each element is one sum, row of outputs by row.
#include <algorithm>

#include "base/parallel.h"
#include "conv/conv.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

template <class T>
float load(const ConvTensor& t, i64 n, i64 c, i64 z, i64 h, i64 w) {
  return widen(
      static_cast<const T*>(t.data)[n * t.n_step + c * t.c_step + z * t.step[0] + h * t.step[1] + w * t.step[2]]);
}

template <class T>
void run(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  const i64 channels = d.C / d.groups;
  // Calls body(n, z, h, w) for all outputs; rows are summed apart, so that errors do not grow with their number.
  const auto sum = [&](const auto& row) {
    double total = 0;
    for (i64 n = 0; n < d.N; ++n)
      for (i64 z = 0; z < d.out[0]; ++z)
        for (i64 h = 0; h < d.out[1]; ++h) total += static_cast<double>(row(n, z, h));
    return static_cast<float>(total);
  };
  parallel(p.threads, [&](int thread, int threads) {
    for (i64 k = d.K * thread / threads; k < d.K * (thread + 1) / threads; ++k) {
      if (args.dbias) {
        const float x = sum([&](i64 n, i64 z, i64 h) {
          float s = 0;
          for (i64 w = 0; w < d.out[2]; ++w) s += load<T>(args.y, n, k, z, h, w);
          return s;
        });
        narrow(x, static_cast<T*>(args.dbias) + k * args.dbias_step);
      }
      const i64 group = k / (d.K / d.groups);
      for (i64 c = 0; c < channels; ++c) {
        for (i64 t0 = 0; t0 < d.kernel[0]; ++t0) {
          for (i64 t1 = 0; t1 < d.kernel[1]; ++t1) {
            for (i64 t2 = 0; t2 < d.kernel[2]; ++t2) {
              const float x = sum([&](i64 n, i64 z, i64 h) {
                const i64 xz = z * d.stride[0] - d.pad[0] + t0 * d.dilation[0];
                const i64 xh = h * d.stride[1] - d.pad[1] + t1 * d.dilation[1];
                float s = 0;
                if (xz < 0 || xz >= d.in[0] || xh < 0 || xh >= d.in[1]) return s;
                for (i64 w = 0; w < d.out[2]; ++w) {
                  const i64 xw = w * d.stride[2] - d.pad[2] + t2 * d.dilation[2];
                  if (xw < 0 || xw >= d.in[2]) continue;
                  s += load<T>(args.y, n, k, z, h, w) * load<T>(args.x, n, group * channels + c, xz, xh, xw);
                }
                return s;
              });
              const ConvTensor& o = args.w;
              narrow(x, static_cast<T*>(o.data) + k * o.n_step + c * o.c_step + t0 * o.step[0] + t1 * o.step[1] +
                            t2 * o.step[2]);
            }
          }
        }
      }
    }
  });
}

}  // namespace

void conv_run_wgrad(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  if (d.dtype == DType::f32) {
    run<float>(d, p, args);
  } else if (d.dtype == DType::bf16) {
    run<bf16>(d, p, args);
  } else {
    run<f16>(d, p, args);
  }
}

}  // namespace fastdl
