// _C: fused attention, forward and backward.
#include "attention/attention.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "attention/cpu/backward.h"
#include "base/check.h"
#include "base/parallel.h"
#include "bind/attention_call.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

constexpr const char* kOp = kAttentionOp;
constexpr const char* kVarlen = "fastdl.attention_varlen";

// Where each sequence begins, and the last ends. Returns the rows of the longest.
i64 check_offsets(const std::vector<i64>& offsets, i64 total, const char* argument) {
  i64 longest = 0;
  bool good = !offsets.empty() && offsets.front() == 0 && offsets.back() == total;
  for (std::size_t i = 1; good && i < offsets.size(); ++i) {
    good = offsets[i] >= offsets[i - 1];
    longest = std::max(longest, offsets[i] - offsets[i - 1]);
  }
  if (good) return longest;
  std::string got;
  constexpr std::size_t kShown = 8;
  for (std::size_t i = 0; i < std::min(kShown, offsets.size()); ++i) got += concat(i ? ", " : "", offsets[i]);
  fail(kVarlen, ": argument '", argument, "': expected offsets from 0 to ", total, " that never decrease, got [", got,
       "]", offsets.size() > kShown ? "..." : "");
}

class Call : public AttentionCall {
 private:
  TensorView look(py::handle object, const char* name) override { return view(object, kOp, name); }
  TensorView look_or_bool(py::handle object, const char* name, bool* boolean) override {
    return view_or_bool(object, kOp, name, boolean);
  }
  void set_sequences(py::handle cu_q, py::handle cu_k) override {
    seq_q_ = read_integers(cu_q, kVarlen, "cu_seqlens_q");
    seq_k_ = read_integers(cu_k, kVarlen, "cu_seqlens_k");
    desc.Lq = check_offsets(seq_q_, desc.total_q, "cu_seqlens_q");
    desc.Lk = check_offsets(seq_k_, desc.total_k, "cu_seqlens_k");
    if (seq_q_.size() != seq_k_.size())
      fail(kVarlen, ": argument 'cu_seqlens_k': expected ", seq_q_.size(), " offsets as cu_seqlens_q, got ",
           seq_k_.size());
    desc.sequences = static_cast<i64>(seq_q_.size()) - 1;
    if (desc.sequences) args.seq_q = seq_q_.data(), args.seq_k = seq_k_.data();
  }

  std::vector<i64> seq_q_, seq_k_;
};

