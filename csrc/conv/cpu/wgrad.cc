// The weight gradient: a product of x, seen through the taps, and dy over all output pixels. A block of pixels of both
// is packed into scratch once and serves all taps of a part; the sums of a part stay in L2.
#include <atomic>
#include <cstring>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/wgrad_part.h"
#include "simd/vec.h"

namespace fastdl {
namespace wgrad {
namespace {

void find_block(const Part& x, i64 index, Block* out) {
  const ConvDesc& d = x.d;
  Block& b = *out;
  const i64 segment = index % x.p.segments, row = first_row(x, index), image = rows_together(x);
  b.count = static_cast<int>(std::min(x.p.rows, image - row % image));
  b.w = d.out[2] * segment / x.p.segments;
  b.width = d.out[2] * (segment + 1) / x.p.segments - b.w;
  b.steps = ceil_div(b.width, x.kernel.k_unit);
  b.cols = x.p.shared_cols ? (b.width - 1) * d.stride[2] + (x.taps[2] - 1) * d.dilation[2] + 1 : b.steps;
  int sub = -1;
  for (int r = 0; r < b.count; ++r) {
    const i64 i = row + r;
    b.rows[r] = {i / d.out[1] / d.out[0], i / d.out[1] % d.out[0], i % d.out[1]};
    if (r == 0 || b.rows[r].h == 0) b.first[++sub] = b.rows[r].h;
    b.sub[r] = sub;
  }
}

// Asks for the dy of the next block while tiles work on this one: [row][segment][line].
class Ahead {
 public:
  Ahead(const Part& x, const Block* next) : x_(x), next_(next) {
    if (!next) return;
    const ConvTensor& t = x.args.y;
    const i64 item = item_size(x.d.dtype);
    const bool across = t.c_step == 1;  // a segment is the channels of a pixel, else the pixels of a channel
    if (!across && t.step[2] != 1) return;
    segments_ = across ? next->width : x.k.size();
    step_ = (across ? t.step[2] : t.c_step) * item;
    bytes_ = (across ? x.k.size() : next->width) * item;
    if (across && step_ == bytes_) bytes_ *= segments_, segments_ = 1;  // the whole row is one
    lines_ = next->count * segments_ * ceil_div(bytes_, kLine);
    enter();
  }
  i64 lines() const { return lines_; }
  void fetch(i64 lines) {
    for (; lines > 0 && row_ < next_->count; --lines) {
      __builtin_prefetch(at_ + byte_, 0, 2);
      if ((byte_ += kLine) < bytes_) continue;
      byte_ = 0, at_ += step_;
      if (++segment_ < segments_) continue;
      segment_ = 0;
      if (++row_ < next_->count) enter();
    }
  }

