// What the attention kernels are given, and a row of their table. Included by instruction-set units: plain data only.
#pragma once
#include "base/types.h"
#include "gemm/cpu/kernel_args.h"

namespace fastdl {

enum class MaskKind : std::uint8_t {
  none,
  boolean,  // bytes: not seen where 0
  f32,      // added
  same,     // added, in the dtype of the operands
};

struct DropoutArgs {
  std::uint64_t seed;
  i64 batch, head, row, col;  // position of element (0,0)
  std::uint64_t threshold;    // kept where the 32 bits drawn are at least this; 0: no dropout
};

// Products that a function starts while it works on others: tiles multiply beside vectors, and in time between them.
// All are alike: A against successive panels of B.
struct ProductsAhead {
  void (*tile)(const TileArgs&);
  TileArgs first;
  int count;   // 0: none
  i64 b_step;  // floats from one panel to the next
  int last_n;  // columns of the last
};

// Scores S [m,n] to P, in place, with the running maximum, sum and output of each row (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
struct SoftmaxArgs {
  float* s;   // row i at s + i*s_row
  i64 s_row;  // a multiple of the vector width, as is s's alignment to column 0
  float* p;   // row i of P at p + i*p_row: float32; bf16 for pairs; bf16 parts for tiles. May be s but for many parts
  i64 p_row;
  int m;                   // rows
  int begin, end;          // columns of S that were computed; P is zero where a row does not see one of them
  int stop;                // columns of P written, whole vectors: zeros from `end` on
  i64 see_begin, see_end;  // row 0 sees columns [see_begin, see_end) of them, each further row one later (clamped)
  int n;                   // columns that exist
  float scale, softcap;
  bool plain;        // only a positive scale between product and exp: no mask, no softcap
  const void* mask;  // of column 0, row 0
  i64 mask_row, mask_col;
  float* max;  // [m], room for whole vectors; of the products where plain, else of the scores
  float* sum;  // [m]
  float* o;    // [m, dv] so far, rescaled where the maximum moves; room for whole vectors
  i64 o_row;
  int dv;
  bool first;  // nothing so far: max, sum and o are not read
  DropoutArgs dropout;
  ProductsAhead ahead[2];
};

// out(i,:) = o(i,:) * factor / sum(i), 0 where sum(i) is 0 (o is not read then).
struct AttentionFinishArgs {
  const float* o;
  i64 o_row;
  const float* sum;
  float factor;
  void* out;
  i64 out_row;
  int m, dv;
};

// s(i,j) = sum_d q(i,d) k(j,d): few rows against keys in place, both contiguous along d. Stores whole groups of 4 keys.
struct DecodeScoresArgs {
  const void* q;
  i64 q_row;
  const void* k;
  i64 k_row;
  float* s;
  i64 s_row;
  int m, n, d;
};

// o(i,:) = sum_j p(i,j) v(j,:), v contiguous along its last dimension; o is written in whole vectors.
struct DecodeValuesArgs {
  const float* p;
  i64 p_row;
  const void* v;
  i64 v_row;
  float* o;
  i64 o_row;
  int m, n, dv;
};

// The row whose keys were split into chunks, each with max, sum and o: o, max and sum of the first chunk become the
// row's.
struct DecodeCombineArgs {
  float *max, *sum, *o;
  i64 row_step, o_step;  // from one chunk to the next
  i64 chunks;
  int dv;
  float factor;  // from the unit of max to that of the scores
};

struct AttentionOps {
  void (*scores)(const DecodeScoresArgs&);
  void (*values)(const DecodeValuesArgs&);
  void (*combine)(const DecodeCombineArgs&);
  void (*softmax[4])(const SoftmaxArgs&);  // by MaskKind
  void (*finish)(const AttentionFinishArgs&);
};

// Scores S and dP = dO V^T of a strip of rows to P' and dS. P = exp(S - lse), P' = P .* keep * factor,
// dS = P .* (dP .* keep * factor - delta) * scale, times the slope of the softcap; a row whose lse is -Inf has none.
struct SoftmaxGradArgs {
  SoftmaxArgs scores;  // s to dropout as there, the running values unused
  const float* g;      // dP, laid out as s; null: no dS
  const float* lse;    // [m,2]: rounded, and what rounding took from it
  const float* delta;
  float factor;  // 1 / (1 - p)
  float scale;
  bool capped;     // dS is that of the scores before the softcap, else that of the mask
  int rows;        // of P and dS written, zeros behind m
  int stop;        // columns written, whole vectors; 0 where a row does not see
  float* p;        // null: not wanted. A row of float32, or two rows as pairs (k_unit 2); rows s_row apart, may be s.
                   // Tiles: [ceil(rows/32)][part][16 pairs of rows][s_row]
  float* ds;       // likewise, may be g
  float* ds_rows;  // k_unit 2: dS once more, each row as 16 bits, rows_step apart. Tiles: [ceil(stop/32)][part][32]
  i64 rows_step;
};

// delta(i) = sum_d dO(i,d) O(i,d), columns of dO dout_col apart, of O contiguous.
struct DeltaArgs {
  const void* dout;
  i64 dout_row, dout_col;
  const void* out;
  i64 out_row;
  float* delta;
  i64 m;
  int dv;
};

struct AttentionGradOps {
  void (*softmax_grad[4])(const SoftmaxGradArgs&);  // by MaskKind, as the products of the row's k_unit read it
  void (*mask_grad[4])(const SoftmaxGradArgs&);     // float32 rows at any k_unit
  void (*delta)(const DeltaArgs&);
  // dst(i,j) = src(j,i), i < m, j < n, whole 16 x 16 blocks; where sums over rows lie turned (tiles), else null.
  void (*turn)(const float* src, i64 src_row, int m, int n, float* dst, i64 dst_row);
};

enum class AttentionKind : std::uint8_t {
  kTile,    // register tiles of scores against packed panels of K, blocks of keys
  kDecode,  // few query rows: K and V are read once, in place, in chunks of keys
};

struct AttentionKernel {
  const char* name;
  Isa isa;
  DType dtype;
  Precision precision;
  AttentionKind kind;
  int k_unit;  // elements along the summed dimension in a float of a packed panel: 1, or 2 for pairs of 16 bits
  int k_step;  // panels are filled with zeros to a multiple of this many
  int planes;  // bf16 parts of an operand, of P and of dS, side by side in a panel
  int mr, nr;
  i64 key_block;                    // keys that share one softmax step
  void (*tile)(const TileArgs&);    // gemm's, of that level
  void (*tile_p)(const TileArgs&);  // for products of P or dS
  const GemmHelpers* helpers;       // gemm's: packing
  const AttentionOps* ops;
  const AttentionGradOps* grads;
};

}  // namespace fastdl
