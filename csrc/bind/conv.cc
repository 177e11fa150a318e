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
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

using Sizes = std::vector<i64>;

const ConvKernel* forced_row(const std::string& name, const char* op) {
  if (name.empty()) return nullptr;
  const ConvKernel& k = conv_kernel(name, op);
  if (k.isa > cpu_info().isa)
    fail(op, ": argument 'kernel': expected a level of at most ", isa_name(cpu_info().isa), ", the one in use, got '",
         name, "'");
  return &k;
}

std::string list(const i64* x, int n) {
  std::string s = "[";
  for (int i = 0; i < n; ++i) s += (i ? ", " : "") + std::to_string(x[i]);
  return s + "]";
}
std::string list(const Sizes& x) { return list(x.data(), static_cast<int>(x.size())); }

bool product(i64 a, i64 b, i64* out) { return !__builtin_mul_overflow(a, b, out); }

// What one call is given, checked before anything is allocated.
class Call {
 public:
  ConvDesc desc = {};
  ConvArgs args = {};

  // dims: spatial dimensions; the names of what x, w and y are called in messages.
  Call(ConvPass pass, int dims) : dims_(dims) {
    desc.pass = pass;
    constexpr const char* kSuffix[] = {"", "_dgrad", "_wgrad"};
    op_ = concat("fastdl.conv", dims, "d", kSuffix[static_cast<int>(pass)]);
  }

  const char* op() const { return op_.c_str(); }

  // Fills the sizes from the shapes [N, C, in], [K, C/groups, kernel], [N, K, out].
  void shapes(const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, i64 groups) {
    const auto rank = static_cast<std::size_t>(dims_ + 2);
    if (dims_ < 1 || dims_ > 3) wrong(names().x, "3 to 5 dimensions", x);
    if (w.size() != rank) wrong(names().w, concat(rank, " dimensions"), w);
    if (y.size() != rank) wrong(names().y, concat(rank, " dimensions"), y);
    if (groups < 1) fail(op(), ": argument 'groups': expected at least 1, got ", groups);
    const int first = 3 - dims_;
    per_dimension(stride, "stride", 1, 1, desc.stride);
    per_dimension(padding, "padding", 0, 0, desc.pad);
    per_dimension(dilation, "dilation", 1, 1, desc.dilation);
    desc.N = x[0], desc.C = x[1], desc.K = w[0], desc.groups = groups;
    if (desc.C % groups != 0) wrong(names().x, concat("channels that ", groups, " groups divide"), x);
    if (desc.K % groups != 0) wrong(names().w, concat("output channels that ", groups, " groups divide"), w);
    if (w[1] != desc.C / groups) wrong(names().w, concat("[", desc.K, ", ", desc.C / groups, ", ...]"), w);
    if (y[0] != desc.N || y[1] != desc.K) wrong(names().y, concat("[", desc.N, ", ", desc.K, ", ...]"), y);
    for (int i = 0; i < 3; ++i) {
      const bool there = i >= first;
      const auto at = static_cast<std::size_t>(there ? i - first + 2 : 0);
      desc.in[i] = there ? x[at] : 1, desc.out[i] = there ? y[at] : 1, desc.kernel[i] = there ? w[at] : 1;
      if (desc.kernel[i] < 1) wrong(names().w, "a kernel of at least 1 in each dimension", w);
      // Nothing computed from these may overflow: every position that a tap can have, and twice that.
      constexpr i64 kMost = i64{1} << 60;
      i64 reach, span;
      if (!product(desc.kernel[i] - 1, desc.dilation[i], &reach) || reach > kMost)
        fail(op(), ": argument 'dilation': expected a kernel of less than 2^60 positions, got ", desc.dilation[i],
             " with a kernel of ", desc.kernel[i]);
      if (desc.pad[i] > kMost) fail(op(), ": argument 'padding': expected at most 2^60, got ", desc.pad[i]);
      if (!product(std::max<i64>(1, desc.out[i]), desc.stride[i], &span) || span > kMost)
        fail(op(), ": argument 'stride': expected outputs within 2^60 positions, got ", desc.stride[i], " with ",
             desc.out[i], " outputs");
      // The last kernel ends where the padded image does, or less than a stride before.
      if (desc.out[i] < 1) continue;
      const i64 end = (desc.out[i] - 1) * desc.stride[i] + reach + 1 - desc.pad[i];  // of the last kernel
      if (end <= desc.in[i] - desc.stride[i] || desc.in[i] > kMost)
        fail(op(), ": argument '", names().y, "': expected all ", dims_, " spatial sizes to follow from ", names().x,
             " ", list(x), ", ", names().w, " ", list(w), ", stride ", list(stride), ", padding ", list(padding),
             " and dilation ", list(dilation), ", got ", list(y));
    }
    i64 size = 4;
    for (i64 n : {desc.K, std::max<i64>(1, desc.C), desc.kernel[0], desc.kernel[1], desc.kernel[2], i64{64}})
      if (!product(size, std::max<i64>(1, n), &size)) wrong(names().w, "fewer than 2^56 elements", w);
    size = 4;
    for (i64 n : {desc.N, std::max(desc.C, desc.K), desc.out[0], desc.out[1], desc.out[2], i64{64}})
      if (!product(size, std::max<i64>(1, n), &size)) wrong(names().y, "fewer than 2^56 elements", y);
    size = 4;
    for (i64 n : {desc.N, std::max(desc.C, desc.K), desc.in[0], desc.in[1], desc.in[2], i64{64}})
      if (!product(size, std::max<i64>(1, n), &size)) wrong(names().x, "fewer than 2^56 elements", x);
  }