 private:
  static constexpr i64 kLine = 64;
  void enter() {
    const ConvTensor& t = x_.args.y;
    const Row& r = next_->rows[row_];
    const i64 channel = x_.group * (x_.d.K / x_.d.groups) + x_.k.begin;
    at_ = static_cast<const char*>(
        at(t.data, r.n * t.n_step + channel * t.c_step + r.z * t.step[0] + r.h * t.step[1] + next_->w * t.step[2],
           x_.d.dtype));
  }
  const Part& x_;
  const Block* next_;
  const char* at_ = nullptr;
  i64 segments_ = 0, step_ = 0, bytes_ = 0, lines_ = 0, segment_ = 0, byte_ = 0;
  int row_ = 0;
};

void run_block(const Part& x, const Block& b, const Block* next, const Scratch& s, bool accumulate) {
  const ConvDesc& d = x.d;
  const ConvWgradPlan& p = x.p;
  const i64 row = b.cols * p.pitch, nr = x.kernel.nr, panel = b.count * b.steps * nr;
  const i64 lines = p.fold ? x.taps[2] * x.c.size() : x.c.size(), tiles = ceil_div(lines, x.kernel.mr);
  const i64 tap_step = p.shared_cols ? d.dilation[2] * p.pitch : p.slots * row;
  ConvWgradRun runs[kRuns];
  Ahead ahead(x, next);
  const i64 calls =
      panel == 0 ? 1 : ceil_div(x.k.size(), nr) * x.taps[0] * x.taps[1] * (p.fold ? 1 : x.taps[2]) * tiles;
  const i64 each = ceil_div(ahead.lines(), std::max<i64>(1, calls));
  ConvWgradArgs t = {};
  t.a_step = p.shared_cols ? d.stride[2] * p.pitch : p.pitch;
  t.runs = runs, t.nr = nr;
  // A pair of ones in bfloat16 has the bits of the one and, in its upper half, of the other.
  const float one = x.kernel.k_unit == 1 ? 1.0f : float_of(0x3f803f80u);
  for (i64 j = 0; j < x.k.size(); j += nr) {
    t.b = s.y + j / nr * panel;
    t.n = static_cast<int>(std::min(nr, x.k.size() - j));
    t.accumulate = accumulate;
    float* c = s.sums + j * x.panel_rows();
    for (i64 t0 = 0; t0 < x.taps[0]; ++t0) {
      for (i64 t1 = 0; t1 < x.taps[1]; ++t1) {
        t.run_count = 0;
        for (int r = 0; r < b.count; ++r) {
          const i64 a = slot(x, b, r, t0, t1) * row;
          ConvWgradRun* last = runs + t.run_count - 1;
          if (r > 0 && a == last->a + last->steps * t.a_step) {
            last->steps += b.steps;
          } else {
            runs[t.run_count++] = {a, r * b.steps * nr, b.steps};
          }
        }
        for (i64 t2 = 0; t2 < (p.fold ? 1 : x.taps[2]); ++t2, c += lines * nr) {
          for (i64 i = 0; i < tiles; ++i) {
            const i64 begin = lines * i / tiles;
            t.m = static_cast<int>(lines * (i + 1) / tiles - begin);
            t.a = s.band + t2 * tap_step + begin;
            t.c = c + begin * nr;
            x.kernel.functions->wgrad_tile(t);
            if (each > 0) ahead.fetch(each);
          }
        }
      }
    }
    if (!x.with_bias()) continue;
    ConvWgradArgs bias = t;
    ConvWgradRun all = {0, 0, b.count * b.steps};
    bias.a = &one, bias.a_step = 0, bias.m = 1, bias.c = c, bias.runs = &all, bias.run_count = 1;
    x.kernel.functions->wgrad_tile(bias);
  }
}

// Sums to dw.
template <class T>
void scatter(const float* sums, i64 count, i64 step, T* out) {
  for (i64 i = 0; i < count; ++i) narrow(sums[i], out + i * step);
}
void scatter(const float* sums, i64 count, i64 step, void* out, DType dtype) {
  if (dtype == DType::f32) {
    scatter(sums, count, step, static_cast<float*>(out));
  } else if (dtype == DType::bf16) {
    scatter(sums, count, step, static_cast<bf16*>(out));
  } else {
    scatter(sums, count, step, static_cast<f16*>(out));
  }
}

void leave(const Part& x, const Scratch& s) {
  const ConvDesc& d = x.d;
  const ConvTensor& w = x.args.w;
  const i64 nr = x.kernel.nr, taps = x.all_taps(), width = vector_width(x.kernel);
  const i64 all = d.kernel[0] * d.kernel[1] * d.kernel[2], k_first = x.group * (d.K / d.groups) + x.k.begin;
  const bool plain = taps == all && w.c_step == all && (d.kernel[2] == 1 || w.step[2] == 1) &&
                     (d.kernel[1] == 1 || w.step[1] == d.kernel[2]) &&
                     (d.kernel[0] == 1 || w.step[0] == d.kernel[1] * d.kernel[2]);
  const i64 wide = taps <= width ? taps : round_up(taps, width);
  float* const by_k = s.stage;  // [tap][k][width], `width` output channels at a time
  float* const by_c = by_k + taps * width * width + kSlack;
  float* const dense = by_c + width * wide + kSlack;
  for (i64 j = 0; j < x.k.size(); j += width) {
    const float* sums = s.sums + j / nr * nr * x.panel_rows() + j % nr;
    const float* const bias = x.p.flat ? s.sums + x.flat_bias() + j : sums + (x.panel_rows() - 1) * nr;
    const i64 columns = std::min(width, x.k.size() - j);
    if (x.with_bias())
      scatter(bias, columns, x.args.dbias_step, at(x.args.dbias, (k_first + j) * x.args.dbias_step, d.dtype), d.dtype);
    for (i64 c = 0; c < x.c.size(); c += width) {
      const i64 n = std::min(width, x.c.size() - c);
      for (i64 t = 0; t < taps; ++t) {
        float* const out = by_k + t * width * width;
        if (x.p.flat) {
          for (i64 k = 0; k < columns; ++k) std::copy_n(s.sums + x.flat_at(t, j + k, c), width, out + k * width);
        } else {
          x.plain.helpers->pack_a(sums + (t * x.c.size() + c) * nr, 1, nr, columns, static_cast<int>(n),
                                  static_cast<int>(width), out, nullptr);
        }
      }
      FinishArgs f = {};
      void* const out = at(w.data, (k_first + j) * w.n_step + (x.c.begin + c) * w.c_step, d.dtype);
      if (w.c_step == 1 || (plain && taps == 1)) {
        for (i64 t = 0; t < taps; ++t) {
          const i64 z = x.tap[0] + t / x.taps[2] / x.taps[1], h = x.tap[1] + t / x.taps[2] % x.taps[1];
          const i64 offset = z * w.step[0] + h * w.step[1] + (x.tap[2] + t % x.taps[2]) * w.step[2];
          f.sum = by_k + t * width * width, f.sum_row = width, f.c = at(out, offset, d.dtype), f.c_row = w.n_step;
          f.m = static_cast<int>(columns), f.n = static_cast<int>(n);
          x.packer.helpers->finish(f);
        }
        continue;
      }
      for (i64 k = 0; k < columns; ++k) {
        void* const to = at(out, k * w.n_step, d.dtype);
        if (plain) {
          x.plain.helpers->pack_a(by_k + k * width, 1, width * width, n, static_cast<int>(taps), static_cast<int>(wide),
                                  by_c, nullptr);
          f.sum = by_c;
          if (wide != taps) {
            for (i64 i = 0; i < n; ++i)
              std::memcpy(dense + i * taps, by_c + i * wide, static_cast<std::size_t>(taps) * 4);
            f.sum = dense;
          }
          f.c = to, f.m = 1, f.n = static_cast<int>(n * taps);
          x.packer.helpers->finish(f);
          continue;
        }
        for (i64 t = 0; t < taps; ++t) {
          const i64 z = x.tap[0] + t / x.taps[2] / x.taps[1], h = x.tap[1] + t / x.taps[2] % x.taps[1];
          const i64 offset = z * w.step[0] + h * w.step[1] + (x.tap[2] + t % x.taps[2]) * w.step[2];
          scatter(by_k + (t * width + k) * width, n, w.c_step, at(to, offset, d.dtype), d.dtype);
        }
      }
    }
  }
}

const GemmKernel& widening(const ConvKernel& kernel) {
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= kernel.isa && k.dtype == kernel.dtype && k.kind == GemmKind::kTile && k.k_unit == 1 && k.planes == 1)
      return k;
  return gemm_pack_kernel(Isa::kScalar, kernel.dtype);
}

Part part_at(const ConvDesc& d, const ConvPlan& plan, const ConvArgs& args, i64 index) {
  const ConvWgradPlan& p = plan.wgrad;
  const ConvKernel& kernel = *plan.kernel;
  Part x = {d,
            p,
            args,
            kernel,
            conv_tiles(kernel),
            widening(kernel),
            gemm_pack_kernel(kernel.isa, DType::f32, Precision::fma),
            0,
            0,
            {},
            {},
            {},
            {},
            {}};
  const auto take = [&](i64 count) {
    const i64 i = index % count;
    index /= count;
    return i;
  };
  const i64 C = d.C / d.groups, K = d.K / d.groups, c = take(p.c_parts) * p.c_block, k = take(p.k_parts) * p.k_block;
  x.c = {c, std::min(C, c + p.c_block)}, x.k = {k, std::min(K, k + p.k_block)};
  for (int i = 2; i >= 0; --i) {
    x.tap[i] = take(p.boxes[i]) * p.box[i];
    x.taps[i] = std::min(p.box[i], d.kernel[i] - x.tap[i]);
  }
  x.group = take(d.groups);
  x.chunk = index;
  x.blocks = {p.blocks * x.chunk / p.chunks, p.blocks * (x.chunk + 1) / p.chunks};
  return x;
}

}  // namespace
}  // namespace wgrad

