#include "bind/gemm_problem.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace py = pybind11;

namespace fastdl {
namespace {

// Appends a batch dimension; dimensions of one element are left out.
void add_batch(GemmProblem* p, i64 size, i64 a, i64 b, i64 c, const char* op) {
  p->desc.batch *= size;
  if (size == 1) return;
  GemmBatch& batch = p->args.batch;
  if (batch.dims == kMaxBatchDims) fail(op, ": expected at most ", kMaxBatchDims, " batch dimensions, got more");
  const int i = batch.dims++;
  batch.size[i] = size, batch.a[i] = a, batch.b[i] = b, batch.c[i] = c;
}

}  // namespace

void require_rank(const TensorView& t, int least, const char* op, const char* argument) {
  if (t.ndim < least)
    fail(op, ": argument '", argument, "': expected at least ", least, " dimension", least > 1 ? "s" : "",
         ", got shape ", shape_string(t));
}

void set_out(GemmProblem* p, const TensorView& out, const char* op) {
  const i64 N = p->desc.N;
  if (N > 1 && out.numel() > 0 && out.stride(-1) != 1)
    fail(op, ": argument 'out': expected unit stride in the last dimension, got ", out.stride(-1));
  require_writable(out, op);
  p->args.c = out.data;
  p->args.c_row = out.ndim > 1 && p->desc.M > 1 ? out.stride(-2) : N;
}

GemmProblem matmul_problem(const TensorView& out, const TensorView& a, const TensorView& b, const char* op) {
  require_rank(out, 2, op, "out");
  require_rank(a, 2, op, "a");
  require_rank(b, 2, op, "b");
  GemmProblem p = {};
  GemmDesc& d = p.desc;
  d.batch = d.pairs = 1, d.dtype = a.dtype;
  require_dtype(b, a.dtype, "as a", op, "b");
  require_dtype(out, a.dtype, "as a", op, "out");
  d.M = a.size(-2), d.K = a.size(-1), d.N = b.size(-1);
  d.a_row = a.stride(-2), d.a_col = a.stride(-1), d.b_row = b.stride(-2), d.b_col = b.stride(-1);
  if (b.size(-2) != d.K)
    fail(op, ": argument 'b': expected ", d.K, " rows to match the columns of a ", shape_string(a), ", got ",
         shape_string(b));
  if (out.size(-2) != d.M || out.size(-1) != d.N)
    fail(op, ": argument 'out': expected [..., ", d.M, ", ", d.N, "], got ", shape_string(out));
  for (const auto& [t, name] : {std::pair{&a, "a"}, std::pair{&b, "b"}}) {
    if (t->ndim > out.ndim)
      fail(op, ": argument '", name, "': expected at most ", out.ndim, " dimensions, got ", t->ndim);
    for (int i = 3; i <= t->ndim; ++i)
      if (t->size(-i) != 1 && t->size(-i) != out.size(-i))
        fail(op, ": argument '", name, "': expected batch dimensions that broadcast to out ", shape_string(out),
             ", got ", shape_string(*t));
  }
  const auto step = [](const TensorView& t, int i) { return i <= t.ndim && t.size(-i) > 1 ? t.stride(-i) : 0; };
  for (int i = out.ndim; i >= 3; --i) add_batch(&p, out.size(-i), step(a, i), step(b, i), out.stride(-i), op);
  set_out(&p, out, op);
  require_apart(out, a, op, "a");
  require_apart(out, b, op, "b");
  p.args.a = a.data;
  p.args.b = b.data;
  return p;
}

GemmProblem linear_problem(const TensorView& out, const TensorView& input, i64 N, const char* op) {
  require_rank(input, 1, op, "input");
  GemmProblem p = {};
  GemmDesc& d = p.desc;
  d.batch = d.pairs = 1, d.dtype = input.dtype;
  require_dtype(out, input.dtype, "as input", op, "out");
  d.K = input.size(-1), d.N = N;
  d.M = input.ndim > 1 ? input.size(-2) : 1;
  d.a_col = input.stride(-1);
  d.a_row = input.ndim > 1 ? input.stride(-2) : 1;
  bool fits = out.ndim == input.ndim && out.size(-1) == N;
  for (int i = 2; fits && i <= input.ndim; ++i) fits = out.size(-i) == input.size(-i);
  if (!fits)
    fail(op, ": argument 'out': expected the shape of input ", shape_string(input), " but ", N, " columns, got ",
         shape_string(out));
  for (int i = input.ndim; i >= 3; --i) add_batch(&p, input.size(-i), input.stride(-i), 0, out.stride(-i), op);
  set_out(&p, out, op);
  require_apart(out, input, op, "input");
  p.args.a = input.data;
  return p;
}

GemmProblem weight_problem(const TensorView& out, const TensorView& input, const TensorView& w, const char* op) {
  require_rank(input, 1, op, "input");
  if (w.ndim != 2 || w.size(1) != input.size(-1))
    fail(op, ": argument 'weight': expected shape [N, ", input.size(-1), "] to match input ", shape_string(input),
         ", got ", shape_string(w));
  require_dtype(w, input.dtype, "as input", op, "weight");
  GemmProblem p = linear_problem(out, input, w.size(0), op);
  require_apart(out, w, op, "weight");
  p.args.b = w.data;
  p.desc.b_row = w.stride(1);
  p.desc.b_col = w.stride(0);
  return p;
}

bool matmul_shape(const TensorView& a, const TensorView& b, i64* shape) {
  const int ndim = std::max(a.ndim, b.ndim);
  if (a.ndim < 2 || b.ndim < 2 || ndim > kMaxBatchDims + 2 || a.size(-1) != b.size(-2) || a.dtype != b.dtype)
    return false;
  shape[ndim - 2] = a.size(-2);
  shape[ndim - 1] = b.size(-1);
  for (int i = 3; i <= ndim; ++i) {
    const i64 na = i <= a.ndim ? a.size(-i) : 1, nb = i <= b.ndim ? b.size(-i) : 1;
    if (na != nb && na != 1 && nb != 1) return false;
    shape[ndim - i] = na == 1 ? nb : na;
  }
  return true;
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

Precision precision_named(const std::string& name, const char* op) {
  for (Precision p : {Precision::fma, Precision::ieee, Precision::tf32, Precision::bf16})
    if (name == precision_name(p)) return p;
  fail(op, ": argument 'precision': expected fma, ieee, tf32 or bf16, got '", name, "'");
}

void require_threads(int threads, const char* op) {
  if (threads < 0) fail(op, ": argument 'threads': expected at least 0, got ", threads);
}

Rows leading_rows(const TensorView& x, const TensorView* y, const char* op) {
  Rows r;
  for (int i = 0; i + 1 < x.ndim; ++i) {
    const i64 size = x.shape[i], a = x.strides[i], b = y ? y->strides[i] : 0;
    const int o = r.dims - 1;  // the dimension around this one
    if (size == 1) continue;
    if (o >= 0 && r.a[o] == a * size && r.b[o] == b * size) {
      r.size[o] *= size, r.a[o] = a, r.b[o] = b;
    } else {
      if (r.dims == kMaxBatchDims) fail(op, ": expected at most ", kMaxBatchDims, " leading dimensions, got more");
      r.size[r.dims] = size, r.a[r.dims] = a, r.b[r.dims++] = b;
    }
  }
  return r;
}

}  // namespace fastdl
