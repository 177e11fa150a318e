// Of each row of a packed sequence the state that its step started from: what the gradient of W_hh is a product with.
#include "base/check.h"
#include "ptx/launch.h"
#include "rnn/cuda/kernel_args.h"
#include "rnn/cuda/plan.h"

namespace fastdl {
namespace {

struct BeforeArgs {
  const void* y;  // [rows, P], rows y_row apart
  const void* h0;
  void* out;  // [rows, P], contiguous
  i64 y_row, h0_row, first, rows;
  int P, before, after;  // sequences of the steps around these runs
  bool reverse;
  int run_count;
  RnnRun runs[kRnnRuns];
};

template <class T>
FASTDL_GLOBAL(kRnnThreads, 1)
before_kernel(FASTDL_PARAM BeforeArgs args) {
  for (i64 i = static_cast<i64>(block_x()) * kRnnThreads + thread_x(); i < args.rows * args.P;
       i += static_cast<i64>(grid_x()) * kRnnThreads) {
    const i64 row = args.first + i / args.P, column = i % args.P;
    i64 rest = i / args.P;
    int r = 0;
    for (; rest >= static_cast<i64>(args.runs[r].steps) * args.runs[r].rows; ++r)
      rest -= static_cast<i64>(args.runs[r].steps) * args.runs[r].rows;
    const int n = args.runs[r].rows;
    const i64 step = rest / n, b = rest % n;
    i64 from;  // a row of y, or -1
    if (args.reverse) {
      const int next = step + 1 < args.runs[r].steps ? n : r + 1 < args.run_count ? args.runs[r + 1].rows : args.after;
      from = b < next ? row + n : -1;
    } else {
      const int previous = step > 0 ? n : r > 0 ? args.runs[r - 1].rows : args.before;
      from = previous > 0 ? row - previous : -1;
    }
    static_cast<T*>(args.out)[row * args.P + column] = from < 0
                                                           ? static_cast<const T*>(args.h0)[b * args.h0_row + column]
                                                           : static_cast<const T*>(args.y)[from * args.y_row + column];
  }
}

}  // namespace

void cuda_rnn_states_before(const RnnSteps& steps, i64 T, i64 P, const RnnRows& y, const void* h0, i64 h0_row,
                            void* out, DType dtype, const Stream& stream) {
  BeforeArgs args = {};
  args.y = y.data, args.y_row = y.row, args.h0 = h0, args.h0_row = h0_row, args.out = out;
  args.P = static_cast<int>(P), args.reverse = steps.reverse;
  for (i64 t = 0; t < T;) {
    args.before = static_cast<int>(t ? steps.batch_sizes[t - 1] : 0);
    args.run_count = 0, args.rows = 0;
    while (t < T && args.run_count < kRnnRuns) {
      RnnRun& run = args.runs[args.run_count++];
      run = {0, static_cast<int>(steps.batch_sizes[t])};
      for (; t < T && steps.batch_sizes[t] == run.rows; ++t, ++run.steps) args.rows += run.rows;
    }
    args.after = static_cast<int>(t < T ? steps.batch_sizes[t] : 0);
    const LaunchShape shape = rnn_stride_shape(args.rows * P);
    if (dtype == DType::f32) {
      launch(before_kernel<float>, shape, stream, args);
    } else {
      launch(before_kernel<std::uint16_t>, shape, stream, args);
    }
    args.first += args.rows;
  }
}

}  // namespace fastdl
