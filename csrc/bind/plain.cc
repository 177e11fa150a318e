// _C: the short way of eager calls. One call from Python allocates the output and runs the kernel (*_result), and
// before that looks whether the call is plain at all (plain_*).
//
// What "plain" means is said in fastdl/ops/plain.py, which hands the rules over once. Each function here returns the
// result; None where the call is not plain or does not fit, so that the general path must look at it; plain_* return
// True where the call is plain and autograd must record it.
#include <algorithm>
#include <iterator>
#include <new>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"
#include "gemm/gemm.h"
#include "rnn/rnn.h"

namespace py = pybind11;

namespace fastdl {
namespace {

// Never destroyed: the interpreter may be gone by then.
struct Rules {
  std::vector<PyTypeObject*> types;  // of tensors, exactly
  std::vector<PyObject*> probes;     // called without arguments; plain while each returns something false
  struct Setting {
    PyObject *names, *name, *neutral;  // plain while names[name] == neutral
  };
  std::vector<Setting> settings;
  PyObject *grad_enabled, *is_neg, *requires_grad, *new_empty;
};
Rules* g_rules = nullptr;

void set_rules(const py::tuple& types, const py::tuple& probes, const py::tuple& settings, py::handle grad_enabled) {
  auto* r = new Rules;
  for (py::handle type : types) r->types.push_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()));
  for (py::handle probe : probes) r->probes.push_back(probe.inc_ref().ptr());
  for (py::handle setting : settings) {
    const auto part = [&](py::size_t i) { return py::reinterpret_borrow<py::tuple>(setting)[i].cast<py::object>(); };
    r->settings.push_back({part(0).release().ptr(), part(1).release().ptr(), part(2).release().ptr()});
  }
  r->grad_enabled = grad_enabled.inc_ref().ptr();
  r->is_neg = PyUnicode_InternFromString("is_neg");
  r->requires_grad = PyUnicode_InternFromString("requires_grad");
  r->new_empty = PyUnicode_InternFromString("new_empty");
  g_rules = r;
}

py::object owned(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}
bool truth(const py::object& object) {
  const int answer = PyObject_IsTrue(object.ptr());
  if (answer < 0) throw py::error_already_set();
  return answer != 0;
}
py::object call_method(PyObject* name, PyObject* const* arguments, std::size_t count) {  // arguments[0]: self
  return owned(PyObject_VectorcallMethod(name, arguments, count, nullptr));
}

bool setting_is_neutral(const Rules::Setting& s) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* value = nullptr;
  if (PyDict_GetItemRef(s.names, s.name, &value) < 0) throw py::error_already_set();
#else
  PyObject* value = PyDict_GetItemWithError(s.names, s.name);
  Py_XINCREF(value);
#endif
  const py::object held = owned(value);
  if (value == s.neutral) return true;
  const int same = PyObject_RichCompareBool(value, s.neutral, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same == 1;
}

// Whether nothing watches or rewrites calls.
bool eager_is_plain() {
  for (PyObject* probe : g_rules->probes)
    if (truth(owned(PyObject_CallNoArgs(probe)))) return false;
  return std::all_of(g_rules->settings.begin(), g_rules->settings.end(), setting_is_neutral);
}

bool is_plain(PyObject* x) {
  if (x == Py_None) return true;
  const auto& types = g_rules->types;
  return std::find(types.begin(), types.end(), Py_TYPE(x)) != types.end() &&
         !truth(call_method(g_rules->is_neg, &x, 1));
}

bool needs_grad(PyObject* const* tensors, int count) {
  if (!truth(owned(PyObject_CallNoArgs(g_rules->grad_enabled)))) return false;
  for (int i = 0; i < count; ++i)
    if (tensors[i] != Py_None && truth(owned(PyObject_GetAttr(tensors[i], g_rules->requires_grad)))) return true;
  return false;
}

// like.new_empty(*shape)
py::object new_empty(PyObject* like, const i64* shape, int ndim) {
  PyObject* arguments[kMaxBatchDims + 3] = {like};
  py::object held[kMaxBatchDims + 2];
  for (int i = 0; i < ndim; ++i) {
    held[i] = owned(PyLong_FromLongLong(shape[i]));
    arguments[i + 1] = held[i].ptr();
  }
  return call_method(g_rules->new_empty, arguments, static_cast<std::size_t>(ndim) + 1);
}

// Giving the lock back and taking it again costs 0.1 us: not for work of about 1 us.
template <class Body>
void run_unlocked(double products, const Body& body) {
  constexpr double kHeld = 1 << 16;
  if (products <= kHeld) {
    body();
    return;
  }
  py::gil_scoped_release release;
  body();
}

