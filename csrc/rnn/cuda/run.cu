// Lays out the workspace, packs W, and walks the steps: one launch for as many as a launch's parameters can say, or
// one for each.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "rnn/cuda/kernel_args.h"
#include "rnn/cuda/plan.h"

namespace fastdl {
namespace {

RnnCudaRows rows_of(const RnnRows& r) { return {r.data, r.step, r.row}; }
RnnCudaState state_of(const void* data, i64 row) { return {const_cast<void*>(data), row}; }

// The steps in the order in which they are computed, as runs of equal sizes.
struct Steps {
  const RnnDesc& d;
  const RnnSteps& steps;
  bool rising;

  i64 size(i64 index) const {
    if (index < 0 || index >= d.T) return 0;
    return steps.batch_sizes ? steps.batch_sizes[rising ? index : d.T - 1 - index] : d.B;
  }
};

class Pass {
 public:
  Pass(const RnnDesc& desc, const CudaRnnPlan& plan, const RnnArgs& args, const RnnGradients* grads, void* workspace,
       const Stream& stream)
      : d_(desc),
        p_(plan),
        args_(args),
        grads_(grads),
        stream_(stream),
        steps_{desc, args.steps, args.steps.reverse == desc.backward},
        memory_(static_cast<char*>(workspace)) {}

  void run() {
    lay_out();
    if (d_.T == 0) return begin();
    pack(0, args_.w, args_.w_row, args_.w_col);
    if (d_.projected) pack(1, args_.r, args_.r_row, args_.r_col);
    begin();
    if (p_.kernel->resident) {
      run_resident();
    } else {
      run_steps();
    }
  }

 private:
  void* take(i64 bytes) {
    void* const part = memory_;
    memory_ += bytes;
    return part;
  }

  void lay_out() {
    RnnCudaArgs& a = a_;
    a.cell = d_.cell, a.relu = args_.relu, a.projected = d_.projected;
    a.packed = args_.steps.batch_sizes != nullptr, a.rising = steps_.rising;
    a.H = static_cast<int>(d_.H), a.P = static_cast<int>(d_.P), a.gates = kGates[static_cast<int>(d_.cell)];
    a.tile_rows = p_.tile_rows, a.batch_blocks = p_.batch_blocks;
    a.phase_end = p_.products;
    a.rows = args_.steps.rows;
    a.y = rows_of(args_.y), a.x = args_.x, a.saved = args_.saved;
    a.bias = args_.bias, a.bias_step = args_.bias_step;
    a.h0 = state_of(args_.h0, args_.h0_row), a.c0 = state_of(args_.c0, args_.c0_row);
    a.h_n = state_of(args_.h_n, args_.h_n_row), a.c_n = state_of(args_.c_n, args_.c_n_row);
    if (grads_) {
      const RnnGradients& g = *grads_;
      a.dy = rows_of(g.dy), a.d_gates = g.d_gates, a.d_recurrent = g.d_recurrent, a.d_hidden = g.d_hidden;
      a.hidden = g.hidden;
      a.dh_n = state_of(g.dh_n, g.dh_n_row), a.dc_n = state_of(g.dc_n, g.dc_n_row);
      a.dh0 = state_of(g.dh0, g.dh0_row), a.dc0 = state_of(g.dc0, g.dc0_row);
    }
    // What must be zeros at first comes first.
    zeros_ = memory_;
    a.arrived = static_cast<u32*>(take(p_.counter_bytes));
    const bool wide = d_.dtype == DType::f32;
    for (int i = 0; i < p_.products; ++i) {
      const CudaRnnProduct& from = p_.product[i];
      RnnOperand& x = a.operand[i];
      x.row = from.blocks * kRnnBlockK, x.plane = p_.padded_rows * x.row;
      for (int b = 0; b < 2; ++b) {
        if (b == from.buffers) {
          x.data[b] = x.data[0], x.wide[b] = x.wide[0];
          continue;
        }
        char* const buffer = static_cast<char*>(take(from.operand_bytes));
        x.wide[b] = wide ? reinterpret_cast<float*>(buffer) : nullptr;
        x.data[b] = reinterpret_cast<std::uint16_t*>(buffer + (wide ? 4 * x.plane : 0));
      }
    }
    zero_bytes_ = memory_ - zeros_;
    for (int i = 0; i < p_.products; ++i) {
      const CudaRnnProduct& from = p_.product[i];
      RnnProduct& to = a.product[i];
      to.units = from.units, to.K = from.K, to.groups = from.groups, to.blocks = from.blocks;
      to.packed = static_cast<const u32*>(take(from.packed_bytes));
      to.w = i ? args_.r : args_.w;
      to.w_row = i ? args_.r_row : args_.w_row, to.w_col = i ? args_.r_col : args_.w_col;
      if (d_.backward) std::swap(to.w_row, to.w_col);
    }
    a.c = static_cast<float*>(take(p_.c_bytes));
    a.keep = static_cast<float*>(take(p_.keep_bytes));
  }

