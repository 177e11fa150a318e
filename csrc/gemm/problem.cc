// What the CPU and the CUDA side share: names, and the one form of a problem that gets a kernel.
#include <utility>

#include "base/check.h"
#include "gemm/gemm.h"

namespace fastdl {

std::string describe(const GemmDesc& d) {
  return concat(dtype_name(d.dtype, d.precision), " batch=", d.batch, " M=", d.M, " N=", d.N, " K=", d.K, " A(",
                d.a_row, ",", d.a_col, ") B(", d.b_row, ",", d.b_col, ")", d.packed ? " packed" : "");
}

namespace {

// Leading dimensions that A and C step through as they do through their rows, and that B does not have, are rows.
void fold_batch(GemmDesc* d, GemmArgs* args) {
  GemmBatch& x = args->batch;
  const auto drop = [&](int i) {
    for (--x.dims; i < x.dims; ++i)
      x.size[i] = x.size[i + 1], x.a[i] = x.a[i + 1], x.b[i] = x.b[i + 1], x.c[i] = x.c[i + 1];
  };
  for (int i = x.dims - 1; i >= 0; --i)
    if (x.size[i] == 1) drop(i);
  for (int i = x.dims - 2; i >= 0; --i) {
    const int o = i + 1;
    if (x.a[i] != x.a[o] * x.size[o] || x.b[i] != x.b[o] * x.size[o] || x.c[i] != x.c[o] * x.size[o]) continue;
    x.size[o] *= x.size[i];
    drop(i);
  }
  for (int i = x.dims - 1; i >= 0 && x.b[i] == 0 && d->pairs == 1; --i) {
    if (d->M != 1 && (x.a[i] != d->M * d->a_row || x.c[i] != d->M * args->c_row)) break;
    if (d->M == 1) d->a_row = x.a[i], args->c_row = x.c[i];
    d->M *= x.size[i];
    --x.dims;
  }
  d->batch = 1;
  for (int i = 0; i < x.dims; ++i) d->batch *= x.size[i];
}

}  // namespace

void gemm_canonicalise(GemmDesc* d, GemmArgs* args) {
  fold_batch(d, args);
  // C[M,1] = A b is C^T[1,M] = b^T A^T: one row is what the kernels are good at.
  if (d->N == 1 && d->M > 1 && !d->packed && args->c_row == 1) {
    std::swap(args->a, args->b);
    std::swap(d->M, d->N);
    std::swap(d->a_row, d->b_col);
    std::swap(d->a_col, d->b_row);
    for (int i = 0; i < args->batch.dims; ++i) std::swap(args->batch.a[i], args->batch.b[i]);
    for (int i = 0; i < args->pairs.dims; ++i) std::swap(args->pairs.a[i], args->pairs.b[i]);
    args->bias_step = 0;
    args->c_row = d->N;
    args->pack = nullptr;
  }
  // Strides of dimensions that nobody steps through say nothing: call them contiguous.
  if (d->M == 1) d->a_row = 1;
  if (d->K <= 1) d->a_col = 1;
  if (d->packed) return;
  if (d->K <= 1) d->b_row = 1;
  if (d->N == 1) d->b_col = 1;
}

}  // namespace fastdl
