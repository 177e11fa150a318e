// The tensors of one convolution call, checked before anything is allocated: the CPU's and CUDA's.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "base/check.h"
#include "bind/conv_problem.h"
#include "bind/gemm_problem.h"
#include "conv/desc.h"

namespace fastdl {

class ConvCall : public ConvProblem {
 public:
  ConvArgs args = {};

  using ConvProblem::ConvProblem;
  virtual ~ConvCall() = default;

  void tensors(pybind11::handle x, pybind11::handle w, pybind11::handle y, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, i64 groups) {
    const ConvPass pass = desc.pass;
    const TensorView tx = add(x, names().x, pass == ConvPass::dgrad);
    const TensorView tw = add(w, names().w, pass == ConvPass::wgrad);
    const TensorView ty = add(y, names().y, pass == ConvPass::forward);
    desc.dtype = tx.dtype;
    const auto sizes = [](const TensorView& t) { return Sizes(t.shape, t.shape + t.ndim); };
    shapes(sizes(tx), sizes(tw), sizes(ty), stride, padding, dilation, groups);
    args.x = conv_tensor(tx), args.w = conv_tensor(tw), args.y = conv_tensor(ty);
    if (pass == ConvPass::wgrad) return;
    const TensorView& out = written().view;
    desc.channels_last = out.size(1) <= 1 || out.stride(1) == 1;
  }
  // Of forward and dgrad.
  void epilogue(pybind11::handle bias, const std::string& activation, pybind11::handle residual, pybind11::handle pre) {
    args.bias = channels(bias, "bias", desc.pass == ConvPass::forward ? desc.K : desc.C, false, &args.bias_step);
    args.activation = activation_named(activation, op());
    args.residual = like_written(residual, "residual", false);
    args.pre = like_written(pre, "pre", true);
  }
  void add_dbias(pybind11::handle dbias) { args.dbias = channels(dbias, "dbias", desc.K, true, &args.dbias_step); }

 protected:
  struct Argument {
    TensorView view;
    const char* name;
    bool output;
  };

  const Argument& written() const {
    return *std::find_if(arguments_.begin(), arguments_.end(), [](const Argument& a) { return a.output; });
  }
  const std::vector<Argument>& arguments() const { return arguments_; }
  // Each of the written ones apart from every other.
  void check_outputs() const {
    for (const Argument& a : arguments_) {
      if (!a.output) continue;
      require_writable(a.view, op(), a.name);
      for (const Argument& b : arguments_)
        if (&a != &b) require_apart(a.view, b.view, op(), b.name, a.name);
    }
  }

 private:
  // An argument as the kernels of this device see it.
  virtual TensorView look(pybind11::handle object, const char* name) = 0;

  TensorView add(pybind11::handle object, const char* name, bool output) {
    const TensorView t = look(object, name);
    if (!arguments_.empty()) require_dtype(t, arguments_[0].view.dtype, "as the others", op(), name);
    arguments_.push_back({t, name, output});
    return t;
  }
  // A value a channel, or null for None.
  void* channels(pybind11::handle object, const char* name, i64 count, bool output, i64* step) {
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    if (t.ndim != 1 || t.size(0) != count)
      fail(op(), ": argument '", name, "': expected shape [", count, "], got ", shape_string(t));
    *step = t.stride(0);
    return t.data;
  }
  // A tensor that lies in memory exactly as the written one does, or null for None.
  void* like_written(pybind11::handle object, const char* name, bool output) {
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    require_alike(t, written().view, op(), name, written().name);
    return t.data;
  }

  std::vector<Argument> arguments_;
};

}  // namespace fastdl
