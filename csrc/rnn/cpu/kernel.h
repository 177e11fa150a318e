// The recurrent microkernels, written once over a vector level: L multiplies (pairs where its fma does), E is the plain
// level for the rest, T the dtype in memory, S the form of h that products read.
#pragma once
#include "gemm/cpu/kernel.h"
#include "rnn/cpu/kernel_args.h"

namespace fastdl {
namespace {

template <class L, int MR, int NV>
struct PanelTable {
  void (*fn[MR])(const TileArgs&) = {};
  constexpr PanelTable() { rows<MR>(); }
  template <int M>
  constexpr void rows() {
    fn[M - 1] = tile<L, M, NV, false, false>;
    if constexpr (M > 1) rows<M - 1>();
  }
};

// m <= MR rows against a whole panel of NV vectors.
template <class L, int MR, int NV>
void run_panel(const TileArgs& t) {
  static constexpr PanelTable<L, MR, NV> table;
  table.fn[t.m - 1](t);
}

// dst[step*stride + j] for one vector of columns: column j is w[j*w_row + k*w_col], zeros past n columns. kPairs: a
// step is the elements 2k and 2k+1 side by side.
template <class L, class T, bool kPairs>
void pack_vector(const T* w, i64 w_row, i64 w_col, int n, i64 K, i64 stride, float* dst) {
  constexpr int W = L::width, kUnit = kPairs ? 2 : 1;
  if (w_col == 1) {  // transpose blocks of W columns x W steps
    for (i64 k = 0; k < K; k += W * kUnit) {
      const int elements = K - k < W * kUnit ? static_cast<int>(K - k) : W * kUnit;
      typename L::V r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const T* p = w + i * w_row + k;
        if (i >= n) {
          r[i] = L::zero();
        } else if constexpr (kPairs) {
          r[i] = L::pairs(p, elements);
        } else {
          r[i] = elements == W ? L::load(p) : L::load(p, L::first(elements));
        }
      }
      L::transpose(r);
      float* d = dst + k / kUnit * stride;
      if (elements == W * kUnit) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) L::store(d + i * stride, r[i]);
      } else {
        for (int i = 0; i * kUnit < elements; ++i) L::store(d + i * stride, r[i]);
      }
    }
    return;
  }
  for (i64 k = 0; k < K; k += kUnit) {
    T x[W] = {}, x2[W] = {};
    for (int i = 0; i < n; ++i) {
      x[i] = w[i * w_row + k * w_col];
      if (kPairs && k + 1 < K) x2[i] = w[i * w_row + (k + 1) * w_col];
    }
    if constexpr (kPairs) {
      L::store(dst + k / kUnit * stride, L::pair(x, x2, L::first(W)));
    } else {
      L::store(dst + k * stride, L::load(x));
    }
  }
}

// See RnnKernel::pack.
template <class L, class T, bool kPairs, int kCellGates, int NV, int kPanels>
void pack_block(const void* source, i64 w_row, i64 w_col, i64 H, i64 K, i64 unit, float* dst, float*) {
  constexpr int W = L::width, kUnits = kPanels * NV * W / kCellGates;
  const i64 steps = kPairs ? (K + 1) / 2 : K;
  for (int v = 0; v < kPanels * NV; ++v) {
    const i64 gate = v * W / kUnits, first = unit + v * W % kUnits;
    const i64 left = H - first;
    const int n = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
    const T* w = static_cast<const T*>(source) + (gate * H + (n ? first : 0)) * w_row;
    pack_vector<L, T, kPairs>(w, w_row, w_col, n, K, NV * W, dst + v / NV * steps * NV * W + v % NV * W);
  }
}

// h, rounded to the dtype where y wants it, to both of its places.
template <class E, class T, class S>
FASTDL_INLINE void store_state(const Lanes<E>& lanes, typename E::V h, T* y, S* next) {
  if (y) {
    lanes.store(y, h);
    if (sizeof(S) > sizeof(T)) h = lanes.load(y);
  }
  lanes.store(next, h);
}

