"""Bugs in attention's CUDA kernels, run on the host twin."""

from mutation import Mutation

FORWARD = "csrc/attention/cuda/kernel_forward.cuh"
BACKWARD = "csrc/attention/cuda/kernel_backward.cuh"
COMMON = "csrc/attention/cuda/kernel_common.cuh"
PLAN = "csrc/attention/cuda/plan.cc"
TEST = "tests/cuda/test_cuda_attention.py"
GRADIENTS = "tests/cuda/test_cuda_attention_backward.py"
ORDER = f"{TEST} -k test_bits_do_not_depend_on_the_order"
GRADIENT_ORDER = f"{GRADIENTS} -k test_bits_do_not_depend_on_the_order"

MUTATIONS = [
    Mutation(
        "attention on CUDA: no barrier before K is read and V loaded",
        FORWARD,
        "    block_sync(kAttentionThreads);  // K is here, V is free\n",
        "",
        ORDER,
    ),
    Mutation(
        "attention on CUDA: no barrier before V is read and K loaded",
        FORWARD,
        "    block_sync(kAttentionThreads);  // V is here, K is free\n",
        "",
        ORDER,
    ),
    Mutation(
        "attention on CUDA: no wait for K",
        FORWARD,
        "    copy_wait<0>();\n    block_sync(kAttentionThreads);  // K is here",
        "    block_sync(kAttentionThreads);  // K is here",
        ORDER,
    ),
    Mutation(
        "attention on CUDA: no wait for V",
        FORWARD,
        "    copy_wait<0>();\n    block_sync(kAttentionThreads);  // V is here",
        "    block_sync(kAttentionThreads);  // V is here",
        ORDER,
    ),
    Mutation(
        "attention on CUDA: the maximum of a row is one lane's",
        FORWARD,
        "highest = warp_max<4>(highest);",
        "highest = warp_max<2>(highest);",
        f"{TEST} -k 'test_tails_of_rows_and_keys and bf16'",
    ),
    Mutation(
        "attention on CUDA: pieces are added without their maxima",
        FORWARD,
        "x = fma_rn(parts[s * step + 2 + d], exp2_approx((parts[s * step] - base) * p.factor), x);",
        "x += parts[s * step + 2 + d];",
        f"{TEST} -k 'test_tails_of_rows_and_keys and bf16_decode'",
    ),
    Mutation(
        "attention on CUDA: the last rows of a block are no edge",
        COMMON,
        "return end > s.Lk || last >= s.Lq ||",
        "return",
        f"{TEST} -k 'test_tails_of_rows_and_keys and bf16'",
    ),
    Mutation(
        "attention on CUDA: tf32 without its cross products",
        COMMON,
        "if (wanted > 1) product(0, 1)",
        "if (wanted > 2) product(0, 1)",
        "tests/cuda/test_cuda_attention_torch.py -k test_fewer_parts_keep_their_promise",
    ),
    Mutation(
        "attention on CUDA: Inf in K spoils the scores of float32",
        BACKWARD,
        "              repair_scores(s, a1, m0, b1, 0, p.D);\n",
        "",
        f"{GRADIENTS} -k 'test_a_key_that_infinity_hides and float32'",
    ),
    Mutation(
        "attention on CUDA: the workspace has no room for sums",
        PLAN,
        "(d.Dv + 2) * 4;",
        "(d.Dv + 1) * 4;",
        f"{TEST} -k test_plans",
    ),
    Mutation(
        "attention on CUDA: no barrier before a stage is read",
        BACKWARD,
        "              copy_wait<0>();\n            block_sync(kAttentionThreads);\n",
        "              copy_wait<0>();\n",
        GRADIENT_ORDER,
    ),
    Mutation(
        "attention on CUDA: no barrier before a stage is loaded again",
        BACKWARD,
        "            block_sync(kAttentionThreads);  // of this stage nobody reads any more\n",
        "",
        GRADIENT_ORDER,
    ),
    Mutation(
        "attention on CUDA: waits for one group too few",
        BACKWARD,
        "copy_wait<1>();",
        "copy_wait<2>();",
        GRADIENT_ORDER,
    ),
    Mutation(
        "attention on CUDA: no barrier before the mask's gradients are summed",
        BACKWARD,
        "      block_sync(kAttentionThreads);\n      const int sum_rows",
        "      const int sum_rows",
        f"{GRADIENTS} -k test_gradient_of_a_mask_is_summed_where_it_is_broadcast",
    ),
    Mutation(
        "attention on CUDA: small gradients of float16 are not lifted",
        BACKWARD,
        "ds[0][n][r] *= lift;",
        "ds[0][n][r] *= 1;",
        f"{GRADIENTS} -k test_small_gradients_survive_float16",
    ),
]
