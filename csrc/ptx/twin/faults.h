// Kernels with one bug each, of the kinds that the twin is there to catch; tests/cuda/test_cuda_twin.py runs them.
#pragma once
#include <string>
#include <vector>

namespace fastdl::twin {

std::vector<std::string> fault_names();
// Runs the kernel, its bug planted or not, over 64 floats: out[i] = in[63 - i], where no error is thrown.
void run_fault(const std::string& name, bool planted, const float* in, float* out);

}  // namespace fastdl::twin
