#include "conv/cpu/direct.h"

#include <algorithm>
#include <cstring>

#include "base/arena.h"
#include "base/parallel.h"
#include "simd/vec.h"

namespace fastdl {

DirectSides direct_sides(const ConvDesc& d) {
  const bool dgrad = d.pass == ConvPass::dgrad;
  DirectSides s;
  for (int i = 0; i < 3; ++i) {
    s.in[i] = dgrad ? d.out[i] : d.in[i];
    s.out[i] = dgrad ? d.in[i] : d.out[i];
    s.phases[i] = dgrad ? std::min(d.stride[i], d.in[i]) : 1;
  }
  s.inputs = (dgrad ? d.K : d.C) / d.groups;
  s.outputs = (dgrad ? d.C : d.K) / d.groups;
  return s;
}

void DirectProblem::finish(const float* sums, i64 sum_row, const ConvTensor& out, i64 first, i64 row, i64 m,
                           i64 n) const {
  FinishArgs e = {};
  e.sum = sums, e.sum_row = sum_row, e.c = at(out.data, first, d.dtype), e.c_row = row;
  e.residual = args.residual ? at(args.residual, first, d.dtype) : nullptr;
  e.pre = args.pre ? at(args.pre, first, d.dtype) : nullptr;
  e.activation = args.activation;
  e.m = static_cast<int>(m), e.n = static_cast<int>(n);
  helpers.finish(e);
}

void direct_combine(const ConvDesc& d, const float* partial, i64 chunks, const ConvTensor& dw, int threads) {
  const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2], inputs = d.C / d.groups, row = inputs * taps;
  parallel(threads, [&](int thread, int team) {
    for (i64 k = d.K * thread / team, end = d.K * (thread + 1) / team; k < end; ++k) {
      i64 i = k * row;
      for (i64 c = 0; c < inputs; ++c) {
        for (i64 z = 0; z < d.kernel[0]; ++z) {
          for (i64 y = 0; y < d.kernel[1]; ++y) {
            i64 at = k * dw.n_step + c * dw.c_step + z * dw.step[0] + y * dw.step[1];
            for (i64 x = 0; x < d.kernel[2]; ++x, ++i, at += dw.step[2]) {
              float sum = partial[i];
              for (i64 p = 1; p < chunks; ++p) sum += partial[p * d.K * row + i];
              switch (d.dtype) {
                case DType::f32:
                  static_cast<float*>(dw.data)[at] = sum;
                  break;
                case DType::bf16:
                  narrow(sum, static_cast<bf16*>(dw.data) + at);
                  break;
                case DType::f16:
                  narrow(sum, static_cast<f16*>(dw.data) + at);
                  break;
              }
            }
          }
        }
      }
    }
  });
}

void direct_bias_grad(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  if (!args.dbias) return;
  RowsDesc rows = {};
  const ConvTensor& dy = args.y;
  const i64 size[] = {d.N, d.out[0], d.out[1], d.out[2]}, step[] = {dy.n_step, dy.step[0], dy.step[1], dy.step[2]};
  for (int i = 0; i < 4; ++i) {
    const int last = rows.dims - 1;
    if (last >= 0 && (size[i] == 1 || rows.stride[last] == size[i] * step[i])) {  // one dimension with the one before
      if (size[i] != 1) rows.size[last] *= size[i], rows.stride[last] = step[i];
    } else {
      rows.size[rows.dims] = size[i], rows.stride[rows.dims++] = step[i];
    }
  }
  rows.cols = d.K, rows.col = dy.c_step, rows.dtype = d.dtype;
  if (args.dbias_step == 1) return gemm_sum_rows(dy.data, rows, args.dbias, p.kernel->isa, p.threads);
  const int item = item_size(d.dtype);
  ArenaLease scratch(d.K * item);
  gemm_sum_rows(dy.data, rows, scratch.data(), p.kernel->isa, p.threads);
  for (i64 k = 0; k < d.K; ++k)
    std::memcpy(static_cast<char*>(args.dbias) + k * args.dbias_step * item, scratch.data() + k * item,
                static_cast<std::size_t>(item));
}

}  // namespace fastdl