namespace {

// Whether all sums were numbers, as flat parts need.
bool run(const ConvDesc& d, const ConvPlan& plan, const ConvArgs& args) {
  using namespace wgrad;
  const ConvWgradPlan& p = plan.wgrad;
  std::atomic<bool> numbers = true;
  ArenaLease scratch(plan.workspace_bytes());
  const bool tiled = is_tiled(*plan.kernel);
  const i64 parts = p.parts() * d.groups, each = p.chunk_bytes / p.chunks / std::max<i64>(1, parts);
  const auto scratch_of = [&](int thread) {
    char* memory = scratch.data() + p.chunk_bytes + thread * p.per_thread_bytes();
    const auto take = [&](i64 bytes) {
      float* const piece = reinterpret_cast<float*>(memory);
      memory += bytes;
      return piece;
    };
    Scratch s = {};
    s.band = take(p.band_bytes), s.y = take(p.y_bytes), s.stage = take(p.stage_bytes), s.sums = take(p.sum_bytes);
    s.again = take(p.again_bytes);
    return s;
  };
  const auto chunk_sums = [&](i64 index) { return reinterpret_cast<float*>(scratch.data() + index * each); };
  parallel(plan.threads, [&](int thread, int threads) {
    Scratch s = scratch_of(thread);
    const GemmHelpers& helpers = *conv_tiles(*plan.kernel).helpers;
    if (helpers.begin) helpers.begin();
    Block blocks[2];
    const i64 all = parts * p.chunks;
    for (i64 i = all * thread / threads, end = all * (thread + 1) / threads; i < end; ++i) {
      const Part x = part_at(d, plan, args, i);
      if (p.chunks > 1) s.sums = chunk_sums(i);
      if (x.blocks.size() == 0) std::memset(s.sums, 0, static_cast<std::size_t>(x.sum_floats() + x.peak_floats()) * 4);
      if (x.blocks.size() > 0) find_block(x, x.blocks.begin, blocks);
      for (i64 j = 0; j < x.blocks.size(); ++j) {
        const Block& block = blocks[j % 2];
        Block* const next = j + 1 < x.blocks.size() ? blocks + (j + 1) % 2 : nullptr;
        if (next) find_block(x, x.blocks.begin + j + 1, next);
        if (tiled) {
          p.flat ? run_flat(x, block, s, j > 0) : run_tiles(x, block, s, j > 0);
          continue;
        }
        pack_y(x, block, s.y);
        pack_x(x, block, s);
        run_block(x, block, next, s, j > 0);
      }
      if (p.flat && x.blocks.size() > 0 && !trusted(x, s)) numbers = false;
      if (p.chunks > 1 || !numbers) continue;
      repair(x, s);
      leave(x, s);
    }
    if (helpers.end) helpers.end();
  });
  if (p.chunks == 1 || !numbers) return numbers;
  parallel(plan.threads, [&](int thread, int threads) {
    Scratch s = scratch_of(thread);
    for (i64 i = parts * thread / threads, end = parts * (thread + 1) / threads; i < end; ++i) {
      const Part x = part_at(d, plan, args, i);
      s.sums = chunk_sums(i);
      FinishArgs f = {};
      f.c = s.sums, f.m = 1, f.n = static_cast<int>(x.sum_floats()), f.accumulate = true;
      for (i64 chunk = 1; chunk < p.chunks; ++chunk) {
        f.sum = chunk_sums(chunk * parts + i);
        x.plain.helpers->finish(f);
        float* const peaks = s.sums + x.sum_floats();
        for (i64 j = 0; j < x.peak_floats(); ++j) peaks[j] = std::max(peaks[j], f.sum[x.sum_floats() + j]);
      }
      repair(x, s);
      leave(x, s);
    }
  });
  return true;
}

}  // namespace

void conv_run_wgrad(const ConvDesc& d, const ConvPlan& plan, const ConvArgs& args) {
  if (d.K == 0 || (d.C == 0 && !args.dbias)) return;
  if (run(d, plan, args)) return;
  ConvPlan careful = plan;
  careful.wgrad = conv_wgrad_plan(d, *plan.kernel, plan.threads, false);
  run(d, careful, args);
}

}  // namespace fastdl
