// The arguments of attention as Python gives them, checked: the same for every device.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>

#include "attention/attention.h"
#include "base/check.h"
#include "bind/tensor.h"

namespace fastdl {

constexpr const char* kAttentionOp = "fastdl.scaled_dot_product_attention";

// Keyword arguments that forward and backward share.
struct AttentionOptions {
  double scale;
  i64 lo, hi;
  double softcap, dropout_p;
  i64 seed;
  pybind11::object cu_seqlens_q, cu_seqlens_k;
  bool align_end;
};

// inputs() first; then what is written, which is kept apart from everything else.
class AttentionCall {
 public:
  AttentionDesc desc = {};
  AttentionArgs args = {};
  AttentionGrads grads = {};
  i64 dmask_sizes[4] = {};

  virtual ~AttentionCall() = default;

  void inputs(pybind11::handle query, pybind11::handle key, pybind11::handle value, pybind11::handle mask,
              const AttentionOptions& o) {
    AttentionDesc& d = desc;
    q_ = look(query, "query"), k_ = look(key, "key"), v_ = look(value, "value");
    if (q_.ndim != 4) fail(kOp, ": argument 'query': expected [B, H, Lq, D], got ", shape_string(q_));
    if (k_.ndim != 4) fail(kOp, ": argument 'key': expected [B, Hkv, Lk, D], got ", shape_string(k_));
    d.B = q_.size(0), d.H = q_.size(1), d.Lq = q_.size(2), d.D = q_.size(3);
    d.Hkv = k_.size(1), d.Lk = k_.size(2);
    require_head_dim(q_, "query");
    require_shape(k_, "key", {d.B, d.Hkv, d.Lk, d.D}, "batch and head dimension as query");
    if (v_.ndim != 4) fail(kOp, ": argument 'value': expected [B, Hkv, Lk, Dv], got ", shape_string(v_));
    d.Dv = v_.size(3);
    require_shape(v_, "value", {d.B, d.Hkv, d.Lk, d.Dv}, "batch, heads and length as key");
    require_head_dim(v_, "value");
    if (d.Hkv == 0 ? d.H != 0 : d.H % d.Hkv != 0)
      fail(kOp, ": argument 'key': expected a number of heads that divides query's ", d.H, ", got ", d.Hkv);
    require_dtype(k_, q_.dtype, "as query", kOp, "key");
    require_dtype(v_, q_.dtype, "as query", kOp, "value");
    constexpr i64 kMostKeys = i64{1} << 48;  // expanded keys take no memory, and sizes of scratch must not overflow
    if (d.Lk >= kMostKeys) fail(kOp, ": argument 'key': expected fewer than 2^48 keys, got ", shape_string(k_));
    d.dtype = q_.dtype;
    d.q = strides_of(q_), d.k = strides_of(k_), d.v = strides_of(v_);
    d.out = {d.H * d.Lq * d.Dv, d.Lq * d.Dv, d.Dv, 1};
    args.q = q_.data, args.k = k_.data, args.v = v_.data;
    set_packed(o);
    if (!(o.softcap >= 0)) fail(kOp, ": argument 'softcap': expected at least 0, got ", o.softcap);
    if (!(o.dropout_p >= 0 && o.dropout_p <= 1))
      fail(kOp, ": argument 'dropout_p': expected 0 to 1, got ", o.dropout_p);
    if (o.seed < 0) fail(kOp, ": argument 'seed': expected at least 0, got ", o.seed);
    d.scale = static_cast<float>(o.scale), d.softcap = static_cast<float>(o.softcap);
    d.lo = o.lo, d.hi = o.hi, d.align_end = o.align_end;
    if (d.lo > d.hi) d.lo = d.hi = INT64_MAX;  // a band without a key, so that no tile of either is seen in part
    d.dropout_p = o.dropout_p, d.seed = static_cast<std::uint64_t>(o.seed);
    set_mask(mask);
  }

  // lse: None where it is not wanted.
  void forward_outputs(pybind11::handle out_, pybind11::handle lse_) {
    const TensorView out = as_out(out_, "out");
    require_unit_columns(out, "out");
    require_writable(out, kOp);
    for (const auto& [in, name] : {std::pair{&q_, "query"}, std::pair{&k_, "key"}, std::pair{&v_, "value"}})
      require_apart(out, *in, kOp, name);
    desc.out = strides_of(out), args.out = out.data;
    if (lse_.is_none()) return;
    const TensorView lse = look(lse_, "lse");
    args.lse = lse_data(lse);
    require_apart(out, lse, kOp, "lse");
  }

