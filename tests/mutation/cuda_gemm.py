"""Bugs to plant in GEMM on CUDA, linear's part of it."""

from mutation import Mutation

SM80 = "csrc/gemm/cuda/kernel_sm80.cuh"
TILE = "csrc/gemm/cuda/kernel_tile.cuh"
DOT = "csrc/gemm/cuda/kernel_dot.cuh"
PLAN = "csrc/gemm/cuda/plan.cc"
RUN = "csrc/gemm/cuda/run.cu"
TEST = "tests/cuda/test_cuda_gemm.py"
PLANS = "tests/cuda/test_cuda_gemm_plan.py"
ALIGNED = f"{TEST} -k 'test_aligned_operands and bf16_64x64'"

MUTATIONS = [
    Mutation(
        "CUDA: no barrier between the copies of a slot and its products",
        SM80,
        "      copy_wait<S::slots - 2>();\n      block_sync(S::threads);\n",
        "      copy_wait<S::slots - 2>();\n",
        ALIGNED,
    ),
    Mutation(
        "CUDA: waits for one group of copies too few",
        SM80,
        "copy_wait<S::slots - 2>();",
        "copy_wait<S::slots - 1>();",
        ALIGNED,
    ),
    Mutation(
        "CUDA: sums overwrite slots that are still read",
        SM80,
        "  copy_wait<0>();\n  block_sync(S::threads);\n",
        "  copy_wait<0>();\n",
        ALIGNED,
    ),
    Mutation(
        "CUDA: halves of B's fragments swapped",
        SM80,
        "const int along = line + (a ? low : high), deep = a ? high : low;",
        "const int along = line + low, deep = high;",
        ALIGNED,
    ),
    Mutation(
        "CUDA: a chunk that ends behind K is copied whole",
        SM80,
        "left < Tile::chunk ? static_cast<int>(left * sizeof(T)) : 16;",
        "16;",
        f"{TEST} -k 'test_aligned_rows_that_end and bf16_64x64'",
    ),
    Mutation(
        "CUDA: the last run of multiply-adds is not added",
        SM80,
        "if ((s + 1) % (kPromoteDepth / S::depth) == 0 || s + 1 == steps) sums.promote(&part);",
        "if ((s + 1) % (kPromoteDepth / S::depth) == 0) sums.promote(&part);",
        f"{TEST} -k 'test_aligned_rows_that_end and f32_fma_64x64'",
    ),
    Mutation(
        "CUDA: one product of parts is left out",
        TILE,
        "static constexpr int count = 6;",
        "static constexpr int count = 5;",
        "tests/cuda/test_cuda_tile.py -k 'three_parts or parts_of_float32'",
    ),
    Mutation(
        "CUDA: rows of a slot shorter than a line of banks meet in them",
        TILE,
        "return row / rows_of_line % (chunks < 8 ? chunks : 8);",
        "return row % (chunks < 8 ? chunks : 8);",
        f"{TEST} -k 'test_aligned_operands and bf16_128x128'",
    ),
    Mutation(
        "CUDA: magnitudes of the first run of K stand for all",
        RUN,
        "peaks[s * p.batches * lines + p.M + j + e]",
        "peaks[p.M + j + e]",
        f"{TEST} -k 'test_tiny_values and split_64x64'",
    ),
    Mutation(
        "CUDA: partial sums of a batch share a place",
        RUN,
        "p.partial + s * step + row * p.partial_row + j",
        "p.partial + s * step + i * p.partial_row + j",
        f"{TEST} -k 'test_split_k and bf16_16x64'",
    ),
    Mutation(
        "CUDA: a workspace for one matrix of the batch",
        PLAN,
        "p.partial_bytes = round_up(p.splits * d.batch * d.M * p.partial_row * 4, 256);",
        "p.partial_bytes = round_up(p.splits * d.M * p.partial_row * 4, 256);",
        f"{TEST} -k 'test_split_k and bf16_16x64'",
    ),
    Mutation(
        "CUDA: kernels of few rows take any storage order",
        PLAN,
        "return !kernel.dot || along_k(d);",
        "return true;",
        f"{PLANS} -k test_plans_of_few_rows",
    ),
    Mutation(
        "CUDA: a plan is kept for every GPU",
        PLAN,
        "along_k(d), gpu.sm, gpu.multiprocessors,",
        "along_k(d), 0, 0,",
        f"{PLANS} -k test_plans_of_few_rows",
    ),
    Mutation(
        "CUDA: 16-byte loads of rows that are not aligned to them",
        RUN,
        "o.vector = k_step == 1 && (lines == 1 || line_step % chunk == 0);",
        "o.vector = k_step == 1;",
        f"{TEST} -k 'test_few_rows_by_many and bf16_dot_2x4'",
    ),
    Mutation(
        "CUDA: few rows read behind K",
        DOT,
        "few.vector && count == chunk, count);",
        "few.vector, count);",
        f"{TEST} -k 'test_few_rows_by_many and bf16_dot_2x4'",
    ),
    Mutation(
        "CUDA: sums of a block are added before all are there",
        DOT,
        "  block_sync(kDotThreads);\n",
        "",
        f"{TEST} -k 'test_few_rows_in_every_order and bf16_dot_2x4'",
    ),
    Mutation(
        "CUDA: a turned problem takes its bias by rows",
        DOT,
        "finish<T>(p, sum, at.c + i * p.c_row + j, j, 1);",
        "finish<T>(p, sum, at.c + i * p.c_row + j, i, 1);",
        f"{TEST} -k 'test_epilogue_of_few_columns and bf16_dot_2x4'",
    ),
]