  void tensors(py::handle x, py::handle w, py::handle y, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups) {
    const ConvPass pass = desc.pass;
    const TensorView tx = add(x, names().x, pass == ConvPass::dgrad);
    const TensorView tw = add(w, names().w, pass == ConvPass::wgrad);
    const TensorView ty = add(y, names().y, pass == ConvPass::forward);
    desc.dtype = tx.dtype, desc.precision = asked_precision(tx.dtype, Switch::conv);
    const auto sizes = [](const TensorView& t) { return Sizes(t.shape, t.shape + t.ndim); };
    shapes(sizes(tx), sizes(tw), sizes(ty), stride, padding, dilation, groups);
    args.x = strided(tx), args.w = strided(tw), args.y = strided(ty);
    if (pass == ConvPass::wgrad) return;
    const TensorView& out = pass == ConvPass::forward ? ty : tx;
    const bool last = out.size(1) <= 1 || out.stride(1) == 1;
    desc.channels_last = last;
    if (!last && out.size(-1) > 1 && out.stride(-1) != 1 && out.numel() > 0)
      fail(op(), ": argument '", written(), "': expected a unit stride in the channel dimension or the last one, got ",
           out.stride(1), " and ", out.stride(-1));
  }

  void add_bias(py::handle bias) {
    if (bias.is_none()) return;
    const TensorView b = add(bias, "bias", false);
    const i64 channels = desc.pass == ConvPass::forward ? desc.K : desc.C;
    if (b.ndim != 1 || b.size(0) != channels)
      fail(op(), ": argument 'bias': expected shape [", channels, "], got ", shape_string(b));
    args.bias = b.data, args.bias_step = b.stride(0);
  }
  void add_dbias(py::handle dbias) {
    if (dbias.is_none()) return;
    const TensorView b = add(dbias, "dbias", true);
    if (b.ndim != 1 || b.size(0) != desc.K)
      fail(op(), ": argument 'dbias': expected shape [", desc.K, "], got ", shape_string(b));
    args.dbias = b.data, args.dbias_step = b.stride(0);
  }

  // A tensor that lies in memory exactly as the written one does, or null for None.
  void* like_written(py::handle object, const char* name, bool output) {
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    const Argument& out =
        *std::find_if(arguments_.begin(), arguments_.end(), [](const Argument& a) { return a.output; });
    bool same = t.ndim == out.view.ndim;
    for (int i = 0; same && i < t.ndim; ++i)
      same = t.shape[i] == out.view.shape[i] && (t.shape[i] == 1 || t.strides[i] == out.view.strides[i]);
    if (!same && out.view.numel() + t.numel() > 0)
      fail(op(), ": argument '", name, "': expected the shape and strides of ", out.name, ", got ", shape_string(t));
    return t.data;
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
    for (const Argument& a : arguments_)
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
      if (!product(phases, desc.pass == ConvPass::dgrad ? s : 1, &phases) || phases > kMostPhases)
        fail(op(), ": argument 'stride': expected steps of fewer than ", kMostPhases, " elements in a pack");
    desc.frozen = true;
  }

  void run(const std::string& kernel, int threads) {
    require_threads(threads, op());
    const ConvKernel* forced = forced_row(kernel, op());
    for (const Argument& a : arguments_) {
      if (!a.output) continue;
      require_writable(a.view, op());
      advise_huge_pages(a.view);
      for (const Argument& b : arguments_)
        if (&a != &b) require_apart(a.view, b.view, op(), b.name, a.name);
    }
    py::gil_scoped_release release;
    conv(desc, args, forced, threads);
  }

  ConvTensor strided(const TensorView& t) const {
    ConvTensor c = {t.data, t.stride(0), t.stride(1), {0, 0, 0}};
    for (int i = 0; i < dims_; ++i) c.step[3 - dims_ + i] = t.stride(2 + i);
    return c;
  }

  static Machine this_machine(int threads) {
    const CpuInfo& cpu = cpu_info();
    return {cpu.isa, threads > 0 ? threads : current_team(0).threads, cpu.l1d, cpu.l2, cpu.l3};
  }

 private:
  struct Argument {
    TensorView view;
    const char* name;
    bool output;
  };
  struct Names {
    const char *x, *w, *y;
  };
  const Names& names() const {
    static constexpr Names kNames[] = {{"input", "weight", "out"}, {"out", "weight", "grad"}, {"input", "out", "grad"}};
    return kNames[static_cast<int>(desc.pass)];
  }
  const char* written() const { return "out"; }

