// What a GEMM microkernel is given, and a row of the kernel table. Included by instruction-set units: plain data only.
#pragma once
#include "base/types.h"
#include "simd/activation.h"

namespace fastdl {

// Cache lines to have in L2 soon: `left` of them, in rows of `per_row`, `step` bytes apart, from line `line` of the row
// at p on.
struct Ahead {
  const char* p;
  i64 step, per_row, line, left;
};

// One register tile: C(i,j) = [C(i,j) +] sum_k A(i,k) * B(k,j) [+ bias(j)], i < m <= MR, j < n <= NR.
struct TileArgs {
  const void* a;  // A(i,k) = a[i*a_row + k*a_col]; float for tile kernels, the kernel's dtype for dot kernels
  i64 a_row, a_col;
  const void* b;  // B(k,j) = b[k*b_row + j*b_col]; tile kernels need b_col == 1, dot kernels a_col == b_row == 1
  i64 b_row, b_col;
  float* c;  // C(i,j) = c[i*c_row + j]
  i64 c_row;
  const float* bias;  // bias(j) = bias[j*bias_step], or null
  i64 bias_step;
  i64 k;
  int m, n;
  bool accumulate;
  Ahead ahead[2];  // what calls to come will read; only tiles of bfloat16 parts ask for it
  // Dot kernels: where K comes in several calls, lanes of unfinished sums wait here, kDotLanes floats at most; of the
  // first call they are taken as zeros, and the last one finishes the sums. Null: one call. Columns to come are asked
  // for by `turns` calls in turns.
  float* lanes;
  bool first, last;
  int turn, turns;
};
constexpr i64 kDotLanes = 6 * 4 * 16;

enum class GemmKind : std::uint8_t {
  kTile,  // rows of A broadcast against panels of B: vectors along N
  kDot,   // rows of A against columns of B, both contiguous along K: vectors along K, nothing packed
};

// Sums in float32 to elements of C: z = sum(i,j) [+ C(i,j)] [+ bias(j)], pre(i,j) = narrow(z) where wanted,
// C(i,j) = narrow(activation(z) [+ residual(i,j)]), i < m, j < n. pre and residual lie as C does.
struct FinishArgs {
  const float* sum;
  i64 sum_row;
  void* c;
  i64 c_row;
  const void* bias;  // bias(j) = bias[j*bias_step], or null
  i64 bias_step;
  const void* residual;  // or null
  void* pre;             // or null
  Activation activation;
  int m, n;
  bool accumulate;
};

// A strip of C: finish.m <= 32 rows of A, all of K, against the panels of finish.n columns of B, 32 each. Calls that
// follow each other leave their last block waiting; one of no columns finishes it.
constexpr i64 kGemmStripRows = 32, kGemmStripFloats = kGemmStripRows * kGemmStripRows;
struct GemmStripWaiting {
  // The last block, still in tiles: its rows, or 0.
  void* c;
  const void* bias;
  const i64* row_at;
  i64 rows;
  i64 special;  // not 0: sums that are Inf or NaN have been met, where the kernel has suspects
};
struct GemmStripArgs {
  const void* a;  // rows of the kernel's dtype, a_row bytes apart, or a packed panel
  i64 a_row;
  bool a_packed;
  const i64* runs;  // along K: `run` floats each, runs[r] floats from the first of the row
  i64 run_count, run;
  const void* tail;  // the last step along K, packed, where the rows do not fill it; or null
  const float* b;
  i64 b_panel;        // floats from panel to panel
  float* sums;        // kGemmStripFloats of scratch
  FinishArgs finish;  // of the strip, but for the sums; c_row is not read
  const i64* row_at;  // of C, residual and pre, in elements from their first; below 0: nobody wants it
  GemmStripWaiting* waiting;
  Ahead ahead[2];
};

// dst[k*panel + j] = src[k*k_step + j*j_step] for j < n, 0 for n <= j < panel (k_unit 2: see kernel_pairs.h, tiles:
// see kernel_split.h). panel <= the vector width or a multiple of it; writes up to one vector past dst + k_count*panel.
// peak: peak[j] = max(peak[j], |src[.., j]|) where the kernel has suspects, else unused.
using PackFunction = void(const void* src, i64 k_step, i64 j_step, i64 k_count, int n, int panel, float* dst,
                          float* peak);

// Tile products flush parts, products and sums below 2^-126 to zero. Rows and columns whose largest magnitude is below
// kTinyPeak lose parts that matter, those whose product is below kTinyProduct lose sums that do: neither is relied on.
constexpr float kTinyPeak = 0x1p-100f, kTinyProduct = 0x1p-90f, kTinyScale = 0x1p100f;

// Sums of a tile that a kernel with limits may have got wrong: such, and what is Inf or NaN.
struct SuspectArgs {
  const float* sum;
  i64 sum_row;
  const float* a_peak;  // the largest |a| of each row and |b| of each column; null for float16, which is never tiny
  const float* b_peak;
  int m, n;  // <= 32
};

// What a schedule needs besides the tile: the conversions between a dtype in memory and float32 in registers.
struct GemmHelpers {
  PackFunction* pack_a;
  PackFunction* pack_b;
  void (*finish)(const FinishArgs&);
  // dz[i] = dy[i] * d activation(z[i]) / dz
  void (*activation_grad)(const void* dy, const void* z, i64 count, Activation activation, void* dz);
  // out[j] (+)= sum_i x[i*row + j*col] for j < cols
  void (*sum_rows)(const void* x, i64 rows, i64 cols, i64 row, i64 col, float* out, bool accumulate);
  // The rest only where a kernel needs it, else null.
  void (*begin)();  // called by each thread before and after its tiles
  void (*end)();
  // rows[i] = the columns of row i to compute again; false when there are none. Without it every sum is right.
  bool (*suspects)(const SuspectArgs&, unsigned rows[32]);
  // dst[k*panel + j] = B(k,j) again, from the packed panel that stores it; peak as above.
  void (*unpack_b)(const float* packed, i64 k_count, int n, int panel, const float* peak, float* dst);
  // out[j*out_row + i] = sum[i*32 + j], i, j < 32: where rows of B can take the place of A as they lie.
  void (*turn)(const float* sum, float* out, i64 out_row);
  void (*strip)(const GemmStripArgs&);  // see strips.cc
};

struct GemmKernel {
  const char* name;
  Isa isa;
  DType dtype;  // of A, B, C and bias in memory
  Precision precision;
  GemmKind kind;
  int k_unit;  // elements along K in a float of a packed panel: 1, or 2 for pairs of 16 bits
  int k_step;  // panels are filled with zeros to a multiple of this many elements along K
  int planes;  // parts that each operand is split into, side by side in a panel
  int mr, nr;
  i64 kc;  // K block: accumulators start afresh after each
  void (*tile)(const TileArgs&);
  const GemmHelpers* helpers;
};

}  // namespace fastdl
