"""Bugs to plant in the direct kernels of depthwise and grouped convolutions."""

from mutation import Mutation

TESTS = "tests/test_conv_direct.py"
DEPTHWISE = "csrc/conv/cpu/depthwise.cc"
DEPTHWISE_GRAD = "csrc/conv/cpu/depthwise_wgrad.cc"
DIRECT = "csrc/conv/cpu/direct.cc"
GROUPED = "csrc/conv/cpu/grouped.cc"
GROUPED_PACK = "csrc/conv/cpu/grouped_pack.cc"

SLIDE = "csrc/conv/cpu/kernel_slide.h"

MUTATIONS = [
    Mutation(
        "a column behind a row's end in a window that slides",
        SLIDE,
        "lo = lo > 0 ? lo : 0, hi = hi < count ? hi : count;",
        "lo = lo > 0 ? lo : 0, hi = hi < count ? hi + 1 : count;",
        f"{TESTS} -k 'test_windows_that_slide and depthwise_f32'",
    ),
    Mutation(
        "weights of a window's taps without the step of a phase",
        DEPTHWISE,
        "u.w_col = p.aw->tap_inc * width,",
        "u.w_col = width,",
        f"{TESTS} -k 'test_windows_that_slide and depthwise_f32'",
    ),
    Mutation(
        "columns of dy behind a strip's end in a weight gradient that slides",
        SLIDE,
        "    if (j < cols) lanes.load(dy + j * a.dy_col, g[j]);",
        "    lanes.load(dy + j * a.dy_col, g[j]);",
        f"{TESTS} -k 'test_windows_that_slide and depthwise_f32'",
    ),
    Mutation(
        "a row above the image in a weight gradient read in place",
        DEPTHWISE_GRAD,
        "const auto holds = [&](i64 ih) { return ih >= 0 && ih < d.in[1]; };",
        "const auto holds = [&](i64 ih) { return ih < d.in[1]; };",
        f"{TESTS} -k 'test_windows_that_slide and depthwise_f32'",
    ),
    Mutation(
        "the last channels of a window that slides with all their lanes",
        SLIDE,
        "left < L::width ? static_cast<int>(left) : L::width",
        "L::width",
        f"{TESTS} -k 'test_windows_that_slide and depthwise_f32 or test_nothing_outside'",
    ),
    Mutation(
        "the last channels of a split bfloat16 window with all their lanes",
        SLIDE,
        "left >= channels ? channels : static_cast<int>(left)",
        "left >= 0 ? channels : static_cast<int>(left)",
        f"{TESTS} -k 'test_nothing_outside and depthwise_bf16'",
    ),
    Mutation(
        "the last channel of an odd number not written by AVX2",
        "csrc/simd/vec_avx2.h",
        "if (m.n % 2 == 0) return;",
        "if (m.n % 2 < 2) return;",
        f"{TESTS} -k 'test_tails_of_channels and depthwise_bf16'",
    ),
    Mutation(
        "channels behind the first step of the last ones left out",
        SLIDE,
        "for (; c < a.channels; c += Last::channels)",
        "if (c < a.channels)",
        f"{TESTS} -k 'test_tails_of_vectors_and_strips and f32'",
    ),
    Mutation(
        "rows of a phase turned over as if they followed each other",
        DEPTHWISE,
        "out.step[1] == cols ? rows : 1",
        "out.step[1] >= cols ? rows : 1",
        f"{TESTS} -k 'test_strides_dilation_and_padding and depthwise_f32'",
    ),
    Mutation(
        "columns of a phase laid over the first's",
        DEPTHWISE,
        "(h - p.h0) * line + aw.out_first * p.channels : 0",
        "(h - p.h0) * line : 0",
        f"{TESTS} -k 'test_strides_dilation_and_padding and depthwise_f32'",
    ),
    Mutation(
        "odd channels of few left out of a weight gradient that is taken apart",
        DEPTHWISE_GRAD,
        "for (i64 c = 0; c < row; c += ops.width) {",
        "for (i64 c = 0; c < channels; c += ops.width) {",
        f"{TESTS} -k 'test_tails_of_channels and depthwise_bf16'",
    ),
    Mutation(
        "a column of the interior read past the edge of the image",
        DEPTHWISE,
        "ceil_div(last - right, a.in_step)) : 0;",
        "ceil_div(last - right, a.in_step) + 1) : 0;",
        f"{TESTS} -k 'test_tails_of_vectors_and_strips and depthwise_f32'",
    ),
    Mutation(
        "the last chunk of a weight gradient left out",
        DIRECT,
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
        GROUPED_PACK,
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
