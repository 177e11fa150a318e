// Sizes and options of a convolution as Python gives them, checked before anything is allocated: the CPU's and CUDA's.
#pragma once
#include <string>
#include <vector>

#include "bind/tensor.h"
#include "conv/desc.h"

namespace fastdl {

using Sizes = std::vector<i64>;
std::string list(const Sizes& x);

class ConvProblem {
 public:
  ConvDesc desc = {};

  // dims: spatial dimensions; the names of what x, w and y are called in messages.
  ConvProblem(ConvPass pass, int dims);

  const char* op() const { return op_.c_str(); }

  // Fills the sizes from the shapes [N, C, in], [K, C/groups, kernel], [N, K, out].
  void shapes(const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, i64 groups);

 protected:
  struct Names {
    const char *x, *w, *y;
  };
  const Names& names() const;

 private:
  [[noreturn]] void wrong(const char* name, const std::string& expected, const Sizes& got) const;
  void per_dimension(const Sizes& values, const char* name, i64 least, i64 missing, i64* out) const;

  int dims_;
  std::string op_;
};

int conv_spatial(const TensorView& x, const char* op, const char* name);  // its spatial dimensions: 1 to 3
ConvTensor conv_tensor(const TensorView& x);
ConvPass conv_pass_named(const std::string& name, const char* op);

}  // namespace fastdl
