// _C: convolution and its gradients.
#include "conv/conv.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "bind/conv_call.h"

namespace py = pybind11;

namespace fastdl {
namespace {

class Call : public ConvCall {
 public:
  using ConvCall::ConvCall;

  // Channels or the last dimension lie side by side in what forward and dgrad write.
  void tensors(py::handle x, py::handle w, py::handle y, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups) {
    ConvCall::tensors(x, w, y, stride, padding, dilation, groups);
    desc.precision = asked_precision(desc.dtype, Switch::conv);
    if (desc.pass == ConvPass::wgrad) return;
    const TensorView& out = written().view;
    if (!desc.channels_last && out.size(-1) > 1 && out.stride(-1) != 1 && out.numel() > 0)
      fail(op(), ": argument 'out': expected a unit stride in the channel dimension or the last one, got ",
           out.stride(1), " and ", out.stride(-1));
  }

  void add_pack(py::handle pack, const std::string& kernel) {
    if (pack.is_none()) return;
    if (!kernel.empty()) fail(op(), ": argument 'kernel': expected none beside a pack, got '", kernel, "'");
    const TensorView t = view(pack, op(), "pack");
    require_dtype(t, DType::f32, "the dtype of packs", op(), "pack");
    freeze();
    const i64 size = conv_pack_size(desc, this_machine(1));
    if (made_for_another_precision(t.numel(), size)) {
      desc.frozen = false;
      return;
    }
    if (t.ndim != 1 || t.size(0) != size || (size > 1 && t.stride(0) != 1))
      fail(op(), ": argument 'pack': expected ", size, " contiguous elements, got ", shape_string(t));
    for (const Argument& a : arguments())
      if (a.output) require_apart(a.view, t, op(), "pack", a.name);
    args.pack = static_cast<const float*>(t.data);
  }

  // Then the weight is read in its place. Packs of different precisions differ in size.
  bool made_for_another_precision(i64 numel, i64 size) const {
    if (numel == size || desc.dtype != DType::f32 || cpu_info().isa < Isa::kAmx) return false;
    ConvDesc other = desc;
    for (Precision p : {Precision::fma, Precision::ieee, Precision::tf32, Precision::bf16}) {
      other.precision = p;
      if (numel == conv_pack_size(other, this_machine(1))) return true;
    }
    return false;
  }

  void freeze() {
    constexpr i64 kMostPhases = 4096;
    i64 phases = 1;
    for (i64 s : desc.stride)
      if (__builtin_mul_overflow(phases, desc.pass == ConvPass::dgrad ? s : 1, &phases) || phases > kMostPhases)
        fail(op(), ": argument 'stride': expected steps of fewer than ", kMostPhases, " elements in a pack");
    desc.frozen = true;
  }

  void run(const std::string& kernel, int threads) {
    require_threads(threads, op());
    const ConvKernel* forced = usable_row(conv_kernels(), kernel, op());
    check_outputs();
    for (const Argument& a : arguments())
      if (a.output) advise_huge_pages(a.view);
    py::gil_scoped_release release;
    conv(desc, args, forced, threads);
  }

