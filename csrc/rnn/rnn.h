// One recurrent layer in one direction over a whole sequence; x_gates = x W_ih^T + b_ih comes from one GEMM before.
//   lstm   i f g o = x_gates + h W_hh^T + b_hh;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
//          projected: h = (sigmoid(o) tanh(c)) W_hr^T
//   gru    r z n, n = tanh(x_n + r (h W_n^T + b_n));  h = (1 - z) n + z h
//   plain  h = act(x_gates + h W_hh^T + b_hh), tanh or relu
// x_gates [T,B,G*H], h [B,P], c [B,H], W_hh [G*H,P], W_hr [P,H]; P = H unless projected; G = 4, 3, 1.
//
// Only the product with h is serial in time: threads own slices of hidden units (all gates of a unit together), W_hh is
// packed once before the loop, and one barrier a step makes the new h known. Sums are float32 in an order that the
// shape fixes, c is float32 throughout, h is rounded to the dtype once a step. plan() decides and is pure.
#pragma once
#include <string>
#include <vector>

#include "base/cpu_info.h"
#include "gemm/gemm.h"
#include "rnn/cpu/kernel_args.h"

namespace fastdl {

struct RnnDesc {
  RnnCell cell;
  i64 T, B, H, P;  // B: rows of the largest step
  bool projected = false;
  bool backward = false;
  bool w_rows = true;  // rows of W_hh are contiguous
  DType dtype = DType::f32;
  Precision precision = Precision::ieee;  // asked of float32 operands
};

struct RnnPlan {
  const RnnKernel* kernel;
  const GemmKernel* product;  // backward products and the projection: panels [N/nr][K][nr]
  const GemmKernel* direct;   // multiplies with W_hh where it lies; null: packed
  const GemmKernel* repair;   // computes again, by FMA, what tiles may have got wrong; null where they never do
  int threads;
  i64 row_block;  // rows whose gates wait for the cell together
  // Scratch, shared: packed W_hh, packed W_hr, h or the gradients of the gates (both twice where one barrier a step
  // must do), what is projected, and float32 states; the largest magnitudes of columns of W_hh, of W_hr, and of each
  // thread's part of rows; then a thread's own sums, and what repairs take.
  i64 w_bytes, r_bytes, h_bytes, hidden_bytes, state_bytes, c_bytes, bias_bytes, peak_bytes, sum_bytes, repair_bytes;
  const char* why;

  i64 shared_bytes() const {
    return w_bytes + r_bytes + h_bytes + hidden_bytes + state_bytes + c_bytes + bias_bytes + peak_bytes;
  }
  i64 workspace_bytes() const { return shared_bytes() + threads * (sum_bytes + repair_bytes); }
  bool has_peaks() const { return repair && kernel->dtype == DType::f32; }
};

// Steps in time: all of B rows, or packed: step t works on the first batch_sizes[t] (not rising, positive).
struct RnnSteps {
  const i64* batch_sizes = nullptr;  // [T], or null
  i64 rows;                          // their sum, or T*B
  bool reverse = false;              // from the last step to the first
};

// Rows of a sequence: row b of step t is data[t*step + b*row], packed: data[(rows before t + b)*row].
struct RnnRows {
  void* data;
  i64 step, row;
};

struct RnnArgs {
  RnnSteps steps;
  bool relu = false;
  RnnRows y;      // [T,B,P]
  void* saved;    // [rows, G*H], then [rows, H]: see rnn_saved_width; or null: inference. x may be its first part
  const void* x;  // [rows, G*H], contiguous
  const void* w;  // W_hh(i,k) = w[i*w_row + k*w_col]
  i64 w_row, w_col;
  const void* r;  // W_hr(i,k), or null
  i64 r_row, r_col;
  const void* bias;  // [G*H] (bias_step apart), or null
  i64 bias_step = 1;
  const void* h0;  // [B,P], rows h0_row apart, or null: zeros
  i64 h0_row;
  const void* c0;  // [B,H]
  i64 c0_row;
  void* h_n;  // or null: not wanted
  i64 h_n_row;
  void* c_n;
  i64 c_n_row;
};

struct RnnGradients {
  void* d_gates;      // [rows, G*H]: of x_gates
  void* d_recurrent;  // [rows, H], gru: of h W_n^T + b_n
  void* d_hidden;     // [rows, P], projected: of h
  void* hidden;       // [rows, H], projected: sigmoid(o) tanh(c)
  RnnRows dy;         // [T,B,P]; data null: zeros
  const void* dh_n;   // [B,P], or null: zeros
  i64 dh_n_row;
  const void* dc_n;  // [B,H]
  i64 dc_n_row;
  void* dh0;  // or null: not wanted
  i64 dh0_row;
  void* dc0;
  i64 dc0_row;
};

// Elements that the backward pass needs of a row: the gates as x has them, and behind those of all rows lstm c, gru
// h W_n^T + b_n; plain none (y will do).
inline i64 rnn_saved_width(RnnCell cell, i64 H) {
  constexpr i64 kSaved[] = {5, 4, 0};
  return kSaved[static_cast<int>(cell)] * H;
}

const std::vector<RnnKernel>& rnn_kernels();

RnnPlan rnn_plan(const RnnDesc& desc, const Machine& machine, const RnnKernel* forced = nullptr);
std::vector<std::string> rnn_candidates(const RnnDesc& desc, const Machine& machine, const RnnPlan& chosen);
const char* rnn_cell_name(RnnCell cell);
std::string describe(const RnnDesc& desc);
std::string describe(const RnnDesc& desc, const RnnPlan& plan);

void rnn_run(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& args);
void rnn_run_backward(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& args, const RnnGradients& grads);

CallCounts<RnnKernel>& rnn_calls();

// Plan for this machine, log, count, run: forward, or backward where grads is given.
void rnn(const RnnDesc& desc, const RnnArgs& args, const RnnGradients* grads, const RnnKernel* forced, int threads);

// Columns of W_hh and W_hr as packed, of each of which there is a peak.
struct RnnColumns {
  i64 w, r;
};
RnnColumns rnn_packed_columns(const RnnDesc& desc, const RnnKernel& kernel, const GemmKernel& product);

// Floats of a row of h in scratch: whole cache lines, an odd number of them, so that rows fall on different sets.
inline i64 rnn_padded(i64 floats) { return (ceil_div(floats, 16) | 1) * 16; }

}  // namespace fastdl