void run(GemmProblem p, Switch which = Switch::matmul) {
  p.desc.precision = asked_precision(p.desc.dtype, which);
  const GemmDesc& d = p.desc;
  run_unlocked(static_cast<double>(d.batch) * d.M * d.N * d.K, [&] { gemm(d, p.args, nullptr, 0); });
}

// The output of linear, computed; null where it does not fit.
py::object linear_output(PyObject* const* t, PyObject* packed) {
  const char* op = "fastdl.linear";
  const TensorView input = view(t[0], op, "input"), weight = view(t[1], op, "weight");
  i64 shape[kMaxBatchDims + 2];
  if (!linear_shape(input, weight, t[2], shape)) return {};
  py::object out = new_empty(t[0], shape, input.ndim);
  const TensorView result = view(out, op, "out");
  advise_huge_pages(result);
  GemmProblem p = weight_problem(result, input, weight, op);
  add_bias(&p, t[2], result, op);
  if (packed != Py_None) p.args.pack = own_pack(packed, p.desc, result, op);
  run(p);
  return out;
}

py::object matmul_output(PyObject* const* t) {
  const char* op = "fastdl.matmul";
  const TensorView a = view(t[0], op, "input"), b = view(t[1], op, "other");
  i64 shape[kMaxBatchDims + 2];
  if (!matmul_shape(a, b, shape)) return {};
  py::object out = new_empty(t[0], shape, std::max(a.ndim, b.ndim));
  const TensorView result = view(out, op, "out");
  advise_huge_pages(result);
  run(matmul_problem(result, a, b, op));
  return out;
}

// What body returns; None for null and for an error of ours: the general path says what is wrong.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    py::object out = body();
    if (out) return out.release().ptr();
  } catch (const Error&) {
  } catch (const TypeMismatch&) {
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_NONE;
}

template <class Fits, class Output>
PyObject* plain_call(PyObject* const* tensors, int count, const Fits& fits, const Output& output) {
  return guarded([&]() -> py::object {
    if (!std::all_of(tensors, tensors + count, is_plain) || !eager_is_plain()) return {};
    if (!needs_grad(tensors, count)) return output();
    return fits() ? py::object(py::bool_(true)) : py::object();
  });
}

bool arguments_are(Py_ssize_t given, Py_ssize_t expected, const char* op) {
  if (given == expected) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", op, expected, given);
  return false;
}

PyObject* plain_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!arguments_are(count, 4, "plain_linear")) return nullptr;
  return plain_call(
      args, 3,
      [&] {
        i64 shape[kMaxBatchDims + 2];
        return linear_shape(view(args[0], "", "input"), view(args[1], "", "weight"), args[2], shape);
      },
      [&] { return linear_output(args, args[3]); });
}

PyObject* plain_matmul(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!arguments_are(count, 2, "plain_matmul")) return nullptr;
  return plain_call(
      args, 2,
      [&] {
        i64 shape[kMaxBatchDims + 2];
        return matmul_shape(view(args[0], "", "input"), view(args[1], "", "other"), shape);
      },
      [&] { return matmul_output(args); });
}

PyObject* linear_result(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!arguments_are(count, 4, "linear_result")) return nullptr;
  return guarded([&] { return linear_output(args, args[3]); });
}

PyObject* matmul_result(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!arguments_are(count, 2, "matmul_result")) return nullptr;
  return guarded([&] { return matmul_output(args); });
}

bool is_matrix(const TensorView& t, i64 rows, i64 cols, DType dtype) {
  return t.ndim == 2 && t.size(0) == rows && t.size(1) == cols && t.dtype == dtype;
}
bool has_rows(const TensorView& t) { return t.size(1) == 1 || t.stride(1) == 1; }

