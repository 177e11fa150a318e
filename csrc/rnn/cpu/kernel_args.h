// What the recurrent microkernels are given, and a row of the kernel table. Included by instruction-set units: plain
// data only. Gates stand in torch's order: lstm i f g o, gru r z n.
#pragma once
#include "gemm/cpu/kernel_args.h"
#include "rnn/kernel_cell.h"

namespace fastdl {

// The state h between steps lies in the form that the products read: float32, or bf16 for products of pairs. Products
// of bf16 parts read those, which lie behind the float32 row that they are the sum of.

// One step of m rows and n <= units hidden units: gates = sums + x + bias, then the cell. Rows of x and saved hold
// their gates H elements apart.
struct RnnUpdateArgs {
  const float* sums;  // [m][gates][units], h W^T
  const float* bias;  // [gates][units]
  const void* x;      // x(i, gate, j) = x[i*gates_row + gate*H + j]
  i64 gates_row, H;
  float* c;  // [m, n], lstm: updated in place
  i64 c_row;
  const void* h;  // [m, n], gru: the state before
  void* h_next;   // [m, n], the state after; sigmoid(o) tanh(c) where that is projected
  i64 h_row;
  void* y;  // [m, n], or null: h rounded to the dtype, h_next then holds what y does
  i64 y_row;
  void* saved;        // or null; as x, which it may be: lstm i f g o, gru r z n
  void* saved_state;  // [m, n], H apart: lstm c, gru h W_n^T + b_n
  int m, n;
  bool relu;
};

// The reverse of one step: from dh and dc (and dy) to the gradients of the gates.
struct RnnGradArgs {
  float* dh;  // [m, n], the gradient of h from later steps; gru: becomes the part of the step before's that skips W
  i64 dh_row;
  const void* dy;  // [m, n], or null
  i64 dy_row;
  float* dc;  // [m, n], lstm: of c from later steps, becomes that of the step before
  i64 dc_row;
  const void* saved;  // as in RnnUpdateArgs
  const void* saved_state;
  const void* before;  // [m, n], or null for zeros: lstm c, gru h of the step before
  i64 before_row;
  const void* y;  // [m, n], plain: h
  i64 y_row;
  void* d_gates;  // of x: d_gates(i, gate, j) = d_gates[i*gates_row + gate*H + j]
  i64 gates_row, H;
  void* d_recurrent;  // [m, n], gru: of h W_n^T + b_n
  void* recurrent;    // the gradients of h W^T once more, in the form that the products read
  i64 product_row;
  void* hidden;  // [m, n], H apart, lstm: sigmoid(o) tanh(c), or null
  int m, n;
  bool relu;
};

// Rows of float32 into their bf16 parts: part p of x(i, s, j) is element s*H + j of the bf16 row parts + i*row +
// p*part.
struct RnnSplitArgs {
  const float* x;  // x(i, s, j) = x[i*row + s*H + j]
  float* parts;
  i64 row, part, H;
  float* peak;  // [m]: the largest |x| of each row, or null
  i64 m, n;
  int segments;
};

// What a schedule calls.
struct RnnFunctions {
  void (*tile)(const TileArgs&);  // m <= mr rows against one panel
  // One block of W[gates*H, K] from hidden unit `unit` on: [panels][steps][nr], columns [gates][units], zeros past H.
  // peak: of each column the largest |w|, zeros before; null where nobody asks.
  void (*pack)(const void* w, i64 w_row, i64 w_col, i64 H, i64 K, i64 unit, float* dst, float* peak);
  void (*update)(const RnnUpdateArgs&);
  void (*grad)(const RnnGradArgs&);
  // n elements: memory to and from the form that products read, to and from float32.
  void (*enter)(const void* x, i64 n, void* out);
  void (*leave)(const void* x, i64 n, void* out);
  void (*widen)(const void* x, i64 n, void* out);
  void (*narrow)(const void* x, i64 n, void* out);
  // dh[i] + dy[i] (dy null: 0) to both forms.
  void (*merge)(const float* dh, const void* dy, i64 n, void* product, void* out);
  void (*split)(const RnnSplitArgs&);  // null where products read what the rest writes
};

struct RnnKernel {
  const char* name;
  Isa isa;
  DType dtype;  // in memory; sums, c and the gates are float32
  Precision precision;
  RnnCell cell;
  int k_unit;  // elements along K in a float of a packed panel
  int k_step;  // panels are filled with zeros to a multiple of this many
  int planes;  // bf16 parts that each operand is split into
  int mr, nr;  // the register tile: rows, columns of a panel
  int panels;  // a block is this many panels: all gates of units() hidden units
  i64 kc;      // K block: accumulators start afresh after each
  const RnnFunctions* fn;

  constexpr int gates() const { return kGates[static_cast<int>(cell)]; }
  constexpr int columns() const { return panels * nr; }
  constexpr int units() const { return columns() / gates(); }
  constexpr bool split() const { return k_unit == 2 && dtype != DType::bf16; }  // h is float32, with parts of bf16
  constexpr int state_unit() const { return split() ? 1 : k_unit; }             // elements in a float of h
  // Floats of a packed column of W, of a part of h, and of a whole row of h, for K elements.
  constexpr i64 steps(i64 K) const { return part_steps(K) * planes; }
  constexpr i64 part_steps(i64 K) const { return (K + k_step - 1) / k_step * k_step / k_unit; }
  constexpr i64 parts_at(i64 K) const { return split() ? (K + 15) / 16 * 16 : 0; }
  constexpr i64 row_steps(i64 K) const { return parts_at(K) + steps(K); }
};

}  // namespace fastdl
