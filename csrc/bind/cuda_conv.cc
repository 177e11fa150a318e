// CUDA convolution and its gradients: the native calls of the CPU (bind/conv.cc) with workspace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "bind/conv_call.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "bind/gemm_problem.h"
#include "conv/cuda/plan.h"

namespace py = pybind11;

namespace fastdl {
namespace {

class Call : public ConvCall {
 public:
  using ConvCall::ConvCall;

  void run(const std::string& precision, py::handle workspace, const std::string& kernel) {
    const CudaConvKernel* forced = forced_row(cuda_conv_kernels(), kernel, op());
    desc.precision = precision_named(precision, op());
    check_outputs();
    const CudaConvPlan plan = cuda_conv_plan(desc, gpu_info(device_), forced);
    void* const memory = workspace_memory(workspace, plan.workspace_bytes(), &device_, op());
    const Stream stream = current_stream(device_, op());
    if (log_enabled()) {
      std::string line = "cuda " + describe(desc, plan);
      for (const std::string& c : cuda_conv_candidates(desc, plan)) line += "\n    not " + c;
      log_once(line);
    }
    py::gil_scoped_release release;
    cuda_conv_run(desc, plan, args, memory, stream);
  }

 private:
  TensorView look(py::handle object, const char* name) override { return device_view(object, &device_, op(), name); }

