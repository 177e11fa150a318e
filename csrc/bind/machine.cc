// _C: the machine, the build, measured peaks.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "base/check.h"
#include "base/cpu_info.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "simd/peak.h"

namespace py = pybind11;

namespace fastdl {
namespace {

std::vector<std::string> names(const std::vector<Isa>& levels) {
  std::vector<std::string> out;
  for (Isa isa : levels) out.push_back(isa_name(isa));
  return out;
}

// FASTDL_ISA_MISSING: "level=reason;level=reason", from the build.
py::dict missing_levels() {
  py::dict out;
  const std::string text = FASTDL_ISA_MISSING;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find(';', at), text.size()), eq = text.find('=', at);
    if (eq < end) out[py::str(text.substr(at, eq - at))] = text.substr(eq + 1, end - eq - 1);
    at = end + 1;
  }
  return out;
}

py::dict build_info() {
  std::vector<Isa> compiled;
  for (int i = 0; i < kIsaLevels; ++i)
    if (isa_compiled(static_cast<Isa>(i))) compiled.push_back(static_cast<Isa>(i));
  py::dict cuda, out;
  cuda["built"] = std::string(FASTDL_CUDA_REASON).empty();
  cuda["reason"] = FASTDL_CUDA_REASON;
#if defined(__clang__)
  out["compiler"] = __VERSION__;
#else
  out["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  out["openmp"] = true;
#else
  out["openmp"] = false;
#endif
  out["isa_compiled"] = names(compiled);
  out["isa_missing"] = missing_levels();
  out["amx_emulated"] = amx_emulated();
  out["cuda"] = cuda;
  return out;
}

py::dict machine_info() {
  const CpuInfo& cpu = cpu_info();
  py::dict out;
  out["vendor"] = cpu.vendor;
  out["brand"] = cpu.brand;
  out["isa_supported"] = names(cpu.supported);
  out["isa"] = isa_name(cpu.isa);
  out["isa_cap"] = cpu.cap;
  out["l1d"] = cpu.l1d;
  out["l2"] = cpu.l2;
  out["l3"] = cpu.l3;
  out["cpus"] = usable_cpus();
  return out;
}

}  // namespace

Machine machine_named(const std::string& isa, int threads, const char* op) {
  Machine machine = this_machine(threads);
  if (!isa.empty() && !parse_isa(isa, &machine.isa)) fail(op, ": argument 'isa': no level '", isa, "'");
  return machine;
}

void bind_machine(py::module_& m) {
  using namespace py::literals;
  m.def("build_info", build_info);
  m.def("cpu_info", machine_info);
  m.def(
      "threads",
      [](int requested) {
        const Team team = current_team(requested);
        return py::make_tuple(team.threads, team.why);
      },
      "requested"_a = 0);
  m.def(
      "measure_fma",
      [](const std::string& name, int threads, double seconds) {
        const Isa isa = machine_named(name, threads, "fastdl.measure_fma").isa;
        py::gil_scoped_release release;
        return measure_fma(isa, threads, seconds);
      },
      "isa"_a = "", "threads"_a = 0, "seconds"_a = 0.1);
  m.def("measure_amx", measure_amx, py::call_guard<py::gil_scoped_release>(), "threads"_a = 0, "seconds"_a = 0.1);
  m.def("measure_read_bandwidth", measure_read, py::call_guard<py::gil_scoped_release>(), "bytes_per_thread"_a,
        "threads"_a = 0, "seconds"_a = 0.1);
}

}  // namespace fastdl
