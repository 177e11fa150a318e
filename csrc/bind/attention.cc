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
#include "bind/bind.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

constexpr const char* kOp = "fastdl.scaled_dot_product_attention";
constexpr i64 kMaxHeadDim = 256;

// Keyword arguments that forward and backward share.
struct Options {
  double scale;
  i64 lo, hi;
  double softcap, dropout_p;
  i64 seed;
  py::object cu_seqlens_q, cu_seqlens_k;
  bool align_end;
};

struct Problem {
  AttentionDesc desc;
  AttentionArgs args = {};
  std::vector<i64> seq_q, seq_k;
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

// Rows of each sequence: starts at 0, never falls, ends at the total. Returns the longest.
i64 check_offsets(const std::vector<i64>& offsets, i64 total, const char* argument) {
  i64 longest = 0;
  bool good = !offsets.empty() && offsets.front() == 0 && offsets.back() == total;
  for (std::size_t i = 1; good && i < offsets.size(); ++i) {
    good = offsets[i] >= offsets[i - 1];
    longest = std::max(longest, offsets[i] - offsets[i - 1]);
  }
  if (!good) fail(kOp, ": argument '", argument, "': expected offsets that start at 0, never fall and end at ", total);
  return longest;
}

void set_mask(Problem* p, py::handle mask_) {
  if (mask_.is_none()) return;
  AttentionDesc& d = p->desc;
  if (d.sequences) fail(kOp, ": argument 'mask': expected None with cu_seqlens, got a tensor");
  bool boolean = false;
  const TensorView mask = view_or_bool(mask_, kOp, "mask", &boolean);
  const bool fits = mask.ndim == 4 && (mask.size(0) == d.B || mask.size(0) == 1) &&
                    (mask.size(1) == d.H || mask.size(1) == 1) && mask.size(2) == d.Lq && mask.size(3) == d.Lk;
  if (!fits)
    fail(kOp, ": argument 'mask': expected shape [", d.B, " or 1, ", d.H, " or 1, ", d.Lq, ", ", d.Lk, "], got ",
         shape_string(mask));
  if (!boolean && mask.dtype != DType::f32) require_dtype(mask, d.dtype, "as query", kOp, "mask");
  d.mask = boolean ? MaskKind::boolean : mask.dtype == DType::f32 ? MaskKind::f32 : MaskKind::same;
  const auto step = [&](int i) { return mask.size(i) > 1 ? mask.stride(i) : 0; };
  d.mask_step = {step(0), step(1), step(2), mask.size(3) > 1 ? mask.stride(3) : 1};
  p->args.mask = mask.data;
}

Problem make_problem(py::handle query_, py::handle key_, py::handle value_, py::handle mask, const Options& o) {
  const TensorView q = view(query_, kOp, "query"), k = view(key_, kOp, "key"), v = view(value_, kOp, "value");
  Problem p;
  AttentionDesc& d = p.desc;
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
  d.precision = asked_precision(d.dtype);
  d.q = strides_of(q), d.k = strides_of(k), d.v = strides_of(v);
  d.out = {d.H * d.Lq * d.Dv, d.Lq * d.Dv, d.Dv, 1};
  p.args.q = q.data, p.args.k = k.data, p.args.v = v.data;

  if (o.cu_seqlens_q.is_none() != o.cu_seqlens_k.is_none())
    fail(kOp, ": argument 'cu_seqlens_k': expected both cu_seqlens_q and cu_seqlens_k or neither");
  if (!o.cu_seqlens_q.is_none()) {
    if (d.B != 1) fail(kOp, ": argument 'query': expected [1, H, total, D] with cu_seqlens, got ", shape_string(q));
    p.seq_q = read_integers(o.cu_seqlens_q, kOp, "cu_seqlens_q");
    p.seq_k = read_integers(o.cu_seqlens_k, kOp, "cu_seqlens_k");
    d.total_q = d.Lq, d.total_k = d.Lk;
    d.Lq = check_offsets(p.seq_q, d.total_q, "cu_seqlens_q");
    d.Lk = check_offsets(p.seq_k, d.total_k, "cu_seqlens_k");
    if (p.seq_q.size() != p.seq_k.size())
      fail(kOp, ": argument 'cu_seqlens_k': expected ", p.seq_q.size(), " offsets as cu_seqlens_q, got ",
           p.seq_k.size());
    d.sequences = static_cast<i64>(p.seq_q.size()) - 1;
    d.B = d.sequences ? 1 : 0;
  }
  if (!(o.softcap >= 0)) fail(kOp, ": argument 'softcap': expected at least 0, got ", o.softcap);
  if (!(o.dropout_p >= 0 && o.dropout_p <= 1)) fail(kOp, ": argument 'dropout_p': expected 0 to 1, got ", o.dropout_p);
  if (o.seed < 0) fail(kOp, ": argument 'seed': expected at least 0, got ", o.seed);
  d.scale = static_cast<float>(o.scale), d.softcap = static_cast<float>(o.softcap);
  d.lo = o.lo, d.hi = o.hi, d.align_end = o.align_end;
  d.dropout_p = o.dropout_p, d.seed = static_cast<std::uint64_t>(o.seed);
  set_mask(&p, mask);
  return p;
}

// After the problem stands where it will stay.
void point_to_offsets(Problem* p) {
  if (p->desc.sequences) p->args.seq_q = p->seq_q.data(), p->args.seq_k = p->seq_k.data();
}

void set_out(Problem* p, const TensorView& out, const TensorView& q, const TensorView& k, const TensorView& v) {
  const AttentionDesc& d = p->desc;
  require_shape(out, "out", {q.size(0), d.H, q.size(2), d.Dv}, "as query but with the last dimension of value");
  require_dtype(out, d.dtype, "as query", kOp, "out");
  if (out.size(3) > 1 && out.numel() > 0 && out.stride(3) != 1)
    fail(kOp, ": argument 'out': expected unit stride in the last dimension, got ", out.stride(3));
  require_writable(out, kOp);
  require_apart(out, q, kOp, "query");
  require_apart(out, k, kOp, "key");
  require_apart(out, v, kOp, "value");
  p->desc.out = strides_of(out);
  p->args.out = out.data;
}

float* lse_data(const Problem& p, const TensorView& lse, i64 rows) {
  const i64 heads = p.desc.H;
  bool fits =
      lse.ndim == 4 && lse.dtype == DType::f32 && lse.size(1) == heads && lse.size(2) == rows && lse.size(3) == 2;
  for (i64 i = 3, step = 1; fits && i >= 0; step *= lse.shape[i--])
    fits = lse.shape[i] <= 1 || lse.strides[i] == step || lse.numel() == 0;
  if (!fits)
    fail(kOp, ": argument 'lse': expected contiguous float32 [B, ", heads, ", ", rows, ", 2], got ", shape_string(lse));
  return static_cast<float*>(lse.data);
}

const AttentionKernel* forced_row(const std::string& name) {
  if (name.empty()) return nullptr;
  const AttentionKernel& k = attention_kernel(name, kOp);
  if (k.isa > cpu_info().isa)
    fail(kOp, ": argument 'kernel': expected a level of at most ", isa_name(cpu_info().isa), ", the one in use, got '",
         name, "'");
  return &k;
}

void run_attention(py::handle out_, py::handle lse_, py::handle query, py::handle key, py::handle value,
                   py::handle mask, double scale, i64 lo, i64 hi, double softcap, double dropout_p, i64 seed,
                   py::object cu_seqlens_q, py::object cu_seqlens_k, bool align_end, const std::string& kernel,
                   int threads) {
  require_threads(threads, kOp);
  const Options o = {scale,    lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k),
                     align_end};
  Problem p = make_problem(query, key, value, mask, o);
  const TensorView q = view(query, kOp, "query"), out = view(out_, kOp, "out");
  set_out(&p, out, q, view(key, kOp, "key"), view(value, kOp, "value"));
  if (!lse_.is_none()) {
    const TensorView lse = view(lse_, kOp, "lse");
    p.args.lse = lse_data(p, lse, q.size(2));
    if (lse.size(0) != q.size(0))
      fail(kOp, ": argument 'lse': expected batch ", q.size(0), ", got ", shape_string(lse));
    require_apart(out, lse, kOp, "lse");
  }
  const AttentionKernel* forced = forced_row(kernel);
  point_to_offsets(&p);
  py::gil_scoped_release release;
  attention(p.desc, p.args, forced, threads);
}