  void pack(int i, const void* w, i64 row, i64 col) {
    const CudaRnnProduct& from = p_.product[i];
    RnnPackArgs pack = {};
    pack.w = w, pack.w_row = d_.backward ? col : row, pack.w_col = d_.backward ? row : col;
    pack.units = from.units, pack.gates = from.gates, pack.K = from.K, pack.groups = from.groups;
    pack.blocks = from.blocks, pack.packed = const_cast<u32*>(a_.product[i].packed);
    const i64 tiles = i64{from.groups} * from.blocks * rnn_slots(from.gates) / 2;
    p_.kernel->fn->pack(rnn_stride_shape(tiles * kWarp), stream_, pack);
  }

  void copy_state(const RnnCudaState& from, const RnnCudaState& to, i64 width) {
    if (!to.data) return;
    RnnBeginArgs copy = {};
    copy.from = from, copy.out = to, copy.B = static_cast<int>(d_.B), copy.K = static_cast<int>(width);
    p_.kernel->fn->begin(rnn_stride_shape(d_.B * width), stream_, copy);
  }

  void begin() {
    if (d_.T == 0) {
      copy_state(d_.backward ? a_.dh_n : a_.h0, d_.backward ? a_.dh0 : a_.h_n, d_.P);
      if (d_.cell == RnnCell::lstm) copy_state(d_.backward ? a_.dc_n : a_.c0, d_.backward ? a_.dc0 : a_.c_n, d_.H);
      return;
    }
    fill_zero(zeros_, zero_bytes_, stream_);
    if (d_.backward || !a_.h0.data) return;
    RnnBeginArgs begin = {};
    begin.from = a_.h0, begin.B = static_cast<int>(d_.B), begin.K = static_cast<int>(d_.P);
    begin.padded_rows = static_cast<int>(p_.padded_rows), begin.to = a_.operand[0];
    p_.kernel->fn->begin(rnn_stride_shape(p_.padded_rows * begin.to.row), stream_, begin);
  }

  // Steps to compute: backward one more, without sequences, where the gradient of h0 is wanted.
  i64 count() const { return d_.T + (d_.backward && a_.dh0.data ? 1 : 0); }

  void launch_steps(const LaunchShape& shape) {
    const CudaRnnFunctions& fn = *p_.kernel->fn;
    (d_.backward ? fn.backward : fn.forward)(shape, stream_, a_);
  }
  // Sets where a launch begins; `index` counts computed steps, `row` the rows before them.
  void set_first(i64 index, i64 row) {
    a_.first_step = static_cast<int>(index & 1);
    a_.before = static_cast<int>(index ? steps_.size(index - 1) : 0);
    a_.t = steps_.rising ? index : d_.T - 1 - index;
    a_.row = row;
  }
  i64 first_row() const { return steps_.rising ? 0 : args_.steps.rows - steps_.size(0); }
  i64 next_row(i64 index, i64 row) const {
    return steps_.rising ? row + steps_.size(index) : row - steps_.size(index + 1);
  }

  void run_resident() {
    LaunchShape shape;
    shape.grid[0] = p_.unit_blocks, shape.grid[1] = p_.batch_blocks;
    shape.threads = kRnnThreads, shape.shared_bytes = p_.shared_bytes, shape.cooperative = true;
    i64 row = first_row();
    for (i64 index = 0; index < count();) {
      if (index) fill_zero(a_.arrived, p_.counter_bytes, stream_);
      set_first(index, row);
      a_.run_count = 0;
      while (index < count() && a_.run_count < kRnnRuns) {
        RnnRun& run = a_.runs[a_.run_count++];
        run = {0, static_cast<int>(steps_.size(index))};
        for (; index < count() && steps_.size(index) == run.rows; ++index, ++run.steps) row = next_row(index, row);
      }
      a_.after = static_cast<int>(steps_.size(index));
      launch_steps(shape);
    }
  }

  void run_steps() {
    i64 row = first_row();
    for (i64 index = 0; index < count(); ++index) {
      set_first(index, row);
      a_.run_count = 1;
      a_.runs[0] = {1, static_cast<int>(steps_.size(index))};
      a_.after = static_cast<int>(steps_.size(index + 1));
      const i64 rows = std::max<i64>(a_.runs[0].rows, d_.backward ? a_.before : 0);
      for (int phase = 0; phase < p_.products; ++phase) {
        if (phase && a_.runs[0].rows == 0) continue;
        a_.phase_begin = phase, a_.phase_end = phase + 1;
        LaunchShape shape;
        shape.grid[0] = p_.product[phase].groups;
        shape.grid[1] = static_cast<int>(std::min<i64>(p_.batch_blocks, ceil_div(rows, p_.tile_rows)));
        shape.threads = kRnnThreads, shape.shared_bytes = p_.shared_bytes;
        launch_steps(shape);
      }
      row = next_row(index, row);
    }
  }

  const RnnDesc& d_;
  const CudaRnnPlan& p_;
  const RnnArgs& args_;
  const RnnGradients* grads_;
  const Stream& stream_;
  Steps steps_;
  char* memory_;
  char* zeros_ = nullptr;
  i64 zero_bytes_ = 0;
  RnnCudaArgs a_ = {};
};

}  // namespace

void cuda_rnn_run(const RnnDesc& d, const CudaRnnPlan& p, const RnnArgs& args, const RnnGradients* grads,
                  void* workspace, const Stream& stream) {
  if (d.B == 0) return;
  Pass(d, p, args, grads, workspace, stream).run();
}

}  // namespace fastdl