  TensorView add(py::handle object, const char* name, bool output) {
    const TensorView t = view(object, op(), name);
    if (!arguments_.empty()) {
      if (t.dtype != arguments_[0].view.dtype) require_dtype(t, arguments_[0].view.dtype, "as the others", op(), name);
    }
    arguments_.push_back({t, name, output});
    return t;
  }

  template <class Text>
  [[noreturn]] void wrong(const char* name, const Text& expected, const Sizes& got) const {
    fail(op(), ": argument '", name, "': expected ", expected, ", got ", list(got));
  }

  void per_dimension(const Sizes& values, const char* name, i64 least, i64 missing, i64* out) const {
    if (static_cast<int>(values.size()) != dims_)
      fail(op(), ": argument '", name, "': expected ", dims_, " integers, got ", list(values));
    for (int i = 0; i < 3; ++i) out[i] = i < 3 - dims_ ? missing : values[static_cast<std::size_t>(i - 3 + dims_)];
    for (i64 v : values)
      if (v < least) fail(op(), ": argument '", name, "': expected at least ", least, ", got ", list(values));
  }

  int dims_;
  std::string op_;
  std::vector<Argument> arguments_;
};

int spatial(py::handle x, const char* op, const char* name) {
  const TensorView t = view(x, op, name);
  if (t.ndim < 3 || t.ndim > 5) fail(op, ": argument '", name, "': expected 3 to 5 dimensions, got ", shape_string(t));
  return t.ndim - 2;
}

Activation activation_named(const std::string& name, const char* op) {
  constexpr std::pair<const char*, Activation> kNames[] = {{"none", Activation::none},
                                                           {"relu", Activation::relu},
                                                           {"gelu", Activation::gelu},
                                                           {"gelu_tanh", Activation::gelu_tanh},
                                                           {"silu", Activation::silu}};
  for (const auto& [known, activation] : kNames)
    if (name == known) return activation;
  fail(op, ": argument 'activation': expected none, relu, gelu, gelu_tanh or silu, got '", name, "'");
}

void run_dense(ConvPass pass, py::handle x, py::handle w, py::handle y, py::handle bias, const Sizes& stride,
               const Sizes& padding, const Sizes& dilation, i64 groups, const std::string& activation,
               py::handle residual, py::handle pre, py::handle pack, const std::string& kernel, int threads) {
  const bool forward = pass == ConvPass::forward;
  Call c(pass, spatial(forward ? x : y, forward ? "fastdl.conv" : "fastdl.conv_dgrad", forward ? "input" : "grad"));
  c.tensors(x, w, y, stride, padding, dilation, groups);
  c.add_bias(bias);
  c.args.activation = activation_named(activation, c.op());
  c.args.residual = c.like_written(residual, "residual", false);
  c.args.pre = c.like_written(pre, "pre", true);
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

ConvPass pass_named(const std::string& name, const char* op) {
  for (ConvPass p : {ConvPass::forward, ConvPass::dgrad, ConvPass::wgrad})
    if (name == conv_pass_name(p)) return p;
  fail(op, ": argument 'pass_': expected forward, dgrad or wgrad, got '", name, "'");
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
  Call c(pass_named(pass, op), static_cast<int>(x.size()) - 2);
  for (const Sizes* sizes : {&x, &w, &y})
    for (i64 n : *sizes)
      if (n < 0) fail(op, ": expected sizes of at least 0, got ", list(*sizes));
  c.shapes(x, w, y, stride, padding, dilation, groups);
  ConvDesc& d = c.desc;
  d.precision = precision_named(precision, op);
  d.dtype = dtype_named(dtype, op), d.channels_last = channels_last, d.frozen = frozen;
  Machine machine = Call::this_machine(threads);
  if (!isa.empty() && !parse_isa(isa, &machine.isa)) fail(op, ": argument 'isa': no level '", isa, "'");
  const ConvPlan p = conv_plan(d, machine, kernel.empty() ? nullptr : &conv_kernel(kernel, op));
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
  const ConvPass p = pass_named(pass, op);
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
  return conv_pack_size(pack_call(pass, w, stride, padding, dilation, groups, dtype).desc, Call::this_machine(1));
}

void run_pack(py::handle out_, const std::string& pass, py::handle w_, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, i64 groups, int threads) {
  const char* op = "fastdl.conv_pack";
  require_threads(threads, op);
  const TensorView out = view(out_, op, "out"), w = view(w_, op, "weight");
  Call c = pack_call(pass, Sizes(w.shape, w.shape + w.ndim), stride, padding, dilation, groups, torch_name(w.dtype));
  const Machine machine = Call::this_machine(threads);
  require_dtype(out, DType::f32, "the dtype of packs", op, "out");
  const i64 size = conv_pack_size(c.desc, machine);
  if (out.ndim != 1 || out.size(0) != size || (size > 1 && out.stride(0) != 1))
    fail(op, ": argument 'out': expected ", size, " contiguous elements, got ", shape_string(out));
  require_apart(out, w, op, "weight");
  const ConvTensor strided = c.strided(w);
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