  int device_ = -1;
};

int spatial(py::handle x, const char* op, const char* name) {
  int device = -1;
  return conv_spatial(device_view(x, &device, op, name), op, name);
}

void run_gather(ConvPass pass, py::handle x, py::handle w, py::handle y, py::handle bias, const Sizes& stride,
                const Sizes& padding, const Sizes& dilation, i64 groups, const std::string& activation,
                py::handle residual, py::handle pre, const std::string& precision, py::handle workspace,
                const std::string& kernel) {
  const bool forward = pass == ConvPass::forward;
  Call c(pass, spatial(forward ? x : y, forward ? "fastdl.conv" : "fastdl.conv_dgrad", forward ? "input" : "grad"));
  c.tensors(x, w, y, stride, padding, dilation, groups);
  c.epilogue(bias, activation, residual, pre);
  c.run(precision, workspace, kernel);
}

void run_forward(py::handle y, py::handle x, py::handle w, py::handle bias, const Sizes& stride, const Sizes& padding,
                 const Sizes& dilation, i64 groups, const std::string& activation, py::handle residual, py::handle pre,
                 const std::string& precision, py::handle workspace, const std::string& kernel) {
  run_gather(ConvPass::forward, x, w, y, bias, stride, padding, dilation, groups, activation, residual, pre, precision,
             workspace, kernel);
}

void run_dgrad(py::handle dx, py::handle dy, py::handle w, py::handle bias, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups, const std::string& activation, py::handle residual, py::handle pre,
               const std::string& precision, py::handle workspace, const std::string& kernel) {
  run_gather(ConvPass::dgrad, dx, w, dy, bias, stride, padding, dilation, groups, activation, residual, pre, precision,
             workspace, kernel);
}

void run_wgrad(py::handle dw, py::handle dy, py::handle x, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups, py::handle dbias, const std::string& precision, py::handle workspace,
               const std::string& kernel) {
  Call c(ConvPass::wgrad, spatial(x, "fastdl.conv_wgrad", "input"));
  c.tensors(x, dw, dy, stride, padding, dilation, groups);
  c.add_dbias(dbias);
  c.run(precision, workspace, kernel);
}

// The problem of a plan alone: no tensors.
ConvProblem shapes_of(const std::string& pass, const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride,
                      const Sizes& padding, const Sizes& dilation, i64 groups, const char* op) {
  ConvProblem c(conv_pass_named(pass, op), static_cast<int>(x.size()) - 2);
  for (const Sizes* sizes : {&x, &w, &y})
    for (i64 n : *sizes)
      if (n < 0) fail(op, ": expected sizes of at least 0, got ", list(*sizes));
  c.shapes(x, w, y, stride, padding, dilation, groups);
  return c;
}

py::dict plan_shape(const std::string& pass, const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation, i64 groups, const std::string& dtype,
                    bool channels_last, const std::string& precision, const std::string& gpu, int device,
                    const std::string& kernel) {
  const char* op = "fastdl.conv_plan";
  ConvProblem c = shapes_of(pass, x, w, y, stride, padding, dilation, groups, op);
  c.desc.dtype = dtype_named(dtype, op), c.desc.channels_last = channels_last;
  c.desc.precision = precision_named(precision, op);
  const Gpu target = gpu.empty() ? gpu_info(device) : gpu_named(gpu);
  const CudaConvPlan p = cuda_conv_plan(c.desc, target, forced_row(cuda_conv_kernels(), kernel, op));
  py::dict out;
  out["op"] = "conv";
  out["pass"] = pass;
  out["kernel"] = p.kernel->name;
  out["schedule"] = cuda_conv_kind_name(p.kernel->kind);
  out["tile"] = py::make_tuple(p.kernel->tile_m, p.kernel->tile_n, p.kernel->tile_k);
  out["phases"] = p.phases;
  out["merged"] = p.merged;
  out["tiles"] = p.tiles;
  out["grid"] = py::make_tuple(p.grid[0], p.grid[1], p.grid[2]);
  out["chunks"] = p.chunks;
  out["pack_bytes"] = p.pack_bytes;
  out["partial_bytes"] = p.partial_bytes;
  out["workspace_bytes"] = p.workspace_bytes();
  out["why"] = p.why;
  out["text"] = describe(c.desc, p);
  out["candidates"] = cuda_conv_candidates(c.desc, p);
  return out;
}

// --- index arithmetic, for tests --------------------------------------------------------------------------------
// (written pixels in order of phase and row: [n, z...]; for each row and tap in order: the tap of the kernel, the
// position read; -1 where it is outside).
py::list coordinates(const std::string& pass, const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride,
                     const Sizes& padding, const Sizes& dilation, i64 groups) {
  const ConvDesc d = shapes_of(pass, x, w, y, stride, padding, dilation, groups, "fastdl.conv_coordinates").desc;
  const CudaConvPlan p = cuda_conv_plan(d, gpu_named("sm80"));
  const bool dgrad = d.pass == ConvPass::dgrad;
  const i64(&read)[3] = dgrad ? d.out : d.in;
  const i64(&written)[3] = dgrad ? d.in : d.out;
  // Tensors whose element number says where it lies: the position alone, channels far apart.
  GatherSource source = {};
  i64 written_step[3], weight_step[3], pixels = 1, positions = 1, taps = 1;
  for (int i = 2; i >= 0; --i) {
    source.size[i] = static_cast<int>(read[i]), source.step[i] = positions, positions *= read[i];
    written_step[i] = pixels, pixels *= written[i];
    weight_step[i] = taps, taps *= d.kernel[i];
  }
  source.n_step = positions, source.c_step = positions * d.N;
  source.by_channels = fast_div(std::max(1, p.channels));
  py::list rows;
  for (int i = 0; i < p.phases; ++i) {
    const GatherPhase& phase = p.phase[i];
    for (int m = 0; m < phase.pixels; ++m) {
      const GatherRow row = gather_row(phase, source, m);
      py::list reads;
      for (int k = 0; k < phase.depth; ++k) {
        const GatherCol col = gather_col(phase, source, k);
        reads.append(py::make_tuple(weight_offset(phase, weight_step, k / p.channels), k % p.channels,
                                    inside(source, row, col) ? row.offset + col.offset : -1));
      }
      rows.append(py::make_tuple(written_offset(phase, written_step, pixels, m), reads));
    }
  }
  return rows;
}

// Which (phase, tile of rows, tile of columns) each block of the grid takes.
py::list tiles(const std::string& pass, const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride,
               const Sizes& padding, const Sizes& dilation, i64 groups, const std::string& dtype,
               const std::string& kernel) {
  const char* op = "fastdl.conv_tiles";
  ConvProblem c = shapes_of(pass, x, w, y, stride, padding, dilation, groups, op);
  c.desc.dtype = dtype_named(dtype, op);
  const CudaConvPlan p = cuda_conv_plan(c.desc, gpu_named("sm80"), &row_named(cuda_conv_kernels(), kernel, op));
  py::list out;
  for (int i = 0; i < p.tiles; ++i) {
    const GatherTile t = gather_tile(p.phase, p.phases, p.tiles_n, i);
    out.append(py::make_tuple(t.phase, t.m, t.n));
  }
  return out;
}

// Of tensors of these shapes, contiguous or channels_last: in which elements pixel `m` of phase `phase` is written, its
// k-th product read, and that one's weight lies, each from its tensor's first on; -1 for what lies outside.
py::tuple places(const std::string& pass, const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride,
                 const Sizes& padding, const Sizes& dilation, bool channels_last, int phase, int m, int k) {
  const char* op = "fastdl.conv_places";
  const ConvDesc d = shapes_of(pass, x, w, y, stride, padding, dilation, 1, op).desc;
  const CudaConvPlan p = cuda_conv_plan(d, gpu_named("sm80"));
  if (phase < 0 || phase >= p.phases) fail(op, ": expected a phase below ", p.phases, ", got ", phase);
  const GatherPhase& at = p.phase[phase];
  if (m < 0 || m >= at.pixels || k < 0 || k >= at.depth)
    fail(op, ": expected m < ", at.pixels, " and k < ", at.depth, ", got ", m, " and ", k);
  const auto steps = [channels_last](i64 channels, const i64(&size)[3]) {
    ConvTensor t = {};
    i64 step = channels_last ? channels : 1;
    for (int i = 2; i >= 0; --i) t.step[i] = step, step *= size[i];
    t.c_step = channels_last ? 1 : step, t.n_step = channels_last ? step : step * channels;
    return t;
  };
  const bool dgrad = d.pass == ConvPass::dgrad;
  const i64(&size)[3] = dgrad ? d.out : d.in;
  const ConvTensor read = steps(dgrad ? d.K : d.C, size), written = steps(dgrad ? d.C : d.K, dgrad ? d.in : d.out);
  const ConvTensor weight = steps(d.C, d.kernel);
  const GatherSource source = {{static_cast<int>(size[0]), static_cast<int>(size[1]), static_cast<int>(size[2])},
                               read.n_step,
                               read.c_step,
                               {read.step[0], read.step[1], read.step[2]},
                               fast_div(std::max(1, p.channels))};
  const GatherRow row = gather_row(at, source, m);
  const GatherCol col = gather_col(at, source, k);
  const i64 channel = k % p.channels * (dgrad ? weight.n_step : weight.c_step);
  return py::make_tuple(written_offset(at, written.step, written.n_step, m),
                        inside(source, row, col) ? row.offset + col.offset : -1,
                        channel + weight_offset(at, weight.step, k / p.channels));
}

int divide_fast(int n, int divisor) {
  if (n < 0 || divisor < 1) fail("fastdl.divide_fast: expected n >= 0 and divisor >= 1, got ", n, " and ", divisor);
  return fast_div(divisor).quotient(n);
}

py::list kernel_rows() {
  py::list out;
  for (const CudaConvKernel& k : cuda_conv_kernels()) {
    py::dict row;
    row["name"] = k.name;
    row["isa"] = "sm80";
    row["dtype"] = torch_name(k.dtype);
    row["precision"] = precision_name(k.precision);
    row["kind"] = cuda_conv_kind_name(k.kind);
    row["tile"] = py::make_tuple(k.tile_m, k.tile_n, k.tile_k);
    row["threads"] = k.threads;
    out.append(row);
  }
  return out;
}

}  // namespace

void bind_cuda_conv(py::module_& m) {
  using namespace py::literals;
  add_kernel_rows("conv", kernel_rows);
  m.def("conv", run_forward, "y"_a, "x"_a, "w"_a, "bias"_a = py::none(), py::kw_only(), "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a = 1, "activation"_a = "none", "residual"_a = py::none(), "pre"_a = py::none(),
        "precision"_a = "ieee", "workspace"_a = py::none(), "kernel"_a = "");
  m.def("conv_dgrad", run_dgrad, "dx"_a, "dy"_a, "w"_a, "bias"_a = py::none(), py::kw_only(), "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a = 1, "activation"_a = "none", "residual"_a = py::none(), "pre"_a = py::none(),
        "precision"_a = "ieee", "workspace"_a = py::none(), "kernel"_a = "");
  m.def("conv_wgrad", run_wgrad, "dw"_a, "dy"_a, "x"_a, py::kw_only(), "stride"_a, "padding"_a, "dilation"_a,
        "groups"_a = 1, "dbias"_a = py::none(), "precision"_a = "ieee", "workspace"_a = py::none(), "kernel"_a = "");
  m.def("conv_plan", plan_shape, "pass_"_a, "x_shape"_a, "w_shape"_a, "y_shape"_a, py::kw_only(), "stride"_a,
        "padding"_a, "dilation"_a, "groups"_a = 1, "dtype"_a = "float32", "channels_last"_a = true,
        "precision"_a = "ieee", "gpu"_a = "", "device"_a = 0, "kernel"_a = "");
  m.def("conv_coordinates", coordinates, "pass_"_a, "x_shape"_a, "w_shape"_a, "y_shape"_a, py::kw_only(), "stride"_a,
        "padding"_a, "dilation"_a, "groups"_a = 1);
  m.def("conv_tiles", tiles, "pass_"_a, "x_shape"_a, "w_shape"_a, "y_shape"_a, py::kw_only(), "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a = 1, "dtype"_a, "kernel"_a);
  m.def("conv_places", places, "pass_"_a, "x_shape"_a, "w_shape"_a, "y_shape"_a, py::kw_only(), "stride"_a, "padding"_a,
        "dilation"_a, "channels_last"_a, "phase"_a, "m"_a, "k"_a);
  m.def("divide_fast", divide_fast, "n"_a, "divisor"_a);
}

}  // namespace fastdl
