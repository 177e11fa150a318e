// O(i,:) = sum_j P(i,j) V(j,:) / sum_j P(i,j),   P(i,j) = exp(S(i,j) - max_j S(i,j)),   lse(i) = log sum_j exp S(i,j)
// S(i,j) = cap(scale * sum_d Q(i,d) K(j,d)) + mask(i,j),   cap(x) = softcap * tanh(x / softcap) where softcap > 0
//
// Q [B,H,Lq,D], K [B,Hkv,Lk,D], V [B,Hkv,Lk,Dv], O [B,H,Lq,Dv], any strides (O: unit stride along Dv); query head h
// reads key head h / (H / Hkv). Keys outside lo <= j - i <= hi are not seen; a row that sees none gives 0, lse -Inf.
// lse is two floats a row: the value rounded, and what rounding took from it (0 where that is not finite), for beside
// scores of 1e38 one float loses the log of the number of keys.
// Dropout zeroes elements of P after the sum and divides by 1 - p. Softmax and sums are float32, rounded once. Each
// row is summed in an order that depends on its shape and the kernel alone, so results do not change with the threads.
#pragma once
#include <string>
#include <vector>

#include "attention/cpu/kernel_args.h"
#include "base/cpu_info.h"
#include "base/names.h"
#include "base/sizes.h"
#include "base/table.h"

namespace fastdl {

// Elements from one index to the next.
struct AttentionStrides {
  i64 batch, head, row, col;
};

struct AttentionDesc {
  i64 B, H, Hkv, Lq, Lk, D, Dv;   // of a variable-length batch: B = 1, Lq and Lk are the longest sequence's
  i64 sequences = 0;              // of a variable-length batch, else 0
  i64 total_q = 0, total_k = 0;   // rows of all sequences together
  AttentionStrides q, k, v, out;  // out.col is 1
  MaskKind mask = MaskKind::none;
  AttentionStrides mask_step = {};  // 0 where the mask is broadcast
  float scale = 1, softcap = 0;
  i64 lo = INT64_MIN, hi = INT64_MAX;  // the range of j - i that is seen
  bool align_end = false;              // j - i counts from the bottom right corner
  double dropout_p = 0;
  std::uint64_t seed = 0;
  DType dtype = DType::f32;
  Precision precision = Precision::ieee;  // asked of products of float32
};

struct AttentionPlan {
  const AttentionKernel* kernel;
  const AttentionKernel* exact;  // for strips and blocks that the kernel has limits for, by FMA; null where it has none
  i64 strips;     // register tiles of query rows in a query block: the rows that share a block of K and V
  i64 key_block;  // keys a block
  i64 blocks;     // of keys, in the longest sequence
  bool keep_k;    // packed K (and V) of a whole head stay in scratch while a thread works on its query blocks
  bool pack_v;    // else V is read in place
  int threads;
  i64 shared_bytes;  // decode: max, sum and output of every row and chunk
  i64 q_bytes, k_bytes, v_bytes, s_bytes, p_bytes, o_bytes, row_bytes;  // scratch of a thread; p: where not in s
  i64 p_row;                                                            // floats from one row of P to the next
  i64 exact_q_floats, exact_k_floats, exact_bytes;                      // operands of `exact`, a thread
  const char* why;

  i64 workspace_bytes() const { return shared_bytes + threads * per_thread_bytes(); }
  i64 per_thread_bytes() const {
    return q_bytes + k_bytes + v_bytes + s_bytes + p_bytes + o_bytes + row_bytes + exact_bytes;
  }
};

struct AttentionArgs {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;                  // [B,H,Lq,2], or null
  const void* mask = nullptr;  // MaskKind::boolean: bytes
  const i64* seq_q = nullptr;  // [sequences + 1]: first row of each sequence
  const i64* seq_k = nullptr;
};

// What the backward pass takes besides AttentionArgs (out and lse are inputs there). Null gradients are not computed.
struct AttentionGrads {
  const void* dout;  // [B,H,Lq,Dv], strides dout_step
  AttentionStrides dout_step;
  void* dq;  // as q, k, v but with strides of their own, unit along the last dimension
  void* dk;
  void* dv;
  AttentionStrides dq_step, dk_step, dv_step;
  float* dmask;                 // gradient of the mask, summed over its dimensions of size 1
  AttentionStrides dmask_step;  // 0 there
};

const char* kind_name(AttentionKind kind);
const std::vector<AttentionKernel>& attention_kernels();

// One sequence of the batch: dense batches have Lq and Lk for all.
struct AttentionSpan {
  i64 q_begin, k_begin, Lq, Lk;
  i64 offset;  // the corner that j - i counts from: seen where lo <= j - i - offset <= hi
};

AttentionSpan attention_span(const AttentionDesc& desc, const AttentionArgs& args, i64 sequence);

// Before rows of a result [batch, heads, rows, depth] are written: see advise_huge_pages.
void advise_result(void* data, const AttentionStrides& step, i64 batch, i64 heads, i64 rows, i64 depth, DType dtype);

// The row of a level that is at least as exact as asked.
const AttentionKernel& attention_row(Isa isa, DType dtype, Precision precision, AttentionKind kind);
// Estimated time of a score, in multiply-adds of the float32 FMA kernel: products of D and Dv, conversions of P and dS.
double attention_tile_cost(const AttentionDesc& desc, const AttentionKernel& kernel, bool backward);
// The tile kernel of least cost.
const AttentionKernel& attention_tile_row(const AttentionDesc& desc, Isa isa, bool backward, const char** why);
// By FMA, for operands that a kernel has limits for; null where it has none.
const AttentionKernel* attention_exact_row(const AttentionKernel& kernel);

AttentionPlan attention_plan(const AttentionDesc& desc, const Machine& machine,
                             const AttentionKernel* forced = nullptr);
std::vector<std::string> attention_candidates(const AttentionDesc& desc, const Machine& machine,
                                              const AttentionPlan& chosen);
std::string describe(const AttentionDesc& desc);
std::string describe(const AttentionDesc& desc, const AttentionPlan& plan);

void attention_run(const AttentionDesc& desc, const AttentionPlan& plan, const AttentionArgs& args);

// Plan for this machine, log, count, run.
AttentionPlan attention(const AttentionDesc& desc, const AttentionArgs& args, const AttentionKernel* forced,
                        int threads);
void attention_backward(const AttentionDesc& desc, const AttentionArgs& args, const AttentionGrads& grads,
                        const AttentionKernel* forced, int threads);

// An element is kept where its 32 bits (kernel_random.h) are at least this: p = 1 keeps none.
inline std::uint64_t dropout_threshold(double p) { return static_cast<std::uint64_t>(p * 4294967296.0); }
// keep[B,H,Lq,Lk], contiguous: the elements that dropout keeps.
void attention_keep(bool* keep, i64 B, i64 H, i64 Lq, i64 Lk, double dropout_p, std::uint64_t seed);

CallCounts<AttentionKernel>& attention_calls();
// Scores (and what follows from them) that were left to AttentionPlan::exact since the process began.
i64 attention_recomputed();
void attention_count_recomputed(i64 scores);

}  // namespace fastdl
