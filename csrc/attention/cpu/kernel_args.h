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

// Scores S [m,n] to P, in place, with the running maximum, sum and output of each row (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
struct SoftmaxArgs {
  float* s;        // row i at s + i*s_row; P takes its place: float32, or bf16 from the start of the row for pairs
  i64 s_row;       // a multiple of the vector width, as is s's alignment to column 0
  int m;           // rows
  int begin, end;  // columns of S that were computed; P is zero where a row does not see one of them
  i64 see_begin, see_end;  // row 0 sees columns [see_begin, see_end) of them, each further row one later (clamped)
  int n;                   // columns that exist
  float scale, softcap;
  bool plain;        // only a positive scale between product and exp: no mask, no softcap
  const void* mask;  // of column 0, row 0
  i64 mask_row, mask_col;
  float* max;  // [m], room for whole vectors; in units of ln 2 where plain
  float* sum;  // [m]
  float* o;    // [m, dv] so far, rescaled where the maximum moves; room for whole vectors
  i64 o_row;
  int dv;
  bool first;  // nothing so far: max, sum and o are not read
  DropoutArgs dropout;
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

struct AttentionOps {
  void (*softmax[4])(const SoftmaxArgs&);  // by MaskKind
  void (*finish)(const AttentionFinishArgs&);
};

enum class AttentionKind : std::uint8_t {
  kTile,  // register tiles of scores against packed panels of K, blocks of keys
};

struct AttentionKernel {
  const char* name;
  Isa isa;
  DType dtype;
  AttentionKind kind;
  int k_unit;  // elements along the summed dimension in a float of a packed panel: 1, or 2 for pairs of 16 bits
  int mr, nr;
  i64 key_block;
  void (*tile)(const TileArgs&);  // gemm's, of that level
  const GemmHelpers* helpers;     // gemm's: packing
  const AttentionOps* ops;
};

}  // namespace fastdl