 private:
  TensorView look(py::handle object, const char* name) override { return view(object, op(), name); }
};

int spatial(py::handle x, const char* op, const char* name) { return conv_spatial(view(x, op, name), op, name); }

void run_dense(ConvPass pass, py::handle x, py::handle w, py::handle y, py::handle bias, const Sizes& stride,
               const Sizes& padding, const Sizes& dilation, i64 groups, const std::string& activation,
               py::handle residual, py::handle pre, py::handle pack, const std::string& kernel, int threads) {
  const bool forward = pass == ConvPass::forward;
  Call c(pass, spatial(forward ? x : y, forward ? "fastdl.conv" : "fastdl.conv_dgrad", forward ? "input" : "grad"));
  c.tensors(x, w, y, stride, padding, dilation, groups);
  c.epilogue(bias, activation, residual, pre);
  c.add_pack(pack, kernel);
  c.run(kernel, threads);
}

void run_forward(py::handle y, py::handle x, py::handle w, py::handle bias, const Sizes& stride, const Sizes& padding,
                 const Sizes& dilation, i64 groups, const std::string& activation, py::handle residual, py::handle pre,
                 py::handle pack, const std::string& kernel, int threads) {
  run_dense(ConvPass::forward, x, w, y, bias, stride, padding, dilation, groups, activation, residual, pre, pack,
            kernel, threads);
}

void run_dgrad(py::handle dx, py::handle dy, py::handle w, py::handle bias, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups, const std::string& activation, py::handle residual, py::handle pre,
               py::handle pack, const std::string& kernel, int threads) {
  run_dense(ConvPass::dgrad, dx, w, dy, bias, stride, padding, dilation, groups, activation, residual, pre, pack,
            kernel, threads);
}

void run_wgrad(py::handle dw, py::handle dy, py::handle x, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups, py::handle dbias, const std::string& kernel, int threads) {
  Call c(ConvPass::wgrad, spatial(x, "fastdl.conv_wgrad", "input"));
  c.tensors(x, dw, dy, stride, padding, dilation, groups);
  c.add_dbias(dbias);
  c.run(kernel, threads);
}

const char* kind_name(ConvKind kind) {
  constexpr const char* kNames[] = {"dense", "wgrad", "depthwise", "grouped"};
  return kNames[static_cast<int>(kind)];
}

py::dict plan_shape(const std::string& pass, const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation, i64 groups, const std::string& dtype,
                    bool channels_last, const std::string& isa, int threads, const std::string& kernel, bool frozen,
                    const std::string& precision) {
  const char* op = "fastdl.conv_plan";
  require_threads(threads, op);
  Call c(conv_pass_named(pass, op), static_cast<int>(x.size()) - 2);
  for (const Sizes* sizes : {&x, &w, &y})
    for (i64 n : *sizes)
      if (n < 0) fail(op, ": expected sizes of at least 0, got ", list(*sizes));
  c.shapes(x, w, y, stride, padding, dilation, groups);
  ConvDesc& d = c.desc;
  d.precision = precision_named(precision, op);
  d.dtype = dtype_named(dtype, op), d.channels_last = channels_last, d.frozen = frozen;
  const Machine machine = machine_named(isa, threads, op);
  const ConvPlan p = conv_plan(d, machine, forced_row(conv_kernels(), kernel, op));
  py::dict out;
  out["op"] = "conv";
  out["pass"] = pass;
  out["kernel"] = p.kernel->name;
  out["schedule"] = kind_name(p.kernel->kind);
  out["isa"] = isa_name(p.kernel->isa);
  out["mr"] = p.kernel->mr;
  out["nr"] = p.kernel->nr;
  out["c_block"] = p.c_block;
  out["k_block"] = p.k_block;
  out["planes"] = p.planes;
  out["rows"] = p.rows;
  out["w_block"] = p.w_block;
  out["flat"] = p.flat || p.wgrad.flat;
  out["strips"] = p.strips;
  out["n_block"] = p.n_block;
  out["merge"] = p.merge;
  out["group_block"] = p.group_block;
  out["phases"] = p.phases.size();
  out["parts"] = p.parts;
  out["threads"] = p.threads;
  out["weight_bytes"] = p.w_bytes;
  out["chunks"] = p.wgrad.chunks;
  out["chunk_bytes"] = p.wgrad.chunk_bytes;
  out["thread_bytes"] = p.per_thread_bytes();
  out["workspace_bytes"] = p.workspace_bytes();
  out["why"] = p.why;
  out["candidates"] = conv_candidates(d, machine, p);
  return out;
}

// The problem whose frozen pack is asked for: packs know neither batch nor image sizes, so the smallest will do.
Call pack_call(const std::string& pass, const Sizes& w, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups, const std::string& dtype) {
  const char* op = "fastdl.conv_pack";
  const ConvPass p = conv_pass_named(pass, op);
  if (p == ConvPass::wgrad) fail(op, ": argument 'pass_': expected forward or dgrad, got 'wgrad'");
  if (w.size() < 3 || w.size() > 5) fail(op, ": argument 'weight': expected 3 to 5 dimensions, got ", list(w));
  Call c(p, static_cast<int>(w.size()) - 2);
  Sizes x(w.size(), 1), y(w.size(), 0);
  x[0] = y[0] = 0, y[1] = w[0];
  if (__builtin_mul_overflow(w[1], std::max<i64>(1, groups), &x[1]))
    fail(op, ": argument 'groups': expected a number that divides the channels, got ", groups);
  c.shapes(x, w, y, stride, padding, dilation, groups);
  c.desc.dtype = dtype_named(dtype, op), c.desc.precision = asked_precision(c.desc.dtype, Switch::conv);
  c.freeze();
  return c;
}

i64 pack_numel(const std::string& pass, const Sizes& w, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups, const std::string& dtype) {
  for (i64 n : w)
    if (n < 0) fail("fastdl.conv_pack: argument 'weight': expected sizes of at least 0, got ", list(w));
  return conv_pack_size(pack_call(pass, w, stride, padding, dilation, groups, dtype).desc, this_machine(1));
}

void run_pack(py::handle out_, const std::string& pass, py::handle w_, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, i64 groups, int threads) {
  const char* op = "fastdl.conv_pack";
  require_threads(threads, op);
  const TensorView out = view(out_, op, "out"), w = view(w_, op, "weight");
  Call c = pack_call(pass, Sizes(w.shape, w.shape + w.ndim), stride, padding, dilation, groups, torch_name(w.dtype));
  const Machine machine = this_machine(threads);
  require_dtype(out, DType::f32, "the dtype of packs", op, "out");
  const i64 size = conv_pack_size(c.desc, machine);
  if (out.ndim != 1 || out.size(0) != size || (size > 1 && out.stride(0) != 1))
    fail(op, ": argument 'out': expected ", size, " contiguous elements, got ", shape_string(out));
  require_apart(out, w, op, "weight");
  const ConvTensor strided = conv_tensor(w);
  py::gil_scoped_release release;
  conv_pack(c.desc, machine, strided, static_cast<float*>(out.data));
}

}  // namespace

py::list conv_kernel_rows() {
  py::list out;
  for (const ConvKernel& k : conv_kernels()) {
    py::dict row = kernel_row(k.name, k.isa, k.dtype);
    row["kind"] = kind_name(k.kind);
    row["mr"] = k.mr;
    row["nr"] = k.nr;
    row["precision"] = precision_name(k.precision);
    row["k_unit"] = k.k_unit;
    row["k_step"] = k.k_step;
    row["planes"] = k.planes;
    out.append(row);
  }
  return out;
}

void bind_conv(py::module_& m) {
  using namespace py::literals;
  m.def("conv", run_forward, "y"_a, "x"_a, "w"_a, "bias"_a = py::none(), py::kw_only(), "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a = 1, "activation"_a = "none", "residual"_a = py::none(), "pre"_a = py::none(),
        "pack"_a = py::none(), "kernel"_a = "", "threads"_a = 0);
  m.def("conv_dgrad", run_dgrad, "dx"_a, "dy"_a, "w"_a, "bias"_a = py::none(), py::kw_only(), "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a = 1, "activation"_a = "none", "residual"_a = py::none(), "pre"_a = py::none(),
        "pack"_a = py::none(), "kernel"_a = "", "threads"_a = 0);
  m.def("conv_wgrad", run_wgrad, "dw"_a, "dy"_a, "x"_a, py::kw_only(), "stride"_a, "padding"_a, "dilation"_a,
        "groups"_a = 1, "dbias"_a = py::none(), "kernel"_a = "", "threads"_a = 0);
  m.def("conv_plan", plan_shape, "pass_"_a, "x_shape"_a, "w_shape"_a, "y_shape"_a, py::kw_only(), "stride"_a,
        "padding"_a, "dilation"_a, "groups"_a = 1, "dtype"_a = "float32", "channels_last"_a = true, "isa"_a = "",
        "threads"_a = 0, "kernel"_a = "", "frozen"_a = false, "precision"_a = "ieee");
  m.def("conv_pack_numel", pack_numel, "pass_"_a, "w_shape"_a, py::kw_only(), "stride"_a, "padding"_a, "dilation"_a,
        "groups"_a = 1, "dtype"_a = "float32");
  m.def("conv_pack", run_pack, "out"_a, "pass_"_a, "w"_a, py::kw_only(), "stride"_a, "padding"_a, "dilation"_a,
        "groups"_a = 1, "threads"_a = 0);
}

}  // namespace fastdl
