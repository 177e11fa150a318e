// _twin: the scheduler of the host twin, and kernels with planted bugs that it must catch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/check.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "ptx/launch.h"
#include "ptx/twin/faults.h"
#include "ptx/twin/fiber.h"

namespace py = pybind11;

namespace fastdl {
namespace {

py::tuple take_counts() {
  const twin::Counts counts = twin::counts();
  twin::counts() = {};
  return py::make_tuple(counts.conflicts, counts.collectives);
}

void run_fault(const std::string& name, bool planted, py::handle in, py::handle out) {
  int device = -1;
  const TensorView x = device_view(in, &device, "run_fault", "in"), y = device_view(out, &device, "run_fault", "out");
  for (const TensorView& t : {x, y})
    if (t.dtype != DType::f32 || t.ndim != 1 || t.size(0) != 64 || t.stride(0) != 1)
      fail("run_fault: expected tensors of 64 float32, got shape ", shape_string(t));
  twin::run_fault(name, planted, static_cast<const float*>(x.data), static_cast<float*>(y.data));
}

struct NoArgs {};
void nothing(const NoArgs) {}

void try_launch(int x, int y, int z, int threads, int shared_bytes) {
  launch(nothing, {{x, y, z}, threads, shared_bytes}, {}, NoArgs{});
}

}  // namespace

void bind_twin(py::module_& m) {
  m.def("set_seed", &twin::set_seed, py::arg("seed"),
        "The order in which the threads of a block run: 0 one after the other, else random from this seed.");
  m.def("take_counts", &take_counts, "(bank conflicts of ldmatrix, warp instructions) since the last call.");
  m.def("fault_names", &twin::fault_names, "Kernels that `run_fault` takes.");
  m.def("run_fault", &run_fault, py::arg("name"), py::arg("planted"), py::arg("in_"), py::arg("out"),
        "out[i] = in_[63 - i], with a bug of the named kind planted or not.");
  m.def("try_launch", &try_launch, py::arg("x"), py::arg("y"), py::arg("z"), py::arg("threads"),
        py::arg("shared_bytes"), "Launches a kernel that does nothing.");
}

}  // namespace fastdl
