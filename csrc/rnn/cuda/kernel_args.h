// What the recurrent kernels are given: plain data. Strides count elements.
#pragma once
#include "ptx/launch.h"
#include "rnn/cuda/layout.h"

namespace fastdl {

// What a product multiplies by W, [sequences][row]: in 16 bits, or the parts of a float32, `plane` apart. Two buffers
// where a step writes what others still read.
struct RnnOperand {
  std::uint16_t* data[2];
  float* wide[2];  // the same in float32; null where data says it all
  i64 plane;
  int row;  // a multiple of kRnnBlockK; zeros behind K
};

// out(b, gate, unit) = sum_k W(gate*units + unit, k) x(b, k)
struct RnnProduct {
  const u32* packed;  // see layout.h
  const void* w;      // W(i,k) = w[i*w_row + k*w_col]
  i64 w_row, w_col;
  int units, K, groups, blocks;  // blocks of K
  int shared_groups;             // of a thread block, where W stays in shared memory
};

// Steps that follow each other, with the same number of sequences.
struct RnnRun {
  int steps, rows;
};
constexpr int kRnnRuns = 64;  // of a launch: half a KB of its 4 KB of parameters

// Rows of a sequence: see RnnRows in rnn.h; packed: step is 0 and rows count from the sequence's start.
struct RnnCudaRows {
  void* data;
  i64 step, row;
};
struct RnnCudaState {
  void* data;  // [B][n], or null
  i64 row;
};

struct RnnCudaArgs {
  RnnCell cell;
  bool relu, projected, packed, rising;  // rising: t grows from step to step
  int H, P, gates;
  int tile_rows, batch_blocks;  // a thread block takes tiles of so many sequences, batch_blocks apart
  int phase_begin, phase_end;   // of each step: the products that this launch runs
  int first_step;               // counted from the first that is computed: the parity of buffers
  int before, after;            // sequences of the step before this launch and of that behind it
  i64 t, row, rows;             // of the first step: its time, the rows before it; all rows
  RnnProduct product[2];
  RnnOperand operand[2];  // of the two products
  u32* arrived;           // [batch_blocks], zeros: grid_sync

  RnnCudaRows y;
  const void* x;  // [rows, G*H]
  void* saved;    // [rows, G*H], then [rows, H]
  const void* bias;
  i64 bias_step;
  RnnCudaState h_n, c0, c_n;
  float* c;  // [B][H]: c, or its gradient

  RnnCudaRows dy;
  void* d_gates;      // [rows, G*H]
  void* d_recurrent;  // [rows, H]
  void* d_hidden;     // [rows, P]
  void* hidden;       // [rows, H]
  RnnCudaState h0, dh_n, dc_n, dh0, dc0;
  float* keep;  // [B][H], gru: the part of the gradient of h that skips W

  int run_count;
  RnnRun runs[kRnnRuns];
};

// Of kernels whose threads stride over so many items.
inline LaunchShape rnn_stride_shape(i64 items) {
  constexpr i64 kMostBlocks = 1024;
  LaunchShape shape;
  const i64 blocks = (items + kRnnThreads - 1) / kRnnThreads;
  shape.threads = kRnnThreads, shape.grid[0] = static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks);
  return shape;
}

// W to fragments.
struct RnnPackArgs {
  const void* w;
  i64 w_row, w_col;
  int units, gates, K, groups, blocks;
  u32* packed;
};

// h0 to both buffers of an operand, zeros behind it; and last states that are the first.
struct RnnBeginArgs {
  RnnCudaState from;
  int B, K, padded_rows;
  RnnOperand to;  // data null: not wanted
  RnnCudaState out;
};

// What a schedule calls: launches of the kernels of a row.
struct CudaRnnFunctions {
  void (*forward)(const LaunchShape&, const Stream&, const RnnCudaArgs&);
  void (*backward)(const LaunchShape&, const Stream&, const RnnCudaArgs&);
  void (*pack)(const LaunchShape&, const Stream&, const RnnPackArgs&);
  void (*begin)(const LaunchShape&, const Stream&, const RnnBeginArgs&);
};

}  // namespace fastdl
