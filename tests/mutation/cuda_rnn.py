"""Bugs to plant in the recurrent CUDA kernels; their tests run on the host twin."""

from mutation import Mutation

KERNEL = "csrc/rnn/cuda/kernel.cuh"
CELL = "csrc/rnn/cuda/kernel_cell.cuh"
PRODUCT = "csrc/rnn/cuda/kernel_product.cuh"
LAYOUT = "csrc/rnn/cuda/layout.h"
RUN = "csrc/rnn/cuda/run.cu"
TESTS = "tests/cuda/test_cuda_rnn.py"
BOUNDS = "tests/cuda/test_cuda_rnn_bounds.py"

MUTATIONS = [
    Mutation(
        "h read before the other blocks have written it",
        KERNEL,
        "      wait();\n      group_product",
        "      group_product",
        f"{TESTS} -k 'twin and several_groups and gru_f32_16x32_resident'",
    ),
    Mutation(
        "sums overwritten while other warps still add them up",
        KERNEL,
        "+ unit, sum);\n      }\n      block_sync(kRnnThreads);\n",
        "+ unit, sum);\n      }\n",
        f"{TESTS} -k 'twin and several_groups and gru_f32_16x32_resident'",
    ),
    Mutation(
        "sums added up before all warps have stored theirs",
        PRODUCT,
        "= sum[m][n][r];\n  }\n  block_sync(kRnnThreads);\n",
        "= sum[m][n][r];\n  }\n",
        f"{TESTS} -k 'twin and several_groups and gru_f32_16x32_resident'",
    ),
    Mutation(
        "W multiplied before its copies have come",
        KERNEL,
        "    copy_wait<0>();\n    block_sync(kRnnThreads);\n",
        "    block_sync(kRnnThreads);\n    copy_wait<0>();\n",
        # not in parts of float32: what comes out as NaN is computed again
        f"{TESTS} -k 'twin and tails and gru_bf16_16x32_resident'",
    ),
    Mutation(
        "counter of the grid's barrier kept from one launch to the next",
        RUN,
        "      if (index) fill_zero(a_.arrived, p_.counter_bytes, stream_);\n",
        "",
        f"{TESTS} -k 'twin and many_sizes'",
    ),
    Mutation(
        "a new h over the one that others still read",
        RUN,
        "        if (b == from.buffers) {",
        "        if (b == 1) {",
        f"{TESTS} -k 'twin and several_groups and gru_f32_16x32_resident'",
    ),
    Mutation(
        "parts of W multiplied with the wrong parts of h",
        PRODUCT,
        "{b[a][low - p][n].x[2 * j], b[a][low - p][n].x[2 * j + 1]}",
        "{b[a][p][n].x[2 * j], b[a][p][n].x[2 * j + 1]}",
        f"{BOUNDS} -k 'twin and one_step and gru_f32_16x32_resident'",
    ),
    Mutation(
        "large products first",
        PRODUCT,
        "for (int low = parts - 1; low >= 0; --low)",
        "for (int low = 0; low < parts; ++low)",
        f"{BOUNDS} -k 'twin and 200 and rnn_f32_16x32_resident'",
    ),
    Mutation(
        "swapped halves of a fragment of h",
        PRODUCT,
        "{b[a][low - p][n].x[2 * j], b[a][low - p][n].x[2 * j + 1]}",
        "{b[a][low - p][n].x[2 * j + 1], b[a][low - p][n].x[2 * j]}",
        f"{TESTS} -k 'twin and tails and gru_f32_16x32_resident'",
    ),
    Mutation(
        "rows of W by FMA 8 apart taken for each other",
        PRODUCT,
        "* tiles * 64 + m * 64 + e * 32);",
        "* tiles * 64 + m * 64 + (1 - e) * 32);",
        f"{TESTS} -k 'twin and tails and gru_f32_fma_16x32_resident'",
    ),
    Mutation(
        "last block of K lost where a warp has fewer than the others",
        PRODUCT,
        "const int end = begin + each < blocks ? begin + each : blocks;",
        "const int end = begin + each <= blocks ? begin + each : begin;",
        f"{TESTS} -k 'twin and k_over_all_warps and lstm_f32_8x32_resident'",
    ),
    Mutation(
        "Inf left as its parts make it",
        PRODUCT,
        "    if (s - s == 0.0f) return s;\n",
        "    return s;\n",
        f"{TESTS} -k 'twin and infinities and rnn_f32_16x32_resident'",
    ),
    Mutation(
        "parts of tiny numbers flushed",
        PRODUCT,
        "kRnnSplits<T, parts> ? 16777216.0f : 1.0f",
        "kRnnSplits<T, parts> ? 1.0f : 1.0f",
        f"{TESTS} -k 'twin and tiny and rnn_f32_16x32_resident'",
    ),
    Mutation(
        "c of a sequence that begins taken from the one before it",
        CELL,
        "state = b < step.before ? a.c[b * a.H + j] : load_state<T>(a.c0, b, j);",
        "state = step.before > 0 ? a.c[b * a.H + j] : load_state<T>(a.c0, b, j);",
        f"{TESTS} -k 'twin and packed and reverse and lstm_f32_8x32_resident'",
    ),
    Mutation(
        "groups of W laid out for another number of blocks",
        "csrc/rnn/cuda/plan.cc",
        "bytes += ceil_div(p.product[i].groups, unit_blocks)",
        "bytes += p.product[i].groups / unit_blocks",
        f"{TESTS} -k 'twin and several_groups and gru_f32_16x32_resident'",
    ),
]
