#include "bind/conv_problem.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace fastdl {
namespace {

bool product(i64 a, i64 b, i64* out) { return !__builtin_mul_overflow(a, b, out); }

}  // namespace

std::string list(const Sizes& x) {
  std::string s = "[";
  for (std::size_t i = 0; i < x.size(); ++i) s += (i ? ", " : "") + std::to_string(x[i]);
  return s + "]";
}

ConvProblem::ConvProblem(ConvPass pass, int dims) : dims_(dims) {
  desc.pass = pass;
  constexpr const char* kSuffix[] = {"", "_dgrad", "_wgrad"};
  op_ = concat("fastdl.conv", dims, "d", kSuffix[static_cast<int>(pass)]);
}

void ConvProblem::shapes(const Sizes& x, const Sizes& w, const Sizes& y, const Sizes& stride, const Sizes& padding,
                         const Sizes& dilation, i64 groups) {
  const auto rank = static_cast<std::size_t>(dims_ + 2);
  if (dims_ < 1 || dims_ > 3) wrong(names().x, "3 to 5 dimensions", x);
  if (x.size() != rank) wrong(names().x, concat(rank, " dimensions"), x);
  if (w.size() != rank) wrong(names().w, concat(rank, " dimensions"), w);
  if (y.size() != rank) wrong(names().y, concat(rank, " dimensions"), y);
  if (groups < 1) fail(op(), ": argument 'groups': expected at least 1, got ", groups);
  const int first = 3 - dims_;
  per_dimension(stride, "stride", 1, 1, desc.stride);
  per_dimension(padding, "padding", 0, 0, desc.pad);
  per_dimension(dilation, "dilation", 1, 1, desc.dilation);
  desc.N = x[0], desc.C = x[1], desc.K = w[0], desc.groups = groups;
  if (desc.C % groups != 0) wrong(names().x, concat("channels that ", groups, " groups divide"), x);
  if (desc.K % groups != 0) wrong(names().w, concat("output channels that ", groups, " groups divide"), w);
  if (w[1] != desc.C / groups) wrong(names().w, concat("[", desc.K, ", ", desc.C / groups, ", ...]"), w);
  if (y[0] != desc.N || y[1] != desc.K) wrong(names().y, concat("[", desc.N, ", ", desc.K, ", ...]"), y);
  for (int i = 0; i < 3; ++i) {
    const bool there = i >= first;
    const auto at = static_cast<std::size_t>(there ? i - first + 2 : 0);
    desc.in[i] = there ? x[at] : 1, desc.out[i] = there ? y[at] : 1, desc.kernel[i] = there ? w[at] : 1;
    if (desc.kernel[i] < 1) wrong(names().w, "a kernel of at least 1 in each dimension", w);
    // Nothing computed from these may overflow: every position that a tap can have, and twice that.
    constexpr i64 kMost = i64{1} << 60;
    i64 reach, span;
    if (!product(desc.kernel[i] - 1, desc.dilation[i], &reach) || reach > kMost)
      fail(op(), ": argument 'dilation': expected a kernel of less than 2^60 positions, got ", desc.dilation[i],
           " with a kernel of ", desc.kernel[i]);
    if (desc.pad[i] > kMost) fail(op(), ": argument 'padding': expected at most 2^60, got ", desc.pad[i]);
    if (!product(std::max<i64>(1, desc.out[i]), desc.stride[i], &span) || span > kMost)
      fail(op(), ": argument 'stride': expected outputs within 2^60 positions, got ", desc.stride[i], " with ",
           desc.out[i], " outputs");
    // The last kernel ends where the padded image does, or less than a stride before.
    if (desc.out[i] < 1) continue;
    const i64 end = (desc.out[i] - 1) * desc.stride[i] + reach + 1 - desc.pad[i];  // of the last kernel
    if (end <= desc.in[i] - desc.stride[i] || desc.in[i] > kMost)
      fail(op(), ": argument '", names().y, "': expected all ", dims_, " spatial sizes to follow from ", names().x, " ",
           list(x), ", ", names().w, " ", list(w), ", stride ", list(stride), ", padding ", list(padding),
           " and dilation ", list(dilation), ", got ", list(y));
  }
  i64 size = 4;
  for (i64 n : {desc.K, std::max<i64>(1, desc.C), desc.kernel[0], desc.kernel[1], desc.kernel[2], i64{64}})
    if (!product(size, std::max<i64>(1, n), &size)) wrong(names().w, "fewer than 2^56 elements", w);
  size = 4;
  for (i64 n : {desc.N, std::max(desc.C, desc.K), desc.out[0], desc.out[1], desc.out[2], i64{64}})
    if (!product(size, std::max<i64>(1, n), &size)) wrong(names().y, "fewer than 2^56 elements", y);
  size = 4;
  for (i64 n : {desc.N, std::max(desc.C, desc.K), desc.in[0], desc.in[1], desc.in[2], i64{64}})
    if (!product(size, std::max<i64>(1, n), &size)) wrong(names().x, "fewer than 2^56 elements", x);
}

const ConvProblem::Names& ConvProblem::names() const {
  static constexpr Names kNames[] = {{"input", "weight", "out"}, {"out", "weight", "grad"}, {"input", "out", "grad"}};
  return kNames[static_cast<int>(desc.pass)];
}

void ConvProblem::wrong(const char* name, const std::string& expected, const Sizes& got) const {
  fail(op(), ": argument '", name, "': expected ", expected, ", got ", list(got));
}

void ConvProblem::per_dimension(const Sizes& values, const char* name, i64 least, i64 missing, i64* out) const {
  if (static_cast<int>(values.size()) != dims_)
    fail(op(), ": argument '", name, "': expected ", dims_, " integers, got ", list(values));
  for (int i = 0; i < 3; ++i) out[i] = i < 3 - dims_ ? missing : values[static_cast<std::size_t>(i - 3 + dims_)];
  for (i64 v : values)
    if (v < least) fail(op(), ": argument '", name, "': expected at least ", least, ", got ", list(values));
}

int conv_spatial(const TensorView& t, const char* op, const char* name) {
  if (t.ndim < 3 || t.ndim > 5) fail(op, ": argument '", name, "': expected 3 to 5 dimensions, got ", shape_string(t));
  return t.ndim - 2;
}

ConvTensor conv_tensor(const TensorView& t) {
  ConvTensor c = {t.data, t.stride(0), t.stride(1), {0, 0, 0}};
  const int dims = t.ndim - 2;
  for (int i = 0; i < dims; ++i) c.step[3 - dims + i] = t.stride(2 + i);
  return c;
}

ConvPass conv_pass_named(const std::string& name, const char* op) {
  for (ConvPass p : {ConvPass::forward, ConvPass::dgrad, ConvPass::wgrad})
    if (name == conv_pass_name(p)) return p;
  fail(op, ": argument 'pass_': expected forward, dgrad or wgrad, got '", name, "'");
}

}  // namespace fastdl
