"""Plants one bug at a time in a copy of the sources and demands that the tests notice.

usage: python tests/mutation/run.py [NAME ...]          all bugs of the table, or those named; about 5 minutes

The unmutated copy must pass the same tests first. Exits nonzero when a bug survives, when its line is not found exactly
once (the source has moved on: adapt the table), or when a test selection is empty.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds a selection may take; a hang counts as noticed
TESTS_FAILED = 1  # pytest's exit status; 2 and above: interrupted, internal error, bad usage, nothing collected


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str  # found exactly once
    new: str
    tests: str  # pytest arguments


RUN, KERNEL, GEMM = "csrc/gemm/cpu/run.cc", "csrc/gemm/cpu/kernel.h", "csrc/gemm/gemm.cc"
PAIRS, TILES = "csrc/gemm/cpu/kernel_pairs.h", "csrc/gemm/cpu/kernel_amx.h"
EXACT, STRIDES, THREADS = "tests/test_gemm_exact.py", "tests/test_gemm_strides.py", "tests/test_threads.py"
DTYPES, EPILOGUE, SPLIT = "tests/test_gemm_dtypes.py", "tests/test_gemm_epilogue.py", "tests/test_gemm_split.py"
ATTENTION, MODULES, INSIDE = (
    "tests/test_attention.py",
    "tests/test_attention_modules.py",
    "tests/test_attention_torch.py",
)
RNN_MODULES, RNN_INSIDE = "tests/test_rnn_modules.py", "tests/test_rnn_torch.py"
OPS = "python/fastdl/ops/"
GRAD, GRAD_KERNEL = "csrc/attention/cpu/backward.cc", "csrc/attention/cpu/kernel_backward.h"
GRADS = "tests/test_attention_backward.py"
NATIVE, ATTENTION_RUN = "tests/test_attention_native.py", "csrc/attention/cpu/run.cc"
ATTENTION_KERNEL, DECODE = "csrc/attention/cpu/kernel.h", "csrc/attention/cpu/decode.cc"
RNN, RNN_RUN, RNN_PLAN = "csrc/rnn/cpu/kernel.h", "csrc/rnn/cpu/run.cc", "csrc/rnn/cpu/plan.cc"
RNN_TESTS = "tests/test_rnn_native.py"
MUTATIONS = [
    Mutation(
        "weight gradient of a reverse direction with the states of a forward one",
        OPS + "rnn_native.py",
        "        before = y[1:] if reverse else y[:-1]\n",
        "        before = y[:-1]\n",
        f"{RNN_MODULES} -k 'test_layers and batched and bidirectional'",
    ),
    Mutation(
        "weight gradient without the first state",
        OPS + "rnn_native.py",
        "        if h0 is not None:\n            parts = ",
        "        if False:\n            parts = ",
        f"{RNN_MODULES} -k 'test_layers and batched and states'",
    ),
    Mutation(
        "states before a packed step taken from its own",
        OPS + "rnn_native.py",
        "torch.repeat_interleave(batch_sizes[:-1], batch_sizes[1:])",
        "torch.repeat_interleave(batch_sizes[1:], batch_sizes[1:])",
        f"{RNN_MODULES} -k 'test_layers and packed'",
    ),
    Mutation(
        "recurrent bias of a GRU with the gradient of the other",
        OPS + "rnn_native.py",
        "        if need_b_hh and gates.recurrent is not None:",
        "        if False:",
        f"{RNN_MODULES} -k 'test_layers and gru'",
    ),
    Mutation(
        "packed states left in the order of length",
        "python/fastdl/nn/recurrent.py",
        "        h_n = _permuted(h_n, unsorted_indices)\n",
        "",
        f"{RNN_MODULES} -k 'test_layers and unsorted'",
    ),
    Mutation(
        "shapes of parameters not looked at",
        OPS + "rnn_shapes.py",
        "    return [x.shape for x in parameters] == expected",
        "    return True",
        f"{RNN_MODULES} -k test_wrongly_shaped_parameters",
    ),
    Mutation(
        "second gate's derivative in the reference of GRU",
        OPS + "rnn_reference.py",
        "dz = dh * (s.h_before - n) * z * (1 - z)",
        "dz = dh * (s.h_before - n) * z",
        f"{RNN_INSIDE} -k test_gradcheck",
    ),
    Mutation(
        "mapped batch unfolded the wrong way round",
        OPS + "rnn_library.py",
        "x.transpose(0, 1).flatten(1, 2)",
        "x.transpose(0, 1).transpose(1, 2).flatten(1, 2)",
        f"{RNN_INSIDE} -k test_vmap",
    ),
    Mutation(
        "softcap without its derivative",
        OPS + "attention_reference.py",
        "        ds = ds * (1 - p.tanh.square())\n",
        "        pass\n",
        f"{INSIDE} -k test_gradcheck",
    ),
    Mutation(
        "second derivative without dropout",
        OPS + "attention_reference.py",
        "    dp = dp if drop is None else drop(dp)\n",
        "",
        f"{INSIDE} -k test_gradcheck_with_dropout",
    ),
    Mutation(
        "gradient of a mask that vmap shares",
        OPS + "attention_library.py",
        "size, batch, per_sample=needs[3])",
        "size, batch, per_sample=False)",
        f"{INSIDE} -k 'test_vmap and not dropout'",
    ),
    Mutation(
        "vmap's one dropout mask for all drawn for each",
        OPS + "attention_library.py",
        "    return cu is not None or (seed is not None and seed_dim is None)",
        "    return cu is not None",
        f"{INSIDE} -k test_vmap_dropout",
    ),
    Mutation(
        "fully masked rows give NaN",
        OPS + "attention_reference.py",
        ".masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)",
        ", -1)",
        f"{ATTENTION} -k 'test_rows_that_see_nothing'",
    ),
    Mutation(
        "key and value heads swapped for query's",
        OPS + "attention_shapes.py",
        "    kv_heads = _heads(key) if shared else heads\n",
        "    kv_heads = _heads(key)\n",
        f"{ATTENTION} -k 'test_as_torch or test_grouped'",
    ),
    Mutation(
        "padding lost where attention is causal",
        "python/fastdl/nn/attention.py",
        "        mask = self._merge(None if causal else attn_mask, key_padding_mask, q, extra)\n",
        "        mask = None if causal else self._merge(attn_mask, key_padding_mask, q, extra)\n",
        f"{MODULES} -k test_multihead_causal",
    ),
    Mutation(
        "torch's fast path for nested tensors",
        "python/fastdl/nn/transformer.py",
        "_packable(self, src):",
        "False:",
        f"{MODULES} -k test_encoder_fast_path",
    ),
    Mutation(
        "dropped K tail of the dot kernel",
        KERNEL,
        "  if (k < t.k) {\n    const int left = static_cast<int>(t.k - k);\n    step(",
        "  if (false) {\n    const int left = static_cast<int>(t.k - k);\n    step(",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "dropped last K block",
        RUN,
        "  } while (k0 < d.K);",
        "  } while (k0 + p.kc < d.K);",
        f"{EXACT} -k test_k_blocks",
    ),
    Mutation(
        "skipped padding of a panel",
        KERNEL,
        "      for (; j < panel; j += W) L::store(d + j, L::zero());\n",
        "",
        f"{EXACT} -k 'test_pack_in_every_layout and not amx'",
    ),
    Mutation(
        "swapped strides of an operand read in place",
        RUN,
        "x.a_row = d.a_row, x.a_col = d.a_col;",
        "x.a_row = d.a_col, x.a_col = d.a_row;",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "swapped batch strides",
        RUN,
        "part.b = at(part.b, step * args.batch.b[i], d.dtype);",
        "part.b = at(part.b, step * args.batch.a[i], d.dtype);",
        f"{STRIDES} -k test_batches",
    ),
    Mutation(
        "bias not advanced with the panel",
        RUN,
        "    if (origin.bias) t.bias = origin.bias + j * t.bias_step;\n",
        "",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "bias read as if contiguous",
        RUN,
        "origin.bias + j * t.bias_step;",
        "origin.bias + j;",
        f"{STRIDES} -k test_bias_strides",
    ),
    Mutation(
        "lost beta: out overwritten instead of accumulated into",
        RUN,
        "t.accumulate = args.accumulate || !first || k0 > 0;",
        "t.accumulate = !first || k0 > 0;",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "lost K blocks but the last",
        RUN,
        "t.accumulate = args.accumulate || !first || k0 > 0;",
        "t.accumulate = args.accumulate || !first;",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "off by one in the split along M",
        RUN,
        "part.m_end = d.M * (im + 1) / p.grid_m;",
        "part.m_end = d.M * (im + 1) / p.grid_m - (im + 1 < p.grid_m);",
        f"{EXACT} -k test_k_blocks",
    ),
    Mutation(
        "parts overlap along N",
        RUN,
        "part.n_begin = panels * in / p.grid_n * nr;",
        "part.n_begin = in == 0 ? 0 : (panels * in / p.grid_n - 1) * nr;",
        f"{EXACT} -k test_k_blocks",
    ),
    Mutation(
        "stale pack of A",
        RUN,
        "if (packed_m != m0) pack_a(",
        "if (packed_m < 0) pack_a(",
        f"{EXACT} -k test_packed_blocks",
    ),
    Mutation(
        "frozen pack read from its first K block only",
        RUN,
        "x.b = at(part.b, n0 / nr * x.b_panel + gemm_packed_steps(k0, *p.kernel) * nr, DType::f32);",
        "x.b = at(part.b, n0 / nr * x.b_panel, DType::f32);",
        f"{EXACT} -k test_linear_packed",
    ),
    Mutation(
        "dot kernel of pairs drops its tail",
        PAIRS,
        "int n) { return L::pairs(p, n); }",
        "int n) { return L::pairs(p, n - n % 2); }",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "swapped halves of interleaved pairs",
        PAIRS,
        "L::interleave(low + j, high + j, &x, &y);",
        "L::interleave(high + j, low + j, &x, &y);",
        f"{EXACT} -k 'test_pack_in_every_layout and not amx'",
    ),
    Mutation(
        "plain call that autograd does not record",
        "csrc/bind/plain.cc",
        "if (!needs_grad(tensors, count)) return output();",
        "return output();",
        "tests/test_linear.py -k backward",
    ),
    Mutation(
        "race: threads share one scratch",
        RUN,
        "scratch.data() + thread * p.per_thread_bytes()",
        "scratch.data()",
        f"{EXACT} {THREADS} -k 'test_packed_blocks or same_bits'",
    ),
    Mutation(
        "race: concurrent callers share one arena buffer",
        "csrc/base/arena.cc",
        "      buffers.pop_back();\n",
        "",
        f"{THREADS} -k test_concurrent_callers",
    ),
    Mutation(
        "race in a reduction: column sums of both threads meet in one column block",
        RUN,
        "const i64 begin = units * thread / n * kUnit, end = std::min(d.cols",
        "const i64 begin = units * (thread / 2) / n * kUnit, end = std::min(d.cols",
        f"{EXACT} -k test_sum_rows",
    ),
    Mutation(
        "dropped partial sums of a reduction",
        KERNEL,
        "    while (depth > 0) total = L::add(total, partial[--depth]);",
        "    if (depth > 0) total = L::add(total, partial[--depth]);",
        f"{EXACT} -k test_sum_rows",
    ),
    Mutation(
        "store without its mask",
        KERNEL,
        "        L::store(c + v * W, x, mask);",
        "        L::store(c + v * W, x);",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "load without its mask",
        KERNEL,
        "    return kTail && v == NV - 1 ? L::load(p + v * W, mask) : L::load(p + v * W);",
        "    return L::load(p + v * W);",
        f"{STRIDES} -k test_guard_pages",
    ),
    Mutation(
        "dropped odd K of a pair",
        PAIRS,
        "  const i64 pairs = (k_count + 1) / 2;",
        "  const i64 pairs = k_count / 2;",
        f"{EXACT} -k 'test_pack_in_every_layout and not amx'",
    ),
    Mutation(
        "second of a pair read behind an odd K",
        PAIRS,
        "const bf16* b = odd || j_step != 1 ? y : high + j;",
        "const bf16* b = j_step != 1 ? y : high + j;",
        f"{EXACT} -k 'test_pack_in_every_layout and not amx'",
    ),
    Mutation(
        "truncation instead of rounding to bfloat16",
        "csrc/simd/vec.h",
        "(u + 0x7fffu + (u >> 16 & 1u)) >> 16);",
        "u >> 16);",
        f"{DTYPES} -k test_results_are_rounded",
    ),
    Mutation(
        "halves rounded up instead of to even in bfloat16",
        "csrc/simd/vec.h",
        "(u + 0x7fffu + (u >> 16 & 1u)) >> 16);",
        "(u + 0x8000u) >> 16);",
        f"{DTYPES} -k test_results_are_rounded",
    ),
    Mutation(
        "16-bit sums of every K block but the last lost",
        RUN,
        "          t.accumulate = !first || k0 > 0;",
        "          t.accumulate = !first;",
        f"{EXACT} -k test_k_blocks",
    ),
    Mutation(
        "dropped accumulate over pairs in 16 bits",
        RUN,
        "          t.accumulate = !first || k0 > 0;",
        "          t.accumulate = k0 > 0;",
        f"{EXACT} -k test_linear_wgrad",
    ),
    Mutation(
        "dropped accumulate over pairs in float32",
        RUN,
        "t.accumulate = args.accumulate || !first || k0 > 0;",
        "t.accumulate = args.accumulate || k0 > 0;",
        f"{EXACT} -k test_linear_wgrad",
    ),
    Mutation(
        "lost beta in 16 bits",
        RUN,
        "f.accumulate = narrow && args.accumulate;",
        "f.accumulate = false;",
        f"{EXACT} -k 'test_every_tail and not amx'",
    ),
    Mutation(
        "residual not advanced with the tile",
        RUN,
        "      if (f.residual) f.residual = at(f.residual, i * f.c_row + j, c_dtype);\n",
        "",
        f"{EPILOGUE} -k 'test_every_row and not amx'",
    ),
    Mutation(
        "residual not advanced with the block",
        RUN,
        "f.residual = at(args.residual, offset, d.dtype);",
        "f.residual = at(args.residual, part.c_offset, d.dtype);",
        f"{EPILOGUE} -k test_default_kernel",
    ),
    Mutation(
        "pre written after the activation",
        KERNEL,
        "      if (t.pre) lanes.store(static_cast<T*>(t.pre) + at, x);\n      x = activate<L, kActivation>(x);\n",
        "      x = activate<L, kActivation>(x);\n      if (t.pre) lanes.store(static_cast<T*>(t.pre) + at, x);\n",
        f"{EPILOGUE} -k test_pre_is_linear",
    ),
    Mutation(
        "team keeps the caller's flush-denormal state",
        "csrc/base/parallel.cc",
        "      body(context, omp_get_thread_num(), omp_get_num_threads());\n      set_float_state(own);\n",
        "      body(context, omp_get_thread_num(), omp_get_num_threads());\n",
        "tests/test_gemm_hostile.py -k flush_denormal",
    ),
    Mutation(
        "team of a forked child",
        "csrc/base/parallel.cc",
        "  if (g_forked.load(std::memory_order_relaxed)) return",
        "  if (false) return",
        f"{THREADS} -k test_fork_after_use",
    ),
    Mutation(
        "strides of the transposed problem left as they were",
        GEMM,
        "    std::swap(d->a_col, d->b_row);\n",
        "",
        f"{STRIDES} -k test_every_pair_of_layouts",
    ),
    Mutation(
        "a product of parts taken twice, another not at all",
        TILES,
        "a[] = {0, 0, 1, 1, 2, 0}, b[] = {2, 1, 1, 0, 0, 0};",
        "a[] = {0, 0, 1, 1, 1, 0}, b[] = {2, 1, 1, 0, 0, 0};",
        f"{SPLIT} -k test_parts_hold",
    ),
    Mutation(
        "float16 without the product of the low parts",
        TILES,
        "count = 4, a[] = {1, 1, 0, 0}, b[] = {1, 0, 0, 1};",
        "count = 3, a[] = {1, 0, 0}, b[] = {0, 0, 1};",
        f"{SPLIT} -k test_float16_products",
    ),
    Mutation(
        "large values rounded to Inf",
        TILES,
        "_mm512_set1_epi32(0x7f7f8000)",
        "_mm512_set1_epi32(0x7f800000)",
        f"{SPLIT} -k test_parts_hold",
    ),
    Mutation(
        "Inf split into Inf and NaN",
        TILES,
        "        x = _mm512_maskz_sub_ps(finite, x, out[p]);",
        "        x = _mm512_maskz_sub_ps(0xffff, x, out[p]);",
        f"{SPLIT} -k test_special",
    ),
    Mutation(
        "tiny rows trusted",
        TILES,
        "a > 0 && (a < kTinyPeak || b_least",
        "a > 0 && (b_least",
        f"{SPLIT} -k test_tiny_against",
    ),
    Mutation(
        "tiny products trusted",
        TILES,
        " || a * b_least < kTinyProduct);",
        ");",
        "tests/test_gemm_hostile.py -k test_subnormals_are_kept",
    ),
    Mutation(
        "scale of a tiny frozen column lost",
        TILES,
        "L::set1(1 / kTinyScale)",
        "L::set1(1)",
        f"{SPLIT} -k test_special",
    ),
    Mutation(
        "last tile of K dropped",
        TILES,
        "for (i64 k = t.k / (16 * P::parts); k > 0; --k) {",
        "for (i64 k = t.k / (16 * P::parts); k > 1; --k) {",
        f"{EXACT} -k 'test_k_blocks and amx'",
    ),
    Mutation(
        "first pair alone computed again",
        RUN,
        "t.accumulate = r > 0 || k0 > 0;",
        "t.accumulate = k0 > 0;",
        f"{SPLIT} -k test_pairs",
    ),
    Mutation(
        "whole rows taken from what was computed again",
        RUN,
        "if (rows[i] >> j & 1) sum",
        "if (rows[i]) sum",
        f"{SPLIT} -k test_special",
    ),
    Mutation(
        "torch's switch ignored",
        "csrc/bind/gemm_problem.cc",
        '"tf32") == 0) return Precision::tf32;',
        '"tf32") == 0) return Precision::ieee;',
        f"{SPLIT} -k test_torch_switch",
    ),
    Mutation(
        "dropped delta of attention's gradient",
        GRAD_KERNEL,
        "L::sub(g, delta[r])",
        "g",
        f"{GRADS} -k test_every_pair_of_options",
    ),
    Mutation(
        "slope of the softcap left out",
        GRAD_KERNEL,
        "        if (capped && t.capped) ds[r] = L::mul(ds[r], slope);\n",
        "",
        f"{GRADS} -k test_every_pair_of_options",
    ),
    Mutation(
        "slope of the softcap in the mask's gradient",
        GRAD_KERNEL,
        "if (capped && t.capped) ds[r]",
        "if (capped) ds[r]",
        f"{GRADS} -k test_gradient_of_every_broadcast_mask",
    ),
    Mutation(
        "dropout left out of dP",
        GRAD_KERNEL,
        "if (dropout) g = L::mul(drop<L>(g, key[r], f.dropout.col + j, f.dropout.threshold), factor);",
        "",
        f"{GRADS} -k test_every_pair_of_options",
    ),
    Mutation(
        "unseen lanes of a vector left in dS",
        GRAD_KERNEL,
        "          ds[r] = within<L>(ds[r], j, first[r], last[r]);\n",
        "",
        f"{GRADS} -k test_every_pair_of_options",
    ),
    Mutation(
        "last row of an odd strip left out of the pairs",
        GRAD_KERNEL,
        "const bool dead = row >= f.m || t.lse[row] == -kInfinity;",
        "const bool dead = row >= f.m || t.lse[row] == -kInfinity || (R == 2 && row + 1 == f.m && r == 0);",
        f"{GRADS} -k test_every_tail",
    ),
    Mutation(
        "a second block of keys overwrites dQ",
        GRAD,
        "t.accumulate = first_key(h, row, m) < key;",
        "t.accumulate = false;",
        f"{GRADS} -k test_every_tail",
    ),
    Mutation(
        "rows that see no key of a part left as they were",
        GRAD,
        "    clear_unseeing_rows(h, key_end, dq);\n",
        "",
        f"{GRADS} -k test_rows_that_see_nothing",
    ),
    Mutation(
        "a second query head overwrites dK and dV",
        GRAD,
        "t.accumulate = rows.begin < begin || h.head > kv * (d.H / d.Hkv);",
        "t.accumulate = rows.begin < begin;",
        f"{GRADS} -k test_every_pair_of_options",
    ),
    Mutation(
        "the last chunk left out of dQ",
        GRAD,
        "for (i64 c = 1; c < chunks; ++c)",
        "for (i64 c = 1; c + 1 < chunks; ++c)",
        f"{GRADS} -k test_threads_are_no_part_of_the_result",
    ),
    Mutation(
        "window one key too wide",
        ATTENTION_KERNEL,
        "last = clamped(t.see_end + row, first, t.end);",
        "last = clamped(t.see_end + row + 1, first, t.end);",
        f"{NATIVE} -k test_one_visible_key",
    ),
    Mutation(
        "output not rescaled where the maximum moves",
        ATTENTION_KERNEL,
        "if (t.first || rescale[i] == 1.0f) continue;",
        "continue;",
        f"{NATIVE} -k test_every_tail",
    ),
    Mutation(
        "sum not rescaled where the maximum moves",
        ATTENTION_KERNEL,
        "sum = L::fma(L::load(t.sum + group), correction, sum);",
        "sum = L::add(L::load(t.sum + group), sum);",
        f"{NATIVE} -k test_every_tail",
    ),
    Mutation(
        "scores of the block before left beside the window",
        ATTENTION_KERNEL,
        "      for (i64 j = t.begin; j < from[i]; j += W) Rows::store(s, j, L::zero());\n",
        "",
        f"{NATIVE} -k test_many_query_blocks",
    ),
    Mutation(
        "dropout forgets the first key of the block",
        ATTENTION_KERNEL,
        "drop<L>(p, key, t.dropout.col + j, t.dropout.threshold)",
        "drop<L>(p, key, j, t.dropout.threshold)",
        f"{NATIVE} -k test_dropout_keeps",
    ),
    Mutation(
        "panels of the head before used again",
        ATTENTION_RUN,
        "        if (p.keep_k) std::memset(scratch.packed, 0, static_cast<std::size_t>(p.blocks));\n",
        "        if (p.keep_k && head == 0) std::memset(scratch.packed, 0, static_cast<std::size_t>(p.blocks));\n",
        f"{NATIVE} -k 'test_many_query_blocks or test_same_bits'",
    ),
    Mutation(
        "decode ignores the last chunk of keys",
        DECODE,
        "c.chunks = p.blocks",
        "c.chunks = std::max<i64>(1, p.blocks - 1)",
        f"{NATIVE} -k test_grouped_queries",
    ),
    Mutation(
        "h read from the buffer being written",
        RNN_RUN,
        "const Operand &before = h[s & 1], &after = h[~s & 1];",
        "const Operand &before = h[s & 1], &after = h[s & 1];",
        f"{RNN_TESTS} -k test_tails",
    ),
    Mutation(
        "no barrier at the end of a step",
        RNN_RUN,
        "      finish_rows(clock.next_size(), m, after, units, columns);\n      barrier.wait(threads);",
        "      finish_rows(clock.next_size(), m, after, units, columns);",
        f"{RNN_TESTS} -k test_same_bits",
    ),
    Mutation(
        "last states of ended rows not written",
        RNN_RUN,
        "for (i64 i = begin; i < end; ++i) {\n      if (args.h_n)",
        "for (i64 i = begin; i < end && begin == 0; ++i) {\n      if (args.h_n)",
        f"{RNN_TESTS} -k test_packed",
    ),
    Mutation(
        "rows that join start from the step before",
        RNN_RUN,
        "const i64 shared = s + 1 < d.T ? std::min(m, before.size()) : 0;",
        "const i64 shared = s + 1 < d.T ? m : 0;",
        f"{RNN_TESTS} -k test_packed",
    ),
    Mutation(
        "dropped K blocks of the recurrent product",
        RNN_RUN,
        "        t.accumulate = k > 0;",
        "        t.accumulate = false;",
        f"{RNN_TESTS} -k test_depths",
    ),
    Mutation(
        "cell gradient forgets the later steps",
        RNN,
        "const auto dc = E::add(lanes.load(dc_at), through_tanh(E::mul(dh, out), t));",
        "const auto dc = through_tanh(E::mul(dh, out), t);",
        f"{RNN_TESTS} -k test_tails",
    ),
    Mutation(
        "gru's recurrent gradient without the reset gate",
        RNN,
        "        lanes.store(recurrent + 2 * a.H + j, d_r);",
        "        lanes.store(recurrent + 2 * a.H + j, d_fresh);",
        f"{RNN_TESTS} -k test_tails",
    ),
    Mutation(
        "columns past H packed from other gates",
        RNN,
        "const int n = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;",
        "const int n = left < 0 ? 0 : W;",
        f"{RNN_TESTS} -k test_guard_pages",
    ),
]


class Workbench:
    """A copy of the sources, built and tested in place."""

    def __init__(self, folder: Path) -> None:
        self.source, self.build = folder / "source", folder / "build"
        skip = shutil.ignore_patterns("_C.*.so", "__pycache__", ".git", "build", "dist", ".venv", "*_cache")
        shutil.copytree(ROOT, self.source, ignore=skip)
        cmakedir = self._output(sys.executable, "-m", "pybind11", "--cmakedir").strip()
        self._output(
            *("cmake", "-S", self.source, "-B", self.build, "-DCMAKE_BUILD_TYPE=Release", "-DFASTDL_EMULATE_AMX=ON"),
            *(f"-Dpybind11_DIR={cmakedir}", f"-DPython_EXECUTABLE={sys.executable}"),
        )

    def _output(self, *command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def make(self) -> None:
        self._output("cmake", "--build", self.build, "--target", "_C", "--parallel", os.cpu_count() or 1)
        for module in self.build.glob("_C.*.so"):
            target = self.source / "python" / "fastdl" / module.name
            target.unlink(missing_ok=True)  # a running process keeps the old file
            shutil.copy(module, target)

    def test(self, arguments: str) -> str:
        """One of "passed", "failed", "crashed" or "hung"; exits where pytest could not run the selection."""
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {arguments}"
        env = {**os.environ, "PYTHONPATH": str(self.source / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", f"exec {command}"],
                cwd=self.source,
                env=env,
                timeout=TIMEOUT,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return "hung"
        if done.returncode > TESTS_FAILED:
            sys.exit(f"{command}: exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return {0: "passed", TESTS_FAILED: "failed"}.get(done.returncode, "crashed")

    def plant(self, mutation: Mutation) -> str:
        """Apply, build, test, undo."""
        file = self.source / mutation.file
        original = file.read_text()
        if original.count(mutation.old) != 1:
            sys.exit(
                f"{mutation.name}: found {original.count(mutation.old)} times in {mutation.file}: {mutation.old!r}"
            )
        file.write_text(original.replace(mutation.old, mutation.new))
        try:
            self.make()
            return self.test(mutation.tests)
        finally:
            file.write_text(original)


def main(names: list[str]) -> int:
    unknown = set(names) - {m.name for m in MUTATIONS}
    if unknown:
        sys.exit(f"no such bug: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder))
        bench.make()
        for tests in dict.fromkeys(m.tests for m in chosen):
            if (result := bench.test(tests)) != "passed":
                sys.exit(f"the unmutated sources: {tests}: {result}")
        print(f"unmutated: {len({m.tests for m in chosen})} selections pass", flush=True)
        width = max(len(m.name) for m in chosen)
        for mutation in chosen:
            start = time.monotonic()
            result = bench.plant(mutation)
            if result == "passed":
                survivors.append(mutation.name)
            verdict = "SURVIVED" if result == "passed" else f"caught ({result})"
            print(
                f"{mutation.name:{width}}  {verdict:16}  {time.monotonic() - start:4.0f} s  {mutation.tests}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
