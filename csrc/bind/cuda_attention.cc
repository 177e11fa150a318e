// Attention of the CUDA modules, forward and backward: the arguments of `_C.attention*`, with a workspace besides,
// whose bytes `attention_plan` gives. cu_seqlens are int32 tensors on the GPU: offsets that are wrong are not seen
// here, but read and write nothing outside the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "attention/cuda/plan.h"
#include "base/check.h"
#include "base/log.h"
#include "bind/attention_call.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

constexpr const char* kOp = kAttentionOp;

class Call : public AttentionCall {
 public:
  CudaSequences sequences;
  int device = -1;

 private:
  TensorView look(py::handle object, const char* name) override { return device_view(object, &device, kOp, name); }
  TensorView look_or_bool(py::handle object, const char* name, bool* boolean) override {
    return device_view_or_bool(object, &device, kOp, name, boolean);
  }
  void set_sequences(py::handle cu_q, py::handle cu_k) override {
    const DeviceIntegers q = device_integers(cu_q, &device, kOp, "cu_seqlens_q");
    const DeviceIntegers k = device_integers(cu_k, &device, kOp, "cu_seqlens_k");
    if (q.size < 1) fail(kOp, ": argument 'cu_seqlens_q': expected at least one offset, got none");
    if (q.size != k.size)
      fail(kOp, ": argument 'cu_seqlens_k': expected ", q.size, " offsets as cu_seqlens_q, got ", k.size);
    sequences = {q.data, k.data};
    desc.sequences = q.size - 1;
  }
};

void run_attention(py::handle out, py::handle lse, py::handle query, py::handle key, py::handle value, py::handle mask,
                   double scale, i64 lo, i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                   py::object cu_seqlens_k, bool align_end, const std::string& precision, py::handle workspace,
                   const std::string& kernel) {
  Call call;
  call.inputs(query, key, value, mask,
              {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  call.desc.precision = precision_named(precision, kOp);
  call.forward_outputs(out, lse);
  const CudaAttentionPlan plan =
      cuda_attention_plan(call.desc, gpu_info(call.device), forced_row(cuda_attention_kernels(), kernel, kOp));
  if (log_enabled()) log_once(describe(call.desc, plan));
  void* const memory = workspace_memory(workspace, plan.workspace_bytes, &call.device, kOp);
  const Stream stream = current_stream(call.device, kOp);
  py::gil_scoped_release release;
  cuda_attention_run(call.desc, plan, call.args, call.sequences, memory, stream);
}

void run_backward(py::handle dq, py::handle dk, py::handle dv, py::handle dmask, py::handle dout, py::handle query,
                  py::handle key, py::handle value, py::handle out, py::handle lse, py::handle mask, double scale,
                  i64 lo, i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                  py::object cu_seqlens_k, bool align_end, const std::string& precision, py::handle workspace) {
  Call call;
  call.inputs(query, key, value, mask,
              {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  call.desc.precision = precision_named(precision, kOp);
  call.backward_arguments(dq, dk, dv, dmask, dout, out, lse);
  const CudaAttentionBackwardPlan plan = cuda_attention_backward_plan(call.desc, gpu_info(call.device));
  if (log_enabled()) log_once(describe(call.desc, plan));
  void* const memory = workspace_memory(workspace, plan.workspace_bytes, &call.device, kOp);
  const Stream stream = current_stream(call.device, kOp);
  py::gil_scoped_release release;
  cuda_attention_backward_run(call.desc, plan, call.args, call.grads, call.dmask_sizes, call.sequences, memory, stream);
}

py::dict plan_attention(py::handle query, py::handle key, py::handle value, py::handle mask, double scale, i64 lo,
                        i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                        py::object cu_seqlens_k, bool align_end, const std::string& precision,
                        const std::string& kernel, bool backward, const std::string& gpu_name) {
  using namespace py::literals;
  Call call;
  call.inputs(query, key, value, mask,
              {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  call.desc.precision = precision_named(precision, kOp);
  const Gpu gpu = gpu_name.empty() ? gpu_info(call.device) : gpu_named(gpu_name);
  const AttentionDesc& d = call.desc;
  if (backward) {
    const CudaAttentionBackwardPlan plan = cuda_attention_backward_plan(d, gpu);
    return py::dict("op"_a = "attention_backward", "kernel"_a = plan.query->name, "key_kernel"_a = plan.key->name,
                    "stages"_a = py::make_tuple(plan.query_stages, plan.key_stages),
                    "workspace_bytes"_a = plan.workspace_bytes, "text"_a = describe(d, plan));
  }
  const CudaAttentionPlan plan = cuda_attention_plan(d, gpu, forced_row(cuda_attention_kernels(), kernel, kOp));
  return py::dict("op"_a = "attention", "kernel"_a = plan.kernel->name, "kind"_a = kind_name(plan.kernel->kind),
                  "tiles"_a = plan.tiles, "pack"_a = plan.pack, "chunks"_a = plan.chunks, "blocks"_a = plan.blocks,
                  "shared_bytes"_a = plan.kernel->shared_bytes, "workspace_bytes"_a = plan.workspace_bytes,
                  "why"_a = plan.why, "text"_a = describe(d, plan));
}

std::string refusal(i64 D, i64 Dv, const std::string& dtype, int device, const std::string& gpu) {
  return cuda_attention_refusal(dtype_named(dtype, kOp), D, Dv, gpu.empty() ? gpu_info(device) : gpu_named(gpu));
}

py::list kernel_rows() {
  using namespace py::literals;
  py::list rows;
  for (const CudaAttentionKernel& k : cuda_attention_kernels())
    rows.append(py::dict("name"_a = k.name, "dtype"_a = torch_name(k.dtype), "kind"_a = kind_name(k.kind), "sm"_a = 80,
                         "depth"_a = k.depth, "rows"_a = k.rows, "cols"_a = k.cols, "shared_bytes"_a = k.shared_bytes));
  return rows;
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
  using namespace py::literals;
#define FASTDL_ATTENTION_OPTIONS                                                                \
  "lo"_a = INT64_MIN, "hi"_a = INT64_MAX, "softcap"_a = 0.0, "dropout_p"_a = 0.0, "seed"_a = 0, \
  "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none(), "align_end"_a = false, "precision"_a = "ieee"
  m.def("attention", run_attention, "out"_a, "lse"_a.none(true), "query"_a, "key"_a, "value"_a, "mask"_a = py::none(),
        py::kw_only(), "scale"_a, FASTDL_ATTENTION_OPTIONS, "workspace"_a = py::none(), "kernel"_a = "");
  m.def("attention_backward", run_backward, "dq"_a.none(true), "dk"_a.none(true), "dv"_a.none(true),
        "dmask"_a.none(true), "dout"_a, "query"_a, "key"_a, "value"_a, "out"_a, "lse"_a, "mask"_a = py::none(),
        py::kw_only(), "scale"_a, FASTDL_ATTENTION_OPTIONS, "workspace"_a = py::none());
  m.def("attention_plan", plan_attention, "query"_a, "key"_a, "value"_a, "mask"_a = py::none(), py::kw_only(),
        "scale"_a = 1.0, FASTDL_ATTENTION_OPTIONS, "kernel"_a = "", "backward"_a = false, "gpu"_a = "");
#undef FASTDL_ATTENTION_OPTIONS
  m.def("attention_refusal", refusal, py::kw_only(), "D"_a, "Dv"_a, "dtype"_a = "float32", "device"_a = 0,
        "gpu"_a = "");
  add_kernel_rows("attention", kernel_rows);
}

}  // namespace fastdl
