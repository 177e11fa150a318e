// What of a GEMM problem is the CPU's own: its tensors, its kernels, frozen packs, torch's switches.
#include <algorithm>

#include "base/check.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {

void add_bias(GemmProblem* p, py::handle bias, const TensorView& out, const char* op) {
  if (bias.is_none()) return;
  const TensorView b = view(bias, op, "bias");
  if (b.ndim != 1 || b.size(0) != p->desc.N)
    fail(op, ": argument 'bias': expected shape [", p->desc.N, "], got ", shape_string(b));
  require_dtype(b, out.dtype, "as the other arguments", op, "bias");
  require_apart(out, b, op, "bias");
  p->args.bias = b.data;
  p->args.bias_step = b.stride(0);
}

namespace {
constexpr const char* kSwitches[] = {"matmul", "conv", "rnn"};
}  // namespace

Switch switch_named(const std::string& name, const char* op) {
  for (int i = 0; i < 3; ++i)
    if (name == kSwitches[i]) return static_cast<Switch>(i);
  fail(op, ": argument 'switch': expected matmul, conv or rnn, got '", name, "'");
}

// torch.backends.mkldnn.matmul.fp32_precision, inheritance and set_float32_matmul_precision resolved. About 0.1 us, so
// it is read only where there are kernels to choose from.
Precision asked_precision(DType dtype, Switch which) {
  if (dtype != DType::f32 || cpu_info().isa < Isa::kAmx) return Precision::ieee;
  if (cpu_info().float32_fma) return Precision::fma;
  static PyObject* const getter =
      py::object(py::module_::import("torch._C").attr("_get_fp32_precision_getter")).release().ptr();  // kept for good
  const auto of = [](Switch s) { return py::make_tuple("mkldnn", kSwitches[static_cast<int>(s)]).release().ptr(); };
  static PyObject* const arguments[] = {of(Switch::matmul), of(Switch::conv), of(Switch::rnn)};
  const auto value =
      py::reinterpret_steal<py::object>(PyObject_Call(getter, arguments[static_cast<int>(which)], nullptr));
  if (!value) throw py::error_already_set();
  if (PyUnicode_CompareWithASCIIString(value.ptr(), "tf32") == 0) return Precision::tf32;
  if (PyUnicode_CompareWithASCIIString(value.ptr(), "bf16") == 0) return Precision::bf16;
  return Precision::ieee;  // "ieee", "none"
}

void* pack_data(py::handle packed_, i64 K, i64 N, const GemmKernel& kernel, const TensorView& out, const char* op) {
  const TensorView packed = view(packed_, op, "packed");
  require_dtype(packed, DType::f32, "the dtype of packs", op, "packed");
  const i64 size = gemm_pack_size(K, N, kernel);
  if (kernel.kind != GemmKind::kTile || packed.ndim != 1 || packed.size(0) != size || packed.stride(0) != 1)
    fail(op, ": argument 'packed': expected ", size, " contiguous elements, the pack of a [", K, ", ", N,
         "] operand for a tile kernel, got ", shape_string(packed), " for ", kernel.name);
  require_apart(out, packed, op, "packed");
  return packed.data;
}

void* own_pack(py::handle packed, const GemmDesc& d, const TensorView& out, const char* op) {
  const GemmKernel& own = pack_kernel("", d.dtype, op);
  if (own.precision != Precision::fma) {
    const i64 size = view(packed, op, "packed").numel();
    for (const GemmKernel& k : gemm_kernels())
      if (k.isa == own.isa && k.dtype == d.dtype && k.precision != own.precision && k.kind == GemmKind::kTile &&
          size == gemm_pack_size(d.K, d.N, k))
        return nullptr;
  }
  return pack_data(packed, d.K, d.N, own, out, op);
}

bool linear_shape(const TensorView& input, const TensorView& w, py::handle bias_, i64* shape) {
  if (w.ndim != 2 || input.ndim < 1 || input.ndim > kMaxBatchDims + 1 || input.size(-1) != w.size(1) ||
      input.dtype != w.dtype)
    return false;
  if (!bias_.is_none()) {
    const TensorView bias = view(bias_, "fastdl.linear", "bias");
    if (bias.ndim != 1 || bias.size(0) != w.size(0) || bias.dtype != w.dtype) return false;
  }
  std::copy_n(input.shape, input.ndim - 1, shape);
  shape[input.ndim - 1] = w.size(0);
  return true;
}

const GemmKernel& pack_kernel(const std::string& name, DType dtype, const char* op) {
  return name.empty() ? gemm_pack_kernel(cpu_info().isa, dtype, asked_precision(dtype))
                      : *usable_row(gemm_kernels(), name, op);
}

}  // namespace fastdl