  // Gradients that are None are not wanted.
  void backward_arguments(pybind11::handle dq, pybind11::handle dk, pybind11::handle dv, pybind11::handle dmask,
                          pybind11::handle dout_, pybind11::handle out_, pybind11::handle lse_) {
    const TensorView out = as_out(out_, "out"), dout = as_out(dout_, "dout"), lse = look(lse_, "lse");
    require_unit_columns(out, "out");
    desc.out = strides_of(out), args.out = out.data;
    args.lse = lse_data(lse);
    grads.dout = dout.data, grads.dout_step = strides_of(dout);
    grads.dq = grad_data(dq, "dq", q_, "as query", &grads.dq_step);
    grads.dk = grad_data(dk, "dk", k_, "as key", &grads.dk_step);
    grads.dv = grad_data(dv, "dv", v_, "as value", &grads.dv_step);
    set_dmask(dmask);
    const std::pair<const TensorView*, const char*> read[] = {{&q_, "query"}, {&k_, "key"},    {&v_, "value"},
                                                              {&out, "out"},  {&dout, "dout"}, {&lse, "lse"}};
    const std::pair<pybind11::handle, const char*> written[] = {{dq, "dq"}, {dk, "dk"}, {dv, "dv"}, {dmask, "dmask"}};
    for (const auto& [handle, name] : written) {
      if (handle.is_none()) continue;
      const TensorView t = look(handle, name);
      for (const auto& [in, in_name] : read) require_apart(t, *in, kOp, in_name, name);
      for (const auto& [other, other_name] : written)
        if (other_name != name && !other.is_none()) require_apart(t, look(other, other_name), kOp, other_name, name);
    }
  }

 protected:
  static constexpr const char* kOp = kAttentionOp;
  // A tensor where this module's kernels run.
  virtual TensorView look(pybind11::handle object, const char* name) = 0;
  virtual TensorView look_or_bool(pybind11::handle object, const char* name, bool* boolean) = 0;
  // Both given; desc.B is 1, desc.Lq and Lk are the rows of all. Sets desc.sequences, and Lq and Lk to what plans take.
  virtual void set_sequences(pybind11::handle cu_q, pybind11::handle cu_k) = 0;

 private:
  static constexpr i64 kMaxHeadDim = 256;

  static AttentionStrides strides_of(const TensorView& t) {
    const auto step = [&](int i) { return t.size(i) > 1 ? t.stride(i) : 0; };
    // The last dimension is walked even where it has one element: call it contiguous.
    return {step(0), step(1), step(2), t.size(3) > 1 ? t.stride(3) : 1};
  }

  static void require_shape(const TensorView& t, const char* argument, const i64 (&shape)[4], const char* why) {
    bool fits = t.ndim == 4;
    for (int i = 0; fits && i < 4; ++i) fits = t.size(i) == shape[i];
    if (!fits)
      fail(kOp, ": argument '", argument, "': expected shape [", shape[0], ", ", shape[1], ", ", shape[2], ", ",
           shape[3], "], ", why, ", got ", shape_string(t));
  }

  static void require_head_dim(const TensorView& t, const char* argument) {
    if (t.size(-1) < 1 || t.size(-1) > kMaxHeadDim)
      fail(kOp, ": argument '", argument, "': expected 1 to ", kMaxHeadDim, " in the last dimension, got ",
           shape_string(t));
  }

  static void require_unit_columns(const TensorView& t, const char* argument) {
    if (t.size(3) > 1 && t.numel() > 0 && t.stride(3) != 1)
      fail(kOp, ": argument '", argument, "': expected unit stride in the last dimension, got ", t.stride(3));
  }

  void set_packed(const AttentionOptions& o) {
    if (o.cu_seqlens_q.is_none() != o.cu_seqlens_k.is_none())
      fail(kOp, ": argument 'cu_seqlens_k': expected both cu_seqlens_q and cu_seqlens_k or neither");
    packed_ = !o.cu_seqlens_q.is_none();
    if (!packed_) return;
    if (desc.B != 1) fail(kOp, ": argument 'query': expected [1, H, total, D] with cu_seqlens, got ", shape_string(q_));
    desc.total_q = desc.Lq, desc.total_k = desc.Lk;
    set_sequences(o.cu_seqlens_q, o.cu_seqlens_k);
    if (desc.sequences == 0) desc.B = 0;
  }

