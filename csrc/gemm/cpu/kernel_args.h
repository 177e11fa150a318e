// What a GEMM microkernel is given, and a row of the kernel table. Included by instruction-set units: plain data only.
#pragma once
#include "base/types.h"

namespace fastdl {

// One register tile: C(i,j) = [C(i,j) +] sum_k A(i,k) * B(k,j) [+ bias(j)], i < m <= MR, j < n <= NR.
struct TileArgs {
  const float* a;  // A(i,k) = a[i*a_row + k*a_col]
  i64 a_row, a_col;
  const float* b;  // B(k,j) = b[k*b_row + j*b_col]; tile kernels need b_col == 1, dot kernels a_col == b_row == 1
  i64 b_row, b_col;
  float* c;  // C(i,j) = c[i*c_row + j]
  i64 c_row;
  const float* bias;  // bias(j) = bias[j*bias_step], or null
  i64 bias_step;
  i64 k;
  int m, n;
  bool accumulate;
};

enum class GemmKind : std::uint8_t {
  kTile,  // rows of A broadcast against panels of B: vectors along N
  kDot,   // rows of A against columns of B, both contiguous along K: vectors along K, nothing packed
};

struct GemmKernel {
  const char* name;
  Isa isa;
  DType dtype;
  GemmKind kind;
  int mr, nr;
  i64 kc;  // K block: accumulators start afresh after each
  void (*tile)(const TileArgs&);
  // dst[k*panel + j] = src[k*k_step + j*j_step] for j < n, 0 for n <= j < panel. panel <= the vector width or a
  // multiple of it; writes up to one vector past dst + k_count*panel.
  void (*pack)(const float* src, i64 k_step, i64 j_step, i64 k_count, int n, int panel, float* dst);
  // out[j] (+)= sum_i x[i*row + j*col] for j < cols
  void (*sum_rows)(const float* x, i64 rows, i64 cols, i64 row, i64 col, float* out, bool accumulate);
};

}  // namespace fastdl
