"""Bugs to plant in attention."""

from mutation import Mutation

ATTENTION = "tests/test_attention.py"
MODULES = "tests/test_attention_modules.py"
INSIDE = "tests/test_attention_torch.py"
OPS = "python/fastdl/ops/"
GRAD = "csrc/attention/cpu/backward.cc"
GRAD_KERNEL = "csrc/attention/cpu/kernel_backward.h"
GRADS = "tests/test_attention_backward.py"
NATIVE = "tests/test_attention_native.py"
ATTENTION_RUN = "csrc/attention/cpu/run.cc"
ATTENTION_KERNEL = "csrc/attention/cpu/kernel.h"
DECODE = "csrc/attention/cpu/decode.cc"
TILES = "csrc/attention/cpu/kernel_amx.h"
SPLIT = "tests/test_attention_split.py"

MUTATIONS = [
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
        "const bool dead = row >= f.m || t.lse[2 * row] == -kInfinity;",
        "const bool dead = row >= f.m || t.lse[2 * row] == -kInfinity || (R == 2 && row + 1 == f.m && r == 0);",
        f"{GRADS} -k test_every_tail",
    ),
    Mutation(
        "what rounding took from the log-sum-exp left out",
        GRAD_KERNEL,
        "p[r] = exp2_falling<L>(L::fma(x, log2e, rest[r]));",
        "p[r] = exp2_falling<L>(L::mul(x, log2e));",
        "tests/test_attention.py -k test_gradients_of_rows_of_the_lowest_number",
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
        "return rows.begin < begin || h.head > kv * (d.H / d.Hkv);",
        "return rows.begin < begin;",
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
        "      for (i64 j = t.begin; j < from[i]; j += W) Rows::store(out, j, L::zero());\n",
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
        "tiles: parts of P in the wrong order",
        TILES,
        "return (j / kTileDepth * kParts + part) * kTileDepth + j % kTileDepth;",
        "return (j / kTileDepth * kParts + kParts - 1 - part) * kTileDepth + j % kTileDepth;",
        f"{NATIVE} -k 'test_every_tail and f32_split'",
    ),
    Mutation(
        "tiles: the third part of dS left out",
        TILES,
        "    for (int part = 0; part < kParts; ++part) {\n",
        "    for (int part = 0; part < kParts && part < 2; ++part) {\n",
        f"{SPLIT} -k test_gradients_no_worse",
    ),
    Mutation(
        "tiles: rows behind the last query keep what stood there",
        GRAD,
        "      if (turned()) x.rows = static_cast<int>(round_up(m, kernel.k_step));\n",
        "",
        f"{GRADS} -k '(test_every_tail or test_every_pair) and amx'",
    ),
    Mutation(
        "tiles: the next strip's scores over those at hand",
        ATTENTION_RUN,
        "x.s = scratch.s + count % buffers * kernel.mr * (p.key_block + 16)",
        "x.s = scratch.s",
        f"{NATIVE} -k 'test_many_query_blocks and amx'",
    ),
    Mutation(
        "tiles: NaN among the keys multiplied in parts",
        ATTENTION_RUN,
        "    limited |= is_large(peak, nr);\n",
        "",
        f"{SPLIT} -k test_special_values",
    ),
    Mutation(
        "tiles: tiny values lose their lower parts",
        ATTENTION_RUN,
        "is_large(peak, nr) || is_tiny(peak, nr)",
        "is_large(peak, nr)",
        f"{SPLIT} -k test_tiny_values",
    ),
    Mutation(
        "tiles: rows of dQ that a block by FMA begins are not cleared",
        GRAD,
        "first_key(tiles, row, m) >= key) clear(dq.below(row), m, d.D);",
        "first_key(tiles, row, m) > key) clear(dq.below(row), m, d.D);",
        f"{SPLIT} -k test_blocks_by_fma",
    ),
    Mutation(
        "tiles: a strip by FMA begins anew",
        ATTENTION_RUN,
        "    std::copy_n(sum, y.m, x.sum + row);\n",
        "",
        f"{SPLIT} -k test_blocks_by_fma",
    ),
]
