// GEMM problems from tensor arguments, and the checks that every entry point shares.
#pragma once
#include <string>

#include "bind/tensor.h"
#include "gemm/gemm.h"

namespace fastdl {

struct GemmProblem {
  GemmDesc desc;
  GemmArgs args;
};

// out[..., M, N] = a[..., M, K] @ b[..., K, N]; a and b broadcast over out's leading dimensions.
GemmProblem matmul_problem(const TensorView& out, const TensorView& a, const TensorView& b, const char* op);
// out[..., N] = input[..., K] @ weight[N, K]^T
GemmProblem weight_problem(const TensorView& out, const TensorView& input, const TensorView& weight, const char* op);
// The memory of the frozen pack of a weight [N, K] for a row of the table.
void* pack_data(pybind11::handle packed, i64 K, i64 N, const GemmKernel& kernel, const TensorView& out, const char* op);
// Of the weight of desc, for the level's own row; null where it was made under another precision than now asked for.
void* own_pack(pybind11::handle packed, const GemmDesc& desc, const TensorView& out, const char* op);
// out[..., N] = input[..., K] @ B[K, N]; the caller sets B.
GemmProblem linear_problem(const TensorView& out, const TensorView& input, i64 N, const char* op);
void add_bias(GemmProblem* p, pybind11::handle bias, const TensorView& out, const char* op);
// Sets C and its row stride; desc.M and desc.N stand already.
void set_out(GemmProblem* p, const TensorView& out, const char* op);

// The leading dimensions of x (and y), merged where both step through them as through one; sizes of 1 are left out.
struct Rows {
  int dims = 0;
  i64 size[kMaxBatchDims], a[kMaxBatchDims], b[kMaxBatchDims];
};
Rows leading_rows(const TensorView& x, const TensorView* y, const char* op);

// Output shapes; false where the arguments do not fit. Room for kMaxBatchDims + 2 sizes.
bool linear_shape(const TensorView& input, const TensorView& weight, pybind11::handle bias, i64* shape);
bool matmul_shape(const TensorView& a, const TensorView& b, i64* shape);

void require_rank(const TensorView& t, int least, const char* op, const char* argument);
Activation activation_named(const std::string& name, const char* op);
Precision precision_named(const std::string& name, const char* op);
void require_threads(int threads, const char* op);
// torch's switches of how exact float32 products must be: torch.backends.mkldnn.matmul, and so on.
enum class Switch : std::uint8_t { matmul, conv, rnn };
Switch switch_named(const std::string& name, const char* op);
// How exact products of this dtype must be now: FASTDL_FLOAT32, or torch's own switch. Needs the GIL.
Precision asked_precision(DType dtype, Switch which = Switch::matmul);
const GemmKernel& pack_kernel(const std::string& name, DType dtype, const char* op);  // "": the level's own

}  // namespace fastdl
