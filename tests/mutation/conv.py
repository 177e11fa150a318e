"""Bugs to plant in convolution."""

from mutation import Mutation

DENSE = "csrc/conv/cpu/dense.cc"
BAND = "csrc/conv/cpu/dense_band.cc"
BANDS = "csrc/conv/cpu/dense_band.h"
LINES = "csrc/conv/cpu/dense_problem.h"
STRIPS = "csrc/conv/cpu/dense_strips.cc"
PACK = "csrc/conv/cpu/dense_pack.cc"
PLAN = "csrc/conv/cpu/plan.cc"
DENSE_PLAN = "csrc/conv/cpu/dense_plan.cc"
KERNEL = "csrc/conv/cpu/kernel.h"
BIND = "csrc/bind/conv.cc"
TILES = "csrc/conv/cpu/kernel_amx.h"
PROBLEM = "csrc/conv/desc.cc"
CHECKS = "csrc/bind/conv_problem.cc"
TESTS = "tests/test_conv_native.py"
SPLIT = "tests/test_conv_split.py"

MUTATIONS = [
    Mutation(
        "taps of few channels gathered without the stride",
        BAND,
        "b.pixel_step = axis(2).in_step * channels_",
        "b.pixel_step = channels_",
        f"{TESTS} -k 'test_grid_is_exact and conv_bf16_6x64_avx512bf16 and forward'",
    ),
    Mutation(
        "a row of few channels staged without what is padding behind it",
        BAND,
        "std::memset(to + end * pixel, 0, bytes((positions - end) * pixel));",
        "std::memset(to + end * pixel, 0, 0);",
        f"{TESTS} -k 'test_grid_is_exact and conv_bf16_6x64_avx512bf16 and forward'",
    ),
    Mutation(
        "pixels of an odd number of channels copied in one line",
        KERNEL,
        "t.row * unit == t.channels",
        "t.row * unit <= t.channels + 1",
        f"{TESTS} -k 'test_grid_is_exact and conv_bf16_6x64_avx512bf16 and forward'",
    ),
    Mutation(
        "an image's last column taken for padding",
        LINES,
        "(size - 1 - l.first) / l.stride + 1",
        "(size - 1 - l.first) / l.stride",
        f"{TESTS} -k 'test_grid_is_exact and f32'",
    ),
    Mutation(
        "padding before the first column not cleared",
        BAND,
        "    std::fill_n(out, begin * floats_, 0.0f);\n",
        "",
        f"{TESTS} -k 'test_grid_is_exact and f32'",
    ),
    Mutation(
        "taps of a transposed phase in rising order",
        PROBLEM,
        "dilation / g, s, phase, last, -q}",
        "dilation / g, s, phase, t, q}",
        f"{TESTS} -k 'test_grid_is_exact and f32'",
    ),
    Mutation(
        "kernel steps of a dilated kernel forgotten along the height",
        BANDS,
        "p_.shared[1] ? t1 * axis(1).tap_step : 0",
        "p_.shared[1] ? t1 : 0",
        f"{TESTS} -k 'test_grid_is_exact and f32'",
    ),
    Mutation(
        "rows at uneven steps read as if they were even",
        DENSE,
        "if (rows[i] - rows[i - 1] != step) return 0;",
        "if (i == 1 && rows[i] - rows[i - 1] != step) return 0;",
        f"{TESTS} -k 'test_grid_is_exact and conv_bf16_32x32_amx and forward'",
    ),
    Mutation(
        "pixels between the rows of the band written, too",
        STRIPS,
        "h < rows_ ? width_ : 0",
        "width_",
        "tests/test_conv_strips.py -k test_exact",
    ),
    Mutation(
        "NaN of one group spread over those it is merged with",
        DENSE,
        "    if (!finite_) sum_apart();\n",
        "",
        "tests/test_conv_groups.py -k 'stays_in_its_group'",
    ),
    Mutation(
        "rows of tail columns reach those between the rows of the band",
        "csrc/gemm/cpu/kernel_strip.h",
        "t.row_at[i + count] >= 0 && ",
        "",
        f"{TESTS} -k 'test_results_do_not_depend_on_threads and bfloat16 and channels_last and forward'",
    ),
    Mutation(
        "padding that two rows share taken from both",
        LINES,
        "l.each - std::min(l.begin, l.positions - l.end)",
        "l.each - l.begin",
        "tests/test_conv_strips.py -k test_exact",
    ),
    Mutation(
        "padding beyond all taps shared by outputs",
        LINES,
        "std::max(n, l.each - ",
        "std::max<i64>(0, l.each - ",
        "tests/test_conv_strips.py -k test_exact",
    ),
    Mutation(
        "every tap of a stride in the first sub-image",
        BANDS,
        "(h % h_.step * w_.step + w % w_.step) * sub_pixels_",
        "0 * (h % h_.step * w_.step + w % w_.step) * sub_pixels_",
        f"{TESTS} -k 'test_grid_is_exact and conv_bf16_32x32_amx and forward'",
    ),
    Mutation(
        "tiny values in strips relied on",
        STRIPS,
        "if (!sums.sum && band_peak_ && summed && tiny()) return false;",
        "",
        "tests/test_conv_strips.py -k test_tiny_values",
    ),
    Mutation(
        "sums of blocks of channels written, not added",
        STRIPS,
        "t_.finish.accumulate = c0 > 0;",
        "",
        "tests/test_conv_strips.py -k test_exact",
    ),
    Mutation(
        "every block of channels finished",
        STRIPS,
        "c0 + count == x_.channels",
        "true",
        "tests/test_conv_strips.py -k test_exact",
    ),
    Mutation(
        "weights of the first channels for every block of them",
        STRIPS,
        " + all_taps() * x_.units(c0) * kernel_.nr",
        "",
        "tests/test_conv_strips.py -k test_exact",
    ),
    Mutation(
        "special sums of strips in parts kept",
        STRIPS,
        "return waiting_.special == 0;",
        "return true;",
        "tests/test_conv_strips.py -k test_special_values",
    ),
    Mutation(
        "a strip that ends with the image read behind it",
        STRIPS,
        "in_place_ && m % 16 != 0",
        "false",
        f"{SPLIT} -k test_nothing_behind_an_image_is_read",
    ),
    Mutation(
        "a run of channels meets NaN of the group behind",
        BANDS,
        "merged % group_turns() == only_ / p_.merge",
        "only_ / p_.merge == 0",
        "tests/test_conv_groups.py -k 'stays_in_its_group'",
    ),
    Mutation(
        "groups that are taken as one all get the weights of the first",
        "csrc/conv/cpu/dense_pack.cc",
        "(group * x.p.merge + g) * rows * w.n_step",
        "group * x.p.merge * rows * w.n_step",
        "tests/test_conv_groups.py -k 'groups_are_exact and conv_bf16_32x32_amx'",
    ),
    Mutation(
        "what the processor rounds to zero narrowed by it",
        "csrc/simd/vec_avx512bf16.h",
        "    if (__builtin_expect(some, 0)) return VecAvx512::store(p, x, y);\n",
        "",
        "tests/test_gemm_epilogue.py -k 'subnormal and amx'",
    ),
    Mutation(
        "the sums of a block of channels lost",
        DENSE,
        "t.run = run, t.c_row = sum_row_, t.accumulate = started_;",
        "t.run = run, t.c_row = sum_row_, t.accumulate = false;",
        f"{TESTS} -k 'test_blocks_of and f32'",
    ),
    Mutation(
        "a short last product of a run",
        DENSE,
        "          tiles(position + r0 * run + k, runs, r1 - r0, std::min(piece, run - k));",
        "          tiles(position + r0 * run + k, runs, r1 - r0, piece);",
        f"{TESTS} -k 'test_blocks_of and f32'",
    ),
    Mutation(
        "an odd last channel paired with its neighbour's",
        "csrc/conv/cpu/kernel_pairs.h",
        "c + 1 < t.channels ? s[(c + 1) * t.c_step] : bf16{0}",
        "s[(c + 1) * t.c_step]",
        f"{TESTS} -k 'test_guard_pages'",
    ),
    Mutation(
        "the residual of the pixel before",
        KERNEL,
        "static_cast<const T*>(t.residual) + at : nullptr",
        "static_cast<const T*>(t.residual) + at - t.i_step : nullptr",
        f"{TESTS} -k 'test_epilogue and contiguous'",
    ),
    Mutation(
        "the bias of the first group for all",
        DENSE,
        "const i64 column = group_ * x_.columns + k0_",
        "const i64 column = k0_",
        f"{TESTS} -k 'test_grid_is_exact and f32'",
    ),
    Mutation(
        "blocks of channels that follow the number of threads",
        DENSE_PLAN,
        "  balance(d, b, columns, p.threads);\n",
        "  balance(d, b, columns, p.threads);\n  p.c_block = std::max<i64>(2, p.c_block / p.threads / 2 * 2);\n",
        f"{TESTS} -k 'do_not_depend_on_threads'",
    ),
    Mutation(
        "a thread's scratch above its limit",
        DENSE_PLAN,
        "p.per_thread_bytes() > kConvThreadBytes ||",
        "p.per_thread_bytes() > 4 * kConvThreadBytes ||",
        f"{TESTS} -k 'test_workspace'",
    ),
    Mutation(
        "a dilation that overflows",
        CHECKS,
        "!product(desc.kernel[i] - 1, desc.dilation[i], &reach) || reach > kMost",
        "!product(desc.kernel[i] - 1, desc.dilation[i], &reach) && reach > kMost",
        f"{TESTS} -k 'hostile'",
    ),
    Mutation(
        "a second tile of gathered pixels laid over the first",
        TILES,
        "k += 16, panel += 16 * kBlock)",
        "k += 16, panel += kTileFloats)",
        f"{SPLIT} -k 'test_tails_of_tiles and not wgrad and contiguous'",
    ),
    Mutation(
        "packed channels behind the last not zero",
        TILES,
        "tap < t.taps && t.channels % kTileDepth != 0",
        "tap < t.taps && t.channels % kTileDepth == 0",
        f"{SPLIT} -k 'test_frozen_packs and forward'",
    ),
    Mutation(
        "largest magnitudes of one tap for all",
        BAND,
        "peak[tap_at(t1, t2)]",
        "peak[0 * tap_at(t1, t2)]",
        f"{SPLIT} -k 'ordinary or test_special_and_tiny_values and f32_split'",
    ),
    Mutation(
        "tiny columns of a pack as they are",
        PACK,
        "(tiny(peak[j]) ? kTinyScale : 1)",
        "1",
        f"{SPLIT} -k 'test_frozen_packs and ieee'",
    ),
    Mutation(
        "a tap computed again beside the pixel",
        DENSE,
        "axis(i).first + tap[i] * axis(i).tap_step;\n      if (z < 0",
        "axis(i).first + tap[i];\n      if (z < 0",
        f"{SPLIT} -k 'test_computed_again'",
    ),
    Mutation(
        "convolution at the precision of matrix products",
        BIND,
        "desc.precision = asked_precision(desc.dtype, Switch::conv);",
        "desc.precision = asked_precision(desc.dtype);",
        f"{SPLIT} -k 'test_torchs_switch and tf32'",
    ),
    Mutation(
        "positions behind the image's last not cleared where taps share a tile",
        BAND,
        "  std::memset(to + end * pixel, 0, bytes((positions - end) * pixel));\n",
        "  std::memset(to + end * pixel, 0, bytes(0 * (positions - end) * pixel));\n",
        f"{SPLIT} -k 'test_few_channels and conv_bf16'",
    ),
    Mutation(
        "tiles for a handful of pixels",
        PLAN,
        "if (most == below || cost(d, *most) < cost(d, *below)) return most;",
        "if (most == below || cost(d, *most) > 0) return most;",
        f"{SPLIT} -k test_plans",
    ),
]