// A gradient of `of`: its shape and dtype, unit stride in the last dimension; null where None.
void* grad_data(py::handle grad_, const char* argument, const TensorView& of, const char* of_name,
                AttentionStrides* step) {
  if (grad_.is_none()) return nullptr;
  const TensorView grad = view(grad_, kOp, argument);
  require_shape(grad, argument, {of.size(0), of.size(1), of.size(2), of.size(3)}, of_name);
  require_dtype(grad, of.dtype, "as query", kOp, argument);
  if (grad.size(3) > 1 && grad.numel() > 0 && grad.stride(3) != 1)
    fail(kOp, ": argument '", argument, "': expected unit stride in the last dimension, got ", grad.stride(3));
  require_writable(grad, kOp);
  *step = strides_of(grad);
  return grad.data;
}

void set_dmask(Problem* p, AttentionGrads* grads, py::handle dmask_) {
  if (dmask_.is_none()) return;
  const AttentionDesc& d = p->desc;
  if (d.mask != MaskKind::f32 && d.mask != MaskKind::same)
    fail(kOp, ": argument 'dmask': expected None without a mask that is added");
  const TensorView dmask = view(dmask_, kOp, "dmask");
  const i64 full[4] = {d.B, d.H, d.Lq, d.Lk};
  bool fits = dmask.ndim == 4;
  for (int i = 0; fits && i < 4; ++i) fits = dmask.size(i) == full[i] || dmask.size(i) == 1;
  if (!fits)
    fail(kOp, ": argument 'dmask': expected [", d.B, ", ", d.H, ", ", d.Lq, ", ", d.Lk,
         "] or 1 in the place of any of them, got ", shape_string(dmask));
  require_dtype(dmask, DType::f32, "sums of products", kOp, "dmask");
  require_writable(dmask, kOp);
  const auto step = [&](int i) { return dmask.size(i) > 1 ? dmask.stride(i) : 0; };
  grads->dmask = static_cast<float*>(dmask.data);
  grads->dmask_step = {step(0), step(1), step(2), step(3)};
}

