"""Bugs to plant in the direct kernels of depthwise and grouped convolutions."""

from mutation import Mutation

TESTS = "tests/test_conv_direct.py"
DEPTHWISE = "csrc/conv/cpu/depthwise.cc"
GROUPED = "csrc/conv/cpu/grouped.cc"

MUTATIONS = [
    Mutation(
        "a column of the interior read past the edge of the image",
        DEPTHWISE,
        "(size - right + a.in_step - 1) / a.in_step) : 0;",
        "(size - right + a.in_step - 1) / a.in_step + 1) : 0;",
        f"{TESTS} -k 'test_tails_of_vectors_and_strips and depthwise_f32'",
    ),
    Mutation(
        "the last chunk of a weight gradient left out",
        GROUPED,
        "for (i64 p = 1; p < chunks; ++p) sum +=",
        "for (i64 p = 1; p + 1 < chunks; ++p) sum +=",
        f"{TESTS} -k 'test_tails_of_vectors_and_strips and f32'",
    ),
    Mutation(
        "accumulators of deep sums not added up",
        GROUPED,
        "t.accumulate = k > 0;",
        "t.accumulate = false;",
        f"{TESTS} -k 'test_sizes_of_groups and few9'",
    ),
    Mutation(
        "scratch around an image not cleared",
        GROUPED,
        "if (!inside(0) || !inside(1) || !inside(2)) std::memset",
        "if (!inside(0) && !inside(1) && !inside(2)) std::memset",
        f"{TESTS} -k 'test_strides_dilation_and_padding and grouped_f32'",
    ),
    Mutation(
        "lanes past the end of a row read",
        "csrc/conv/cpu/kernel_grouped.h",
        "[&](const float* p) __attribute__((always_inline)) { return L::load(p, mask); }",
        "[&](const float* p) __attribute__((always_inline)) { return L::load(p); }",
        f"{TESTS} -k 'test_tails_of_vectors_and_strips and grouped_f32'",
    ),
    Mutation(
        "odd channels of a split bfloat16 vector not rounded",
        "csrc/simd/vec_avx512.h",
        "_mm512_mask_blend_epi16(0xaaaaaaaa, low, rounded_bf16(odd))",
        "_mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(odd))",
        f"{TESTS} -k 'test_tails_of_vectors_and_strips or test_within_the_bound'",
    ),
]
