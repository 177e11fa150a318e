// The weight gradient of grouped convolutions: a part is a few groups of a chunk of the blocks of pixels.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/grouped_problem.h"

namespace fastdl::grouped {

void gradient(const Problem& x) {
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const DirectSides& s = x.sides;
  const ConvTensor &image_of = x.args.x, &dy = x.args.y;
  const Phase& phase = x.phases[0];
  const i64 depth = s.inputs * phase.taps;
  ArenaLease scratch(x.p.workspace_bytes());
  float* const partial = reinterpret_cast<float*>(scratch.data() + x.p.threads * q.per_thread_bytes());
  const bool in_place = d.dtype == DType::f32 && (dy.step[2] == 1 || d.out[2] == 1);

  parallel(x.p.threads, [&](int thread, int threads) {
    float* const image = reinterpret_cast<float*>(scratch.data() + thread * q.per_thread_bytes());
    float* const grads = image + q.x_floats;
    const i64 parts = x.bundles * q.chunks, units = d.N * x.pixels;
    for (i64 part = parts * thread / threads, end = parts * (thread + 1) / threads; part < end; ++part) {
      const i64 g0 = part / q.chunks * q.channels, chunk = part % q.chunks;
      const i64 groups = std::min(q.channels, d.groups - g0), k0 = g0 * s.outputs;
      float* const dw = partial + (chunk * d.K + k0) * depth;
      std::fill(dw, dw + groups * s.outputs * depth, 0.0f);
      for (i64 unit = units * chunk / q.chunks, stop = units * (chunk + 1) / q.chunks; unit < stop; ++unit) {
        const i64 n = unit / x.pixels;
        const Block b = x.block(phase, unit % x.pixels);
        const void* const origin = at(image_of.data, n * image_of.n_step + g0 * s.inputs * image_of.c_step, d.dtype);
        copy_image(x, image_of, origin, phase, b, groups * s.inputs, image);
        PlaneGradArgs t = {};
        t.off = phase.off.data(), t.x_depth = phase.extent[1] * phase.extent[2], t.x_row = phase.extent[2];
        t.dw_out = depth, t.taps = depth, t.depths = b.n[0], t.rows = b.n[1], t.cols = b.n[2];
        t.outputs = static_cast<int>(s.outputs);
        const i64 first = n * dy.n_step + k0 * dy.c_step + b.first[0] * dy.step[0] + b.first[1] * dy.step[1] +
                          b.first[2] * dy.step[2];
        const float* from;
        if (in_place) {
          from = static_cast<const float*>(dy.data) + first;
          t.dy_out = dy.c_step, t.dy_depth = dy.step[0], t.dy_row = dy.step[1];
        } else {
          from = grads;
          t.dy_row = b.n[2], t.dy_depth = b.n[1] * b.n[2], t.dy_out = b.n[0] * t.dy_depth;
          for (i64 z = 0; z < b.n[0]; ++z)
            for (i64 y = 0; y < b.n[1]; ++y)
              ops.copy(at(dy.data, first + z * dy.step[0] + y * dy.step[1], d.dtype), dy.c_step, dy.step[2],
                       groups * s.outputs, b.n[2], grads + z * t.dy_depth + y * t.dy_row, t.dy_out);
        }
        for (i64 g = 0; g < groups; ++g) {
          t.x = image + g * s.inputs * phase.planes * phase.plane;
          t.dy = from + g * s.outputs * t.dy_out;
          t.dw = dw + g * s.outputs * depth;
          ops.plane_grad(t);
        }
      }
    }
  });
  direct_combine(d, partial, q.chunks, x.args.w, x.p.threads);
}

}  // namespace fastdl::grouped
