// What the convolution microkernels are given, and a row of the kernel table. Included by instruction-set units: plain
// data only.
#pragma once
#include "conv/cpu/kernel_direct_args.h"
#include "gemm/cpu/kernel_args.h"

namespace fastdl {

// The sums of m output pixels with n output channels: C(i,j) = [C(i,j) +] sum_r sum_k A(i,r,k) * B(r,k,j). Rows of A
// lie anywhere; a run is what is contiguous in all of them alike: channels, or taps along the width with their
// channels.
struct ConvTileArgs {
  const float* const* rows;  // [m]: A(i,r,k) = rows[i][runs[r] + k], k < run: floats, or pairs of 16 bits
  const i64* runs;
  i64 run_count, run;
  const float* b;  // [run_count][run][nr], filled with zeros behind n
  float* c;        // C(i,j) = c[i*c_row + j]
  i64 c_row;
  int m, n;
  bool accumulate;
};

// dst[p*row + c] = src[p*pixel_step + c*c_step] in the form that tiles read, p < pixels, c < channels: float32, or 16
// bits as they are; an odd last channel is paired with zero. For tiles (gemm/cpu/kernel_split.h) a row of dst is
// [ceil(channels/32)][part][32] of bfloat16, filled with zeros. row counts floats. peak: peak[p] = max(peak[p], |src|)
// of the pixel where such are kept, or null.
struct ConvBandArgs {
  const void* src;
  i64 pixel_step, c_step;
  i64 pixels, channels;
  float* dst;
  i64 row;
  float* peak;
};

// As FinishArgs (gemm), to channels that do not lie side by side: C(i,j) = c[i*i_step + j*j_step], likewise residual
// and pre.
struct ConvScatterArgs {
  const float* sum;
  i64 sum_row;
  void* c;
  i64 i_step, j_step;
  const void* bias;
  i64 bias_step;
  const void* residual;
  void* pre;
  Activation activation;
  i64 m, n;
};

// A panel of weights whose channels and taps are one run: dst[(t*units + c/k_unit)*nr + j] = src[j*j_step + c*taps +
// t], units = ceil(channels/k_unit), zeros behind column n. For tiles a panel as GEMM's, [t][channels]. peak: as
// PackFunction's (gemm), or null.
struct ConvPackArgs {
  const void* src;
  i64 j_step, taps, channels;
  int n;
  float* dst;
  float* peak;
};

// Output pixels side by side in scratch: `steps` floats of a packed column each, a and b floats from the operands'
// first.
struct ConvWgradRun {
  i64 a, b, steps;
};

// C(i,j) = [C(i,j) +] sum over the runs of A(i,s) * B(s,j), A(i,s) = a[run.a + s*a_step + i], B(s,j) = b[run.b + s*nr +
// j].
struct ConvWgradArgs {
  const float* a;
  i64 a_step;
  const float* b;
  i64 nr;
  float* c;  // C(i,j) = c[i*nr + j]
  const ConvWgradRun* runs;
  int run_count;
  int m, n;  // whole vectors are read and written, up to nr
  bool accumulate;
};

// C(i,j) = [C(i,j) +] sum_s A(i,s) * B(s,j) on tiles of bfloat16 parts, i, j < 32.
struct ConvFlatArgs {
  const void* a;   // rows a_row bytes apart, [step][part][32]
  const float* b;  // rows of pairs, b_row floats apart, a matrix for each part, b_part floats apart
  i64 a_row, b_row, b_part;
  float* c;   // C(i,j) = c[i*32 + j]
  i64 steps;  // of 32 elements
  bool accumulate;
};

// dst[p/2*row + c] = (src[p*pixel_step + c*c_step], that of pixel p + 1, or 0) for even p < pixels, as parts of
// bfloat16 `part` floats apart; zeros from the last channel to a multiple of 32.
struct ConvPairsArgs {
  const void* src;
  i64 pixel_step, c_step;
  i64 pixels, channels;
  float* dst;
  i64 row, part;
};

enum class ConvKind : std::uint8_t {
  kDense,      // forward and dgrad: tiles of output pixels x output channels
  kWgrad,      // the gradient of the weight
  kDepthwise,  // one channel a group, channels side by side: every pass, direct
  kGrouped,    // several groups: every pass, direct
};

// What a schedule calls; null where its kind has no use for it.
struct ConvFunctions {
  void (*tile)(const ConvTileArgs&) = nullptr;
  int (*rows)(i64 n) = nullptr;  // that a tile of n columns takes
  void (*band)(const ConvBandArgs&) = nullptr;
  void (*scatter)(const ConvScatterArgs&) = nullptr;
  void (*pack)(const ConvPackArgs&) = nullptr;
  void (*wgrad_tile)(const ConvWgradArgs&) = nullptr;
  const DirectOps* direct = nullptr;
  // Tiles: C (+)= A B, A in runs of t.k floats from t.a, `count` of them, or a gathered panel (runs null).
  void (*product)(const TileArgs& t, const i64* runs, i64 count) = nullptr;
  // Flat wgrad on tiles.
  void (*flat)(const ConvFlatArgs&) = nullptr;
  void (*pairs)(const ConvPairsArgs&) = nullptr;
  void (*raise)(const ConvPairsArgs&) = nullptr;  // dst[c] = max(dst[c], |src|), where the kernel has peaks
  // out[i] = (the second element of in[i - row], the first of in[i]) of pairs, row <= i < count.
  void (*next_pairs)(const float* in, i64 row, i64 count, float* out) = nullptr;
  // Whether no element of the band, 16-bit ones side by side, is Inf or NaN.
  bool (*finite)(const float* band, i64 floats) = nullptr;
  // Rows that lie anywhere as the panels of A that tiles of GEMM read; of t: rows, runs, m.
  void (*gather)(const ConvTileArgs& t, float* panel) = nullptr;
};

struct ConvKernel {
  const char* name;
  Isa isa;
  DType dtype;
  Precision precision;  // of products; tiles: of the gemm row whose they are
  ConvKind kind;
  int k_unit;  // elements along the summed dimension in a float of a packed operand: 1, or 2 for pairs of 16 bits
  int k_step;  // packed operands are filled with zeros to a multiple of this many elements
  int planes;  // parts that each operand is split into, side by side
  int mr, nr;
  i64 kc;  // floats along the summed dimension after which accumulators start afresh
  const ConvFunctions* functions;
};

}  // namespace fastdl