void run_attention(py::handle out, py::handle lse, py::handle query, py::handle key, py::handle value, py::handle mask,
                   double scale, i64 lo, i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                   py::object cu_seqlens_k, bool align_end, const std::string& kernel, int threads) {
  require_threads(threads, kOp);
  Call call;
  call.inputs(query, key, value, mask,
              {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  call.desc.precision = asked_precision(call.desc.dtype);
  call.forward_outputs(out, lse);
  const AttentionKernel* forced = usable_row(attention_kernels(), kernel, kOp);
  py::gil_scoped_release release;
  attention(call.desc, call.args, forced, threads);
}

void run_attention_backward(py::handle dq, py::handle dk, py::handle dv, py::handle dmask, py::handle dout,
                            py::handle query, py::handle key, py::handle value, py::handle out, py::handle lse,
                            py::handle mask, double scale, i64 lo, i64 hi, double softcap, double dropout_p, i64 seed,
                            py::object cu_seqlens_q, py::object cu_seqlens_k, bool align_end, const std::string& kernel,
                            int threads) {
  require_threads(threads, kOp);
  Call call;
  call.inputs(query, key, value, mask,
              {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  call.desc.precision = asked_precision(call.desc.dtype);
  call.backward_arguments(dq, dk, dv, dmask, dout, out, lse);
  const AttentionKernel* forced = usable_row(attention_kernels(), kernel, kOp);
  py::gil_scoped_release release;
  attention_backward(call.desc, call.args, call.grads, forced, threads);
}

py::dict backward_plan_dict(const AttentionDesc& d, const Machine& machine, const AttentionKernel* forced) {
  const AttentionBackwardPlan plan = attention_backward_plan(d, machine, forced);
  py::dict out;
  out["op"] = "attention_backward";
  out["kernel"] = plan.kernel->name;
  out["isa"] = isa_name(plan.kernel->isa);
  out["mr"] = plan.kernel->mr;
  out["nr"] = plan.kernel->nr;
  out["strips"] = plan.strips;
  out["key_block"] = plan.key_block;
  out["chunk"] = plan.chunk;
  out["chunks"] = plan.chunks;
  out["threads"] = plan.threads;
  out["shared_bytes"] = plan.shared_bytes;
  out["workspace_bytes"] = plan.workspace_bytes();
  out["why"] = plan.why;
  return out;
}

py::dict plan_attention(py::handle query, py::handle key, py::handle value, py::handle mask, double scale, i64 lo,
                        i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                        py::object cu_seqlens_k, bool align_end, const std::string& kernel, int threads, bool backward,
                        const std::string& isa, const std::string& precision) {
  require_threads(threads, kOp);
  Call call;
  call.inputs(query, key, value, mask,
              {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  const Machine machine = machine_named(isa, threads, kOp);
  AttentionDesc& d = call.desc;
  d.precision = precision.empty() ? asked_precision(d.dtype) : precision_named(precision, kOp);
  if (backward) return backward_plan_dict(d, machine, usable_row(attention_kernels(), kernel, kOp));
  const AttentionPlan plan = attention_plan(d, machine, usable_row(attention_kernels(), kernel, kOp));
  py::dict out;
  out["op"] = "attention";
  out["B"] = d.B;
  out["H"] = d.H;
  out["Hkv"] = d.Hkv;
  out["Lq"] = d.Lq;
  out["Lk"] = d.Lk;
  out["D"] = d.D;
  out["Dv"] = d.Dv;
  out["kernel"] = plan.kernel->name;
  out["isa"] = isa_name(plan.kernel->isa);
  out["mr"] = plan.kernel->mr;
  out["nr"] = plan.kernel->nr;
  out["strips"] = plan.strips;
  out["key_block"] = plan.key_block;
  out["keep_k"] = plan.keep_k;
  out["pack_v"] = plan.pack_v;
  out["threads"] = plan.threads;
  out["workspace_bytes"] = plan.workspace_bytes();
  out["why"] = plan.why;
  out["candidates"] = attention_candidates(d, machine, plan);
  return out;
}

void run_keep(py::handle out_, double dropout_p, i64 seed) {
  const char* op = "fastdl.attention_keep";
  bool boolean = false;
  const TensorView out = view_or_bool(out_, op, "out", &boolean);
  bool contiguous = boolean && out.ndim == 4;
  for (i64 i = 3, step = 1; contiguous && i >= 0; step *= out.shape[i--])
    contiguous = out.shape[i] <= 1 || out.strides[i] == step || out.numel() == 0;
  if (!contiguous) fail(op, ": argument 'out': expected contiguous bool [B, H, Lq, Lk], got ", shape_string(out));
  if (!(dropout_p >= 0 && dropout_p <= 1)) fail(op, ": argument 'dropout_p': expected 0 to 1, got ", dropout_p);
  py::gil_scoped_release release;
  attention_keep(static_cast<bool*>(out.data), out.size(0), out.size(1), out.size(2), out.size(3), dropout_p,
                 static_cast<std::uint64_t>(seed));
}

}  // namespace

void bind_attention(py::module_& m) {
  using namespace py::literals;
#define FASTDL_ATTENTION_OPTIONS                                                                        \
  "lo"_a = INT64_MIN, "hi"_a = INT64_MAX, "softcap"_a = 0.0, "dropout_p"_a = 0.0, "seed"_a = 0,         \
  "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none(), "align_end"_a = false, "kernel"_a = "", \
  "threads"_a = 0
  m.def("attention", run_attention, "out"_a, "lse"_a.none(true), "query"_a, "key"_a, "value"_a, "mask"_a = py::none(),
        py::kw_only(), "scale"_a, FASTDL_ATTENTION_OPTIONS);
  m.def("attention_backward", run_attention_backward, "dq"_a.none(true), "dk"_a.none(true), "dv"_a.none(true),
        "dmask"_a.none(true), "dout"_a, "query"_a, "key"_a, "value"_a, "out"_a, "lse"_a, "mask"_a = py::none(),
        py::kw_only(), "scale"_a, FASTDL_ATTENTION_OPTIONS);
  m.def("attention_plan", plan_attention, "query"_a, "key"_a, "value"_a, "mask"_a = py::none(), py::kw_only(),
        "scale"_a = 1.0, FASTDL_ATTENTION_OPTIONS, "backward"_a = false, "isa"_a = "", "precision"_a = "");
#undef FASTDL_ATTENTION_OPTIONS
  m.def("attention_keep", run_keep, "out"_a, py::kw_only(), "dropout_p"_a, "seed"_a);
}

}  // namespace fastdl
