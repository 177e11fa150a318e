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
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"

namespace py = pybind11;

namespace fastdl {
namespace {

constexpr const char* kOp = "fastdl.scaled_dot_product_attention";
constexpr i64 kMaxHeadDim = 256;

struct Options {
  double scale;
  i64 lo, hi;
  double softcap, dropout_p;
  i64 seed;
  py::object cu_seqlens_q, cu_seqlens_k;
  bool align_end;
};

struct Problem {
  AttentionDesc desc = {};
  AttentionArgs args = {};
  CudaSequences sequences;
  int device = -1;
};

AttentionStrides strides_of(const TensorView& t) {
  const auto step = [&](int i) { return t.size(i) > 1 ? t.stride(i) : 0; };
  // The last dimension is walked even where it has one element: call it contiguous.
  return {step(0), step(1), step(2), t.size(3) > 1 ? t.stride(3) : 1};
}

void require_shape(const TensorView& t, const char* argument, const i64 (&shape)[4], const char* why) {
  bool fits = t.ndim == 4;
  for (int i = 0; fits && i < 4; ++i) fits = t.size(i) == shape[i];
  if (!fits)
    fail(kOp, ": argument '", argument, "': expected shape [", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3],
         "], ", why, ", got ", shape_string(t));
}

void require_head_dim(const TensorView& t, const char* argument) {
  if (t.size(-1) < 1 || t.size(-1) > kMaxHeadDim)
    fail(kOp, ": argument '", argument, "': expected 1 to ", kMaxHeadDim, " in the last dimension, got ",
         shape_string(t));
}

void set_sequences(Problem* p, const Options& o) {
  AttentionDesc& d = p->desc;
  if (o.cu_seqlens_q.is_none() != o.cu_seqlens_k.is_none())
    fail(kOp, ": argument 'cu_seqlens_k': expected both cu_seqlens_q and cu_seqlens_k or neither");
  if (o.cu_seqlens_q.is_none()) return;
  if (d.B != 1) fail(kOp, ": argument 'query': expected [1, H, total, D] with cu_seqlens, got batch ", d.B);
  const DeviceIntegers q = device_integers(o.cu_seqlens_q, &p->device, kOp, "cu_seqlens_q");
  const DeviceIntegers k = device_integers(o.cu_seqlens_k, &p->device, kOp, "cu_seqlens_k");
  if (q.size < 1) fail(kOp, ": argument 'cu_seqlens_q': expected at least one offset, got none");
  if (q.size != k.size)
    fail(kOp, ": argument 'cu_seqlens_k': expected ", q.size, " offsets as cu_seqlens_q, got ", k.size);
  p->sequences = {q.data, k.data};
  d.sequences = q.size - 1, d.total_q = d.Lq, d.total_k = d.Lk;
  if (d.sequences == 0) d.B = 0;
}

void set_mask(Problem* p, py::handle mask_) {
  if (mask_.is_none()) return;
  AttentionDesc& d = p->desc;
  if (p->sequences.q) fail(kOp, ": argument 'mask': expected None with cu_seqlens, got a tensor");
  bool boolean = false;
  const TensorView mask = device_view_or_bool(mask_, &p->device, kOp, "mask", &boolean);
  const bool fits = mask.ndim == 4 && (mask.size(0) == d.B || mask.size(0) == 1) &&
                    (mask.size(1) == d.H || mask.size(1) == 1) && mask.size(2) == d.Lq && mask.size(3) == d.Lk;
  if (!fits)
    fail(kOp, ": argument 'mask': expected shape [", d.B, " or 1, ", d.H, " or 1, ", d.Lq, ", ", d.Lk, "], got ",
         shape_string(mask));
  if (!boolean && mask.dtype != DType::f32) require_dtype(mask, d.dtype, "as query", kOp, "mask");
  d.mask = boolean ? MaskKind::boolean : mask.dtype == DType::f32 ? MaskKind::f32 : MaskKind::same;
  d.mask_step = strides_of(mask);
  p->args.mask = mask.data;
}

Problem make_problem(py::handle query, py::handle key, py::handle value, py::handle mask, const Options& o) {
  Problem p;
  AttentionDesc& d = p.desc;
  const TensorView q = device_view(query, &p.device, kOp, "query"), k = device_view(key, &p.device, kOp, "key"),
                   v = device_view(value, &p.device, kOp, "value");
  if (q.ndim != 4) fail(kOp, ": argument 'query': expected [B, H, Lq, D], got ", shape_string(q));
  if (k.ndim != 4) fail(kOp, ": argument 'key': expected [B, Hkv, Lk, D], got ", shape_string(k));
  d.B = q.size(0), d.H = q.size(1), d.Lq = q.size(2), d.D = q.size(3);
  d.Hkv = k.size(1), d.Lk = k.size(2);
  require_head_dim(q, "query");
  require_shape(k, "key", {d.B, d.Hkv, d.Lk, d.D}, "batch and head dimension as query");
  if (v.ndim != 4) fail(kOp, ": argument 'value': expected [B, Hkv, Lk, Dv], got ", shape_string(v));
  d.Dv = v.size(3);
  require_shape(v, "value", {d.B, d.Hkv, d.Lk, d.Dv}, "batch, heads and length as key");
  require_head_dim(v, "value");
  if (d.Hkv == 0 ? d.H != 0 : d.H % d.Hkv != 0)
    fail(kOp, ": argument 'key': expected a number of heads that divides query's ", d.H, ", got ", d.Hkv);
  require_dtype(k, q.dtype, "as query", kOp, "key");
  require_dtype(v, q.dtype, "as query", kOp, "value");
  d.dtype = q.dtype;
  d.q = strides_of(q), d.k = strides_of(k), d.v = strides_of(v);
  p.args.q = q.data, p.args.k = k.data, p.args.v = v.data;
  set_sequences(&p, o);
  if (!(o.softcap >= 0)) fail(kOp, ": argument 'softcap': expected at least 0, got ", o.softcap);
  if (!(o.dropout_p >= 0 && o.dropout_p <= 1)) fail(kOp, ": argument 'dropout_p': expected 0 to 1, got ", o.dropout_p);
  if (o.seed < 0) fail(kOp, ": argument 'seed': expected at least 0, got ", o.seed);
  d.scale = static_cast<float>(o.scale), d.softcap = static_cast<float>(o.softcap);
  d.lo = o.lo, d.hi = o.hi, d.align_end = o.align_end;
  d.dropout_p = o.dropout_p, d.seed = static_cast<std::uint64_t>(o.seed);
  set_mask(&p, mask);
  return p;
}

void require_unit_columns(const TensorView& t, const char* argument) {
  if (t.size(3) > 1 && t.numel() > 0 && t.stride(3) != 1)
    fail(kOp, ": argument '", argument, "': expected unit stride in the last dimension, got ", t.stride(3));
}

float* lse_data(Problem* p, py::handle lse_, const TensorView& q) {
  const TensorView lse = device_view(lse_, &p->device, kOp, "lse");
  bool fits = lse.ndim == 4 && lse.dtype == DType::f32 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1) &&
              lse.size(2) == q.size(2) && lse.size(3) == 2;
  for (i64 i = 3, step = 1; fits && i >= 0; step *= lse.shape[i--])
    fits = lse.shape[i] <= 1 || lse.strides[i] == step || lse.numel() == 0;
  if (!fits)
    fail(kOp, ": argument 'lse': expected contiguous float32 [", q.size(0), ", ", q.size(1), ", ", q.size(2),
         ", 2], got ", shape_string(lse));
  return static_cast<float*>(lse.data);
}

