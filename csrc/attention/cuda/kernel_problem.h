// What the attention kernels of a GPU are given: plain data.
#pragma once
#include "attention/attention.h"

namespace fastdl {

struct CudaAttentionProblem {
  const void* q;
  const void* k;
  const void* v;
  const void* mask;
  const std::int32_t* seq_q;  // [sequences + 1], on the GPU; null: a dense batch
  const std::int32_t* seq_k;
  AttentionStrides q_step, k_step, v_step, mask_step;  // the mask's in bytes
  int B, H, Hkv, Lq, Lk, D, Dv;  // of packed sequences: B = 1, Lq and Lk are the rows of all together
  int sequences;
  int lo, hi;  // clamped to +-2^29: lengths are below that
  bool align_end, plain;
  bool vector_q, vector_k, vector_v, vector_dout;  // 16-byte copies may read it
  int mask_item;  // bytes of an element: 0 none, 1 boolean, 4 float32, 2 as the operands
  int parts;      // bf16 parts of float32 that are multiplied: 3, with tf32 2, with bf16 1
  float scale, softcap, inverse_softcap;
  float factor;       // from the unit that scores are compared in to the exponent of 2
  float keep_factor;  // 1 / (1 - p)
  std::uint64_t seed, threshold;
};

// out and lse; or, where keys are cut into chunks or over warps, max, sum and O of each piece: `slots` of them.
struct CudaAttentionArgs {
  CudaAttentionProblem p;
  void* out;
  AttentionStrides out_step;
  float* lse;    // [B,H,Lq,2], or null
  float* parts;  // [slots][B*H*Lq][Dv + 2]: max, sum, O
  int tiles;     // of queries, of one head: of packed sequences an upper bound
  int chunks, slots;
  int pack;     // query heads whose rows lie side by side in a tile
  int columns;  // pieces of the columns of O, a block each
};

struct CudaAttentionDeltaArgs {
  const void* dout;
  const void* out;
  float* delta;  // [B,H,Lq]
  AttentionStrides dout_step, out_step;
  int B, H, L, Dv;
};

// The gradients of one side: rows stay (queries or keys), the other side streams by.
struct CudaAttentionGradArgs {
  CudaAttentionProblem p;
  const void* dout;
  AttentionStrides dout_step;
  const float* lse;
  const float* delta;
  void* first;   // dQ, or dK
  void* second;  // dV
  AttentionStrides first_step, second_step;
  int tiles, stages;
  int parts;  // of the columns of the gradients, a block each
  // Of the mask, instead of dQ; sizes 1 where it is broadcast.
  float* dmask;
  AttentionStrides dmask_step;
  int mask_B, mask_H, mask_Lq, mask_Lk;
};

// --- shared memory: the same arithmetic for plans and kernels
constexpr int kGradRows = 64;  // that stay in a block of the backward pass

// Q, K, V; in float32 a tile of scores besides.
constexpr int attention_forward_bytes(int rows, int keys, int depth, int item) {
  return (rows + 2 * keys) * depth * item + (item == 4 ? rows * keys * 4 : 0);
}

// Rows of the side that streams by, a tile; registers, of 255: sums 128 + scores 16 + their gradients 16, float32 has
// parts besides; at depth 256 its shared memory is 128 KiB for the rows that stay alone.
constexpr int attention_stream_rows(int item, int depth) { return item == 4 && depth == 256 ? 16 : 32; }

// Columns whose sums a block keeps: 64 registers, and as many for dV. Depth 256 is two blocks that compute the same
// scores (float32: four): 6 products of a tile instead of 4 for dK and dV, but registers do not spill.
constexpr int attention_sum_columns(int depth, int item) {
  return depth < 128 ? depth : item == 4 ? 64 : 128;  // float32 has parts in registers besides
}
// Of O, in the forward pass; decode likewise: 128 columns of float32 take all 255 registers, 256 spill.
constexpr int attention_out_columns(int depth, int item) {
  return item == 4 ? attention_sum_columns(depth, item) : depth;
}

// Of a query, for blocks whose rows are keys.
struct QuerySide {
  float lse, rest, delta;
  std::uint32_t sees;
  std::uint64_t key;  // of dropout
};

constexpr int attention_still_bytes(int depth, int item) { return 2 * kGradRows * depth * item; }
constexpr int attention_stage_bytes(int cols, int depth, int item, bool keys) {
  return 2 * cols * depth * item + (keys ? (cols * static_cast<int>(sizeof(QuerySide)) + 127) / 128 * 128 : 0);
}

}  // namespace fastdl