// One step of a cell: the product with W_ih, then a sequence of one step.
py::object cell_output(PyObject* const* args) {
  constexpr std::pair<const char*, RnnCell> kModes[] = {
      {"lstm", RnnCell::lstm}, {"gru", RnnCell::gru}, {"rnn_tanh", RnnCell::plain}, {"rnn_relu", RnnCell::plain}};
  const char* op = "fastdl.rnn_cell";
  PyObject *const *t = args + 2, *const c = t[2];  // x, h, c, w_ih, w_hh, b_ih, b_hh
  if (!PyUnicode_Check(args[0]) || !PyLong_Check(args[1]) || !std::all_of(t, t + 7, is_plain) || !eager_is_plain())
    return {};
  RnnDesc d = {};
  RnnArgs a = {};
  const auto named = [&](const auto& m) { return PyUnicode_CompareWithASCIIString(args[0], m.first) == 0; };
  const auto* mode = std::find_if(std::begin(kModes), std::end(kModes), named);
  if (mode == std::end(kModes) || (c == Py_None) != (mode->second != RnnCell::lstm)) return {};
  d.cell = mode->second, a.relu = named(kModes[3]);
  const TensorView x = view(t[0], op, "input"), h = view(t[1], op, "hx"), w = view(t[4], op, "weight_hh");
  const TensorView w_ih = view(t[3], op, "weight_ih");
  if (x.ndim != 2) return {};
  int overflow = 0;
  d.T = 1, d.B = x.size(0), d.H = d.P = PyLong_AsLongLongAndOverflow(args[1], &overflow), d.dtype = x.dtype;
  const i64 gates = kGates[static_cast<int>(d.cell)] * d.H;
  i64 shape[kMaxBatchDims + 2];
  if (d.H < 1 || w.ndim != 2 || w.size(1) != d.H || !linear_shape(x, w_ih, t[5], shape) || shape[1] != gates ||
      !is_matrix(w, gates, d.H, d.dtype) || !is_matrix(h, d.B, d.H, d.dtype) || !has_rows(h))
    return {};
  if (t[6] != Py_None) {
    const TensorView b = view(t[6], op, "bias_hh");
    if (b.ndim != 1 || b.size(0) != gates || b.dtype != d.dtype) return {};
    a.bias = b.data, a.bias_step = b.stride(0);
  }
  const i64 state[] = {d.B, d.H};
  py::object out = new_empty(t[0], state, 2), out_c;
  if (c != Py_None) {
    const TensorView before = view(c, op, "cx");
    if (!is_matrix(before, d.B, d.H, d.dtype) || !has_rows(before)) return {};
    a.c0 = before.data, a.c0_row = before.stride(0);
    out_c = new_empty(t[0], state, 2);
    a.c_n = view(out_c, op, "cx").data, a.c_n_row = d.H;
  }
  const py::object x_gates = new_empty(t[0], shape, 2);
  const TensorView sums = view(x_gates, op, "gates");
  GemmProblem p = weight_problem(sums, x, w_ih, op);
  add_bias(&p, t[5], sums, op);
  run(p, Switch::rnn);
  d.w_rows = w.stride(1) == 1 || d.P == 1;
  d.precision = asked_precision(d.dtype, Switch::rnn);
  a.steps.rows = d.B;
  a.y = {view(out, op, "hx").data, d.B * d.H, d.H};
  a.x = sums.data, a.w = w.data, a.w_row = w.stride(0), a.w_col = w.stride(1);
  a.h0 = h.data, a.h0_row = h.stride(0);
  run_unlocked(static_cast<double>(d.B) * gates * d.H, [&] { rnn(d, a, nullptr, nullptr, 0); });
  return c == Py_None ? out : py::object(py::make_tuple(out, out_c));
}

PyObject* rnn_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!arguments_are(count, 9, "rnn_cell")) return nullptr;
  return guarded([&] { return cell_output(args); });
}

// pybind11 takes about 0.2 us to sort out a call's arguments; these take them as they come.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name, const char* signature) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, signature};
}

}  // namespace

void bind_plain(py::module_& m) {
  using namespace py::literals;
  m.def("plain_rules", set_rules, "types"_a, "probes"_a, "settings"_a, "grad_enabled"_a);
  m.def("eager_is_plain", eager_is_plain);
  // As pybind11 writes them, so that the stubs are compared with these too.
#define FASTDL_LINEAR "(input: object, weight: object, bias: object, packed: object, /) -> object"
  static PyMethodDef methods[] = {
      method<plain_linear>("plain_linear", "plain_linear" FASTDL_LINEAR),
      method<plain_matmul>("plain_matmul", "plain_matmul(input: object, other: object, /) -> object"),
      method<linear_result>("linear_result", "linear_result" FASTDL_LINEAR),
      method<matmul_result>("matmul_result", "matmul_result(a: object, b: object, /) -> object"),
      method<rnn_cell>("rnn_cell",
                       "rnn_cell(mode: object, H: object, x: object, h: object, c: object, w_ih: object, w_hh: object, "
                       "b_ih: object, b_hh: object, /) -> object"),
      {}};
#undef FASTDL_LINEAR
  if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw py::error_already_set();
}

}  // namespace fastdl