template <class E, class T, class S, RnnCell kCell, int kUnits>
void update(const RnnUpdateArgs& a) {
  constexpr int W = E::width, kCellGates = kGates[static_cast<int>(kCell)];
  for (int j = 0; j < a.n; j += W) {
    const Lanes<E> lanes(a.n - j);
    typename E::V bias[kCellGates];
    for (int g = 0; g < kCellGates; ++g) bias[g] = E::load(a.bias + g * kUnits + j);
    for (int i = 0; i < a.m; ++i) {
      const float* sums = a.sums + i * kCellGates * kUnits + j;
      const T* x = static_cast<const T*>(a.x) + i * a.gates_row + j;
      T* saved = a.saved ? static_cast<T*>(a.saved) + i * a.gates_row + j : nullptr;
      T* y = a.y ? static_cast<T*>(a.y) + i * a.y_row + j : nullptr;
      S* next = static_cast<S*>(a.h_next) + i * a.h_row + j;
      const auto recurrent = [&](int g) { return E::add(E::load(sums + g * kUnits), bias[g]); };
      const auto gate = [&](int g) { return E::add(recurrent(g), lanes.load(x + g * a.H)); };
      const auto save = [&](int k, typename E::V v) {
        if (saved) lanes.store(saved + k * a.H, v);
      };
      const auto save_state = [&](typename E::V v) {
        if (saved) lanes.store(static_cast<T*>(a.saved_state) + i * a.H + j, v);
      };
      if constexpr (kCell == RnnCell::lstm) {
        const auto in = logistic<E, T>(gate(0)), forget = logistic<E, T>(gate(1));
        const auto cell = tanh<E, T>(gate(2)), out = logistic<E, T>(gate(3));
        float* c = a.c + i * a.c_row + j;
        const auto c_next = E::fma(forget, lanes.load(c), E::mul(in, cell));
        lanes.store(c, c_next);
        save(0, in), save(1, forget), save(2, cell), save(3, out), save_state(c_next);
        store_state<E>(lanes, E::mul(out, tanh<E, T>(c_next)), y, next);
      } else if constexpr (kCell == RnnCell::gru) {
        const auto reset = logistic<E, T>(gate(0)), keep = logistic<E, T>(gate(1)), r = recurrent(2);
        const auto fresh = tanh<E, T>(E::fma(reset, r, lanes.load(x + 2 * a.H)));
        const auto h = lanes.load(static_cast<const S*>(a.h) + i * a.h_row + j);
        save(0, reset), save(1, keep), save(2, fresh), save_state(r);
        store_state<E>(lanes, E::fma(keep, E::sub(h, fresh), fresh), y, next);
      } else {
        const auto z = gate(0);
        store_state<E>(lanes, a.relu ? E::max(E::zero(), z) : tanh<E, T>(z), y, next);
      }
    }
  }
}