  void set_mask(pybind11::handle mask_) {
    if (mask_.is_none()) return;
    AttentionDesc& d = desc;
    if (packed_) fail(kOp, ": argument 'mask': expected None with cu_seqlens, got a tensor");
    bool boolean = false;
    const TensorView mask = look_or_bool(mask_, "mask", &boolean);
    const bool fits = mask.ndim == 4 && (mask.size(0) == d.B || mask.size(0) == 1) &&
                      (mask.size(1) == d.H || mask.size(1) == 1) && mask.size(2) == d.Lq && mask.size(3) == d.Lk;
    if (!fits)
      fail(kOp, ": argument 'mask': expected shape [", d.B, " or 1, ", d.H, " or 1, ", d.Lq, ", ", d.Lk, "], got ",
           shape_string(mask));
    if (!boolean && mask.dtype != DType::f32) require_dtype(mask, d.dtype, "as query", kOp, "mask");
    d.mask = boolean ? MaskKind::boolean : mask.dtype == DType::f32 ? MaskKind::f32 : MaskKind::same;
    d.mask_step = strides_of(mask);
    args.mask = mask.data;
  }

  // Something of the result's shape and dtype.
  TensorView as_out(pybind11::handle object, const char* name) {
    const TensorView t = look(object, name);
    require_shape(t, name, {q_.size(0), q_.size(1), q_.size(2), v_.size(3)},
                  "as query but with the last dimension of value");
    require_dtype(t, desc.dtype, "as query", kOp, name);
    return t;
  }

  float* lse_data(const TensorView& lse) {
    bool fits = lse.ndim == 4 && lse.dtype == DType::f32 && lse.size(3) == 2;
    for (int i = 0; fits && i < 3; ++i) fits = lse.size(i) == q_.size(i);
    for (i64 i = 3, step = 1; fits && i >= 0; step *= lse.shape[i--])
      fits = lse.shape[i] <= 1 || lse.strides[i] == step || lse.numel() == 0;
    if (!fits)
      fail(kOp, ": argument 'lse': expected contiguous float32 [", q_.size(0), ", ", q_.size(1), ", ", q_.size(2),
           ", 2], got ", shape_string(lse));
    return static_cast<float*>(lse.data);
  }

  // A gradient of `of`: its shape and dtype, unit stride in the last dimension; null where None.
  void* grad_data(pybind11::handle grad_, const char* argument, const TensorView& of, const char* why,
                  AttentionStrides* step) {
    if (grad_.is_none()) return nullptr;
    const TensorView grad = look(grad_, argument);
    require_shape(grad, argument, {of.size(0), of.size(1), of.size(2), of.size(3)}, why);
    require_dtype(grad, of.dtype, "as query", kOp, argument);
    require_unit_columns(grad, argument);
    require_writable(grad, kOp, argument);
    *step = strides_of(grad);
    return grad.data;
  }

  void set_dmask(pybind11::handle dmask_) {
    if (dmask_.is_none()) return;
    const AttentionDesc& d = desc;
    if (d.mask != MaskKind::f32 && d.mask != MaskKind::same)
      fail(kOp, ": argument 'dmask': expected None without a mask that is added");
    const TensorView dmask = look(dmask_, "dmask");
    const i64 full[4] = {d.B, d.H, d.Lq, d.Lk};
    bool fits = dmask.ndim == 4;
    for (int i = 0; fits && i < 4; ++i) fits = dmask.size(i) == full[i] || dmask.size(i) == 1;
    if (!fits)
      fail(kOp, ": argument 'dmask': expected [", d.B, ", ", d.H, ", ", d.Lq, ", ", d.Lk,
           "] or 1 in the place of any of them, got ", shape_string(dmask));
    require_dtype(dmask, DType::f32, "sums of products", kOp, "dmask");
    require_writable(dmask, kOp, "dmask");
    for (int i = 0; i < 4; ++i) dmask_sizes[i] = dmask.size(i);
    const auto step = [&](int i) { return dmask.size(i) > 1 ? dmask.stride(i) : 0; };
    grads.dmask = static_cast<float*>(dmask.data);
    grads.dmask_step = {step(0), step(1), step(2), step(3)};
  }

  TensorView q_ = {}, k_ = {}, v_ = {};
  bool packed_ = false;
};

}  // namespace fastdl