void run_attention_backward(py::handle dq, py::handle dk, py::handle dv, py::handle dmask, py::handle dout_,
                            py::handle query, py::handle key, py::handle value, py::handle out_, py::handle lse_,
                            py::handle mask, double scale, i64 lo, i64 hi, double softcap, double dropout_p, i64 seed,
                            py::object cu_seqlens_q, py::object cu_seqlens_k, bool align_end, const std::string& kernel,
                            int threads) {
  require_threads(threads, kOp);
  const Options o = {scale,    lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k),
                     align_end};
  Problem p = make_problem(query, key, value, mask, o);
  const TensorView q = view(query, kOp, "query"), k = view(key, kOp, "key"), v = view(value, kOp, "value");
  const TensorView dout = view(dout_, kOp, "dout"), out = view(out_, kOp, "out"), lse = view(lse_, kOp, "lse");
  const char* const why = "as query but with the last dimension of value";
  for (const auto& [t, name] : {std::pair{&out, "out"}, std::pair{&dout, "dout"}}) {
    require_shape(*t, name, {q.size(0), p.desc.H, q.size(2), p.desc.Dv}, why);
    require_dtype(*t, p.desc.dtype, "as query", kOp, name);
  }
  if (out.size(3) > 1 && out.numel() > 0 && out.stride(3) != 1)
    fail(kOp, ": argument 'out': expected unit stride in the last dimension, got ", out.stride(3));
  p.desc.out = strides_of(out), p.args.out = out.data;
  p.args.lse = lse_data(p, lse, q.size(2));
  if (lse.size(0) != q.size(0)) fail(kOp, ": argument 'lse': expected batch ", q.size(0), ", got ", shape_string(lse));

  AttentionGrads grads = {};
  grads.dout = dout.data, grads.dout_step = strides_of(dout);
  grads.dq = grad_data(dq, "dq", q, "as query", &grads.dq_step);
  grads.dk = grad_data(dk, "dk", k, "as key", &grads.dk_step);
  grads.dv = grad_data(dv, "dv", v, "as value", &grads.dv_step);
  set_dmask(&p, &grads, dmask);
  const std::pair<py::handle, const char*> written[] = {{dq, "dq"}, {dk, "dk"}, {dv, "dv"}, {dmask, "dmask"}};
  for (const auto& [handle, name] : written) {
    if (handle.is_none()) continue;
    const TensorView t = view(handle, kOp, name);
    for (const auto& [in, in_name] : {std::pair{&q, "query"}, std::pair{&k, "key"}, std::pair{&v, "value"},
                                      std::pair{&out, "out"}, std::pair{&dout, "dout"}, std::pair{&lse, "lse"}})
      require_apart(t, *in, kOp, in_name, name);
    for (const auto& [other, other_name] : written)
      if (other_name != name && !other.is_none()) require_apart(t, view(other, kOp, other_name), kOp, other_name, name);
  }
  const AttentionKernel* forced = forced_row(kernel);
  point_to_offsets(&p);
  py::gil_scoped_release release;
  attention_backward(p.desc, p.args, grads, forced, threads);
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
  const Options o = {scale,    lo, hi, softcap, dropout_p, seed, std::move(cu_seqlens_q), std::move(cu_seqlens_k),
                     align_end};
  Problem p = make_problem(query, key, value, mask, o);
  const CpuInfo& cpu = cpu_info();
  Machine machine = {cpu.isa, current_team(threads).threads, cpu.l1d, cpu.l2, cpu.l3};
  if (!isa.empty() && !parse_isa(isa, &machine.isa)) fail(kOp, ": argument 'isa': no level '", isa, "'");
  if (!precision.empty()) p.desc.precision = precision_named(precision, kOp);
  const AttentionDesc& d = p.desc;
  if (backward) return backward_plan_dict(d, machine, forced_row(kernel));
  const AttentionPlan plan = attention_plan(d, machine, forced_row(kernel));
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