void* workspace_data(Problem* p, py::handle workspace_, i64 bytes) {
  const DeviceBytes workspace =
      workspace_.is_none() ? DeviceBytes{nullptr, 0} : device_bytes(workspace_, &p->device, kOp, "workspace");
  if (workspace.bytes < bytes)
    fail(kOp, ": argument 'workspace': expected ", bytes, " bytes as attention_plan says, got ", workspace.bytes);
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(workspace.data) % 4 != 0)
    fail(kOp, ": argument 'workspace': expected an address that is a multiple of 4");
  return workspace.data;
}

const CudaAttentionKernel* forced_row(const std::string& name) {
  return name.empty() ? nullptr : &cuda_attention_kernel(name, kOp);
}

void run_attention(py::handle out_, py::handle lse, py::handle query, py::handle key, py::handle value, py::handle mask,
                   double scale, i64 lo, i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                   py::object cu_seqlens_k, bool align_end, py::handle workspace_, const std::string& kernel) {
  Problem p = make_problem(
      query, key, value, mask,
      {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  const AttentionDesc& d = p.desc;
  const TensorView q = device_view(query, &p.device, kOp, "query"), out = device_view(out_, &p.device, kOp, "out");
  require_shape(out, "out", {q.size(0), q.size(1), q.size(2), d.Dv}, "as query but with the last dimension of value");
  require_dtype(out, d.dtype, "as query", kOp, "out");
  require_unit_columns(out, "out");
  require_writable(out, kOp);
  require_apart(out, q, kOp, "query");
  require_apart(out, device_view(key, &p.device, kOp, "key"), kOp, "key");
  require_apart(out, device_view(value, &p.device, kOp, "value"), kOp, "value");
  p.desc.out = strides_of(out), p.args.out = out.data;
  if (!lse.is_none()) p.args.lse = lse_data(&p, lse, q);
  const CudaAttentionPlan plan = cuda_attention_plan(d, gpu_info(p.device), forced_row(kernel));
  if (log_enabled()) log_once(describe(d, plan));
  void* const workspace = workspace_data(&p, workspace_, plan.workspace_bytes);
  const Stream stream = current_stream(p.device, kOp);
  py::gil_scoped_release release;
  cuda_attention_run(d, plan, p.args, p.sequences, workspace, stream);
}

// A gradient of `of`: its shape and dtype, unit stride in the last dimension; null where None.
void* grad_data(Problem* p, py::handle grad_, const char* argument, const TensorView& of, AttentionStrides* step) {
  if (grad_.is_none()) return nullptr;
  const TensorView grad = device_view(grad_, &p->device, kOp, argument);
  require_shape(grad, argument, {of.size(0), of.size(1), of.size(2), of.size(3)}, "as what it is the gradient of");
  require_dtype(grad, of.dtype, "as query", kOp, argument);
  require_unit_columns(grad, argument);
  require_writable(grad, kOp);
  *step = strides_of(grad);
  return grad.data;
}

void set_dmask(Problem* p, AttentionGrads* grads, py::handle dmask_, i64 (&sizes)[4]) {
  if (dmask_.is_none()) return;
  const AttentionDesc& d = p->desc;
  if (d.mask != MaskKind::f32 && d.mask != MaskKind::same)
    fail(kOp, ": argument 'dmask': expected None without a mask that is added");
  const TensorView dmask = device_view(dmask_, &p->device, kOp, "dmask");
  const i64 full[4] = {d.B, d.H, d.Lq, d.Lk};
  bool fits = dmask.ndim == 4;
  for (int i = 0; fits && i < 4; ++i) fits = dmask.size(i) == full[i] || dmask.size(i) == 1;
  if (!fits)
    fail(kOp, ": argument 'dmask': expected [", d.B, ", ", d.H, ", ", d.Lq, ", ", d.Lk,
         "] or 1 in the place of any of them, got ", shape_string(dmask));
  require_dtype(dmask, DType::f32, "sums of products", kOp, "dmask");
  require_writable(dmask, kOp);
  const auto step = [&](int i) { return dmask.size(i) > 1 ? dmask.stride(i) : 0; };
  for (int i = 0; i < 4; ++i) sizes[i] = dmask.size(i);
  grads->dmask = static_cast<float*>(dmask.data);
  grads->dmask_step = {step(0), step(1), step(2), step(3)};
}

void run_backward(py::handle dq, py::handle dk, py::handle dv, py::handle dmask, py::handle dout_, py::handle query,
                  py::handle key, py::handle value, py::handle out_, py::handle lse, py::handle mask, double scale,
                  i64 lo, i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                  py::object cu_seqlens_k, bool align_end, py::handle workspace_) {
  Problem p = make_problem(
      query, key, value, mask,
      {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  int* const device = &p.device;
  const TensorView q = device_view(query, device, kOp, "query"), k = device_view(key, device, kOp, "key"),
                   v = device_view(value, device, kOp, "value"), dout = device_view(dout_, device, kOp, "dout"),
                   out = device_view(out_, device, kOp, "out");
  for (const auto& [t, name] : {std::pair{&out, "out"}, std::pair{&dout, "dout"}}) {
    require_shape(*t, name, {q.size(0), q.size(1), q.size(2), p.desc.Dv},
                  "as query but with the last dimension of value");
    require_dtype(*t, p.desc.dtype, "as query", kOp, name);
  }
  require_unit_columns(out, "out");
  p.desc.out = strides_of(out), p.args.out = out.data;
  p.args.lse = lse_data(&p, lse, q);

  AttentionGrads grads = {};
  grads.dout = dout.data, grads.dout_step = strides_of(dout);
  grads.dq = grad_data(&p, dq, "dq", q, &grads.dq_step);
  grads.dk = grad_data(&p, dk, "dk", k, &grads.dk_step);
  grads.dv = grad_data(&p, dv, "dv", v, &grads.dv_step);
  i64 dmask_sizes[4] = {};
  set_dmask(&p, &grads, dmask, dmask_sizes);
  const std::pair<py::handle, const char*> written[] = {{dq, "dq"}, {dk, "dk"}, {dv, "dv"}, {dmask, "dmask"}};
  for (const auto& [handle, name] : written) {
    if (handle.is_none()) continue;
    const TensorView t = device_view(handle, device, kOp, name);
    for (const auto& [in, in_name] : {std::pair{&q, "query"}, std::pair{&k, "key"}, std::pair{&v, "value"},
                                      std::pair{&out, "out"}, std::pair{&dout, "dout"}})
      require_apart(t, *in, kOp, in_name, name);
    for (const auto& [other, other_name] : written)
      if (other_name != name && !other.is_none())
        require_apart(t, device_view(other, device, kOp, other_name), kOp, other_name, name);
  }
  const CudaAttentionBackwardPlan plan = cuda_attention_backward_plan(p.desc, gpu_info(p.device));
  if (log_enabled()) log_once(describe(p.desc, plan));
  void* const workspace = workspace_data(&p, workspace_, plan.workspace_bytes);
  const Stream stream = current_stream(p.device, kOp);
  py::gil_scoped_release release;
  cuda_attention_backward_run(p.desc, plan, p.args, grads, dmask_sizes, p.sequences, workspace, stream);
}

py::dict plan_attention(py::handle query, py::handle key, py::handle value, py::handle mask, double scale, i64 lo,
                        i64 hi, double softcap, double dropout_p, i64 seed, py::object cu_seqlens_q,
                        py::object cu_seqlens_k, bool align_end, const std::string& kernel, bool backward,
                        const std::string& gpu_name) {
  using namespace py::literals;
  const Problem p = make_problem(
      query, key, value, mask,
      {scale, lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k), align_end});
  const Gpu gpu = gpu_name.empty() ? gpu_info(p.device) : gpu_named(gpu_name);
  const AttentionDesc& d = p.desc;
  if (backward) {
    const CudaAttentionBackwardPlan plan = cuda_attention_backward_plan(d, gpu);
    return py::dict("op"_a = "attention_backward", "kernel"_a = plan.query->name, "key_kernel"_a = plan.key->name,
                    "stages"_a = py::make_tuple(plan.query_stages, plan.key_stages),
                    "workspace_bytes"_a = plan.workspace_bytes, "text"_a = describe(d, plan));
  }
  const CudaAttentionPlan plan = cuda_attention_plan(d, gpu, forced_row(kernel));
  return py::dict("op"_a = "attention", "kernel"_a = plan.kernel->name, "kind"_a = kind_name(plan.kernel->kind),
                  "tiles"_a = plan.tiles, "pack"_a = plan.pack, "chunks"_a = plan.chunks, "blocks"_a = plan.blocks,
                  "shared_bytes"_a = plan.kernel->shared_bytes, "workspace_bytes"_a = plan.workspace_bytes,
                  "why"_a = plan.why, "text"_a = describe(d, plan));
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
  "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none(), "align_end"_a = false
  m.def("attention", run_attention, "out"_a, "lse"_a.none(true), "query"_a, "key"_a, "value"_a, "mask"_a = py::none(),
        py::kw_only(), "scale"_a, FASTDL_ATTENTION_OPTIONS, "workspace"_a = py::none(), "kernel"_a = "");
  m.def("attention_backward", run_backward, "dq"_a.none(true), "dk"_a.none(true), "dv"_a.none(true),
        "dmask"_a.none(true), "dout"_a, "query"_a, "key"_a, "value"_a, "out"_a, "lse"_a, "mask"_a = py::none(),
        py::kw_only(), "scale"_a, FASTDL_ATTENTION_OPTIONS, "workspace"_a = py::none());
  m.def("attention_plan", plan_attention, "query"_a, "key"_a, "value"_a, "mask"_a = py::none(), py::kw_only(),
        "scale"_a = 1.0, FASTDL_ATTENTION_OPTIONS, "kernel"_a = "", "backward"_a = false, "gpu"_a = "");
#undef FASTDL_ATTENTION_OPTIONS
  add_kernel_rows("attention", kernel_rows);
}

}  // namespace fastdl