template <class E, class T, class S, RnnCell kCell>
void grad(const RnnGradArgs& a) {
  constexpr int W = E::width;
  const auto one = E::set1(1.0f);
  for (int i = 0; i < a.m; ++i) {
    const T* saved = a.saved ? static_cast<const T*>(a.saved) + i * a.gates_row : nullptr;
    const T* state = a.saved ? static_cast<const T*>(a.saved_state) + i * a.H : nullptr;
    const T* before = a.before ? static_cast<const T*>(a.before) + i * a.before_row : nullptr;
    T* const d_gates = static_cast<T*>(a.d_gates) + i * a.gates_row;
    S* const recurrent = static_cast<S*>(a.recurrent) + i * a.product_row;
    for (int j = 0; j < a.n; j += W) {
      const Lanes<E> lanes(a.n - j);
      const auto load = [&](int k) { return lanes.load(saved + k * a.H + j); };
      const auto put = [&](int g, typename E::V v) {
        lanes.store(d_gates + g * a.H + j, v);
        lanes.store(recurrent + g * a.H + j, v);
      };
      // d sigma(z)/dz = s (1 - s), d tanh(z)/dz = 1 - t^2
      const auto through_sigmoid = [&](typename E::V d, typename E::V s) {
        return E::mul(d, E::mul(s, E::sub(one, s)));
      };
      const auto through_tanh = [&](typename E::V d, typename E::V t) {
        return E::mul(d, E::mul(E::sub(one, t), E::add(one, t)));
      };
      float* const dh_at = a.dh + i * a.dh_row + j;
      auto dh = lanes.load(dh_at);
      if (a.dy) dh = E::add(dh, lanes.load(static_cast<const T*>(a.dy) + i * a.dy_row + j));
      const auto previous = before ? lanes.load(before + j) : E::zero();
      if constexpr (kCell == RnnCell::lstm) {
        const auto in = load(0), forget = load(1), cell = load(2), out = load(3), t = tanh<E, T>(lanes.load(state + j));
        float* const dc_at = a.dc + i * a.dc_row + j;
        const auto dc = E::add(lanes.load(dc_at), through_tanh(E::mul(dh, out), t));
        put(0, through_sigmoid(E::mul(dc, cell), in));
        put(1, through_sigmoid(E::mul(dc, previous), forget));
        put(2, through_tanh(E::mul(dc, in), cell));
        put(3, through_sigmoid(E::mul(dh, t), out));
        lanes.store(dc_at, E::mul(dc, forget));
        if (a.hidden) lanes.store(static_cast<T*>(a.hidden) + i * a.H + j, E::mul(out, t));
      } else if constexpr (kCell == RnnCell::gru) {
        const auto reset = load(0), keep = load(1), fresh = load(2), r = lanes.load(state + j);
        const auto d_fresh = through_tanh(E::mul(dh, E::sub(one, keep)), fresh);
        put(0, through_sigmoid(E::mul(d_fresh, r), reset));
        put(1, through_sigmoid(E::mul(dh, E::sub(previous, fresh)), keep));
        const auto d_r = E::mul(d_fresh, reset);
        lanes.store(d_gates + 2 * a.H + j, d_fresh);
        lanes.store(recurrent + 2 * a.H + j, d_r);
        lanes.store(static_cast<T*>(a.d_recurrent) + i * a.H + j, d_r);
        lanes.store(dh_at, E::mul(dh, keep));
      } else {
        const auto h = lanes.load(static_cast<const T*>(a.y) + i * a.y_row + j);
        put(0, a.relu ? E::select_le_zero(h, E::zero(), dh) : through_tanh(dh, h));
      }
    }
  }
}

template <class E, class From, class To>
void convert(const void* x, i64 n, void* out) {
  for (i64 i = 0; i < n; i += E::width) {
    const Lanes<E> lanes(n - i);
    lanes.store(static_cast<To*>(out) + i, lanes.load(static_cast<const From*>(x) + i));
  }
}

template <class E, class T, class S>
void merge(const float* dh, const void* dy, i64 n, void* product, void* out) {
  for (i64 i = 0; i < n; i += E::width) {
    const Lanes<E> lanes(n - i);
    auto d = lanes.load(dh + i);
    if (dy) d = E::add(d, lanes.load(static_cast<const T*>(dy) + i));
    lanes.store(static_cast<S*>(product) + i, d);
    lanes.store(static_cast<T*>(out) + i, d);
  }
}

template <class L, class E, class T, class S, RnnCell kCell, int MR, int NV, int kPanels>
constexpr RnnFunctions functions() {
  constexpr int kCellGates = kGates[static_cast<int>(kCell)], kUnits = kPanels * NV * L::width / kCellGates;
  static_assert(kUnits % L::width == 0, "a vector holds one gate");
  return {run_panel<L, MR, NV>,
          pack_block<L, T, sizeof(S) == 2, kCellGates, NV, kPanels>,
          update<E, T, S, kCell, kUnits>,
          grad<E, T, S, kCell>,
          convert<E, T, S>,
          convert<E, S, T>,
          convert<E, T, float>,
          convert<E, float, T>,
          merge<E, T, S>,
          nullptr};
}

}  // namespace
}  // namespace fastdl
