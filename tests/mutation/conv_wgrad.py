"""Bugs to plant in the weight gradient of convolutions."""

from mutation import Mutation

WGRAD = "csrc/conv/cpu/wgrad.cc"
TILES = "csrc/conv/cpu/wgrad_tiles.cc"
PLAN = "csrc/conv/cpu/wgrad_plan.cc"
PART = "csrc/conv/cpu/wgrad_part.h"
PACK = "csrc/conv/cpu/wgrad_pack.cc"
FLAT = "csrc/conv/cpu/wgrad_flat.cc"
TILE = "csrc/conv/cpu/kernel_wgrad.h"
TESTS = "tests/test_conv_wgrad.py"
SPLIT = "tests/test_conv_split.py"

MUTATIONS = [
    Mutation(
        "packed pixels reach over the next tap's",
        PLAN,
        "  p.pitch = lines <= width && copies == 1 ? lines : round_up(lines, width);",
        "  p.pitch = lines <= width ? lines : round_up(lines, width);",
        f"{TESTS} -k 'test_exact and (dilated or around_tiles)'",
    ),
    Mutation(
        "padding on the left one pixel short",
        PART,
        "std::min(count, ceil_div(-start, step))",
        "std::min(count, -start / step)",
        f"{TESTS} -k 'test_exact and strided'",
    ),
    Mutation(
        "few channels of pairs widened",
        PACK,
        " && x.d.dtype == DType::bf16 && x.kernel.k_unit == 1)",
        " && x.d.dtype == DType::bf16)",
        f"{TESTS} -k 'test_exact and (one or around_tiles)'",
    ),
    Mutation(
        "the sums of one chunk left out",
        WGRAD,
        "for (i64 chunk = 1; chunk < p.chunks; ++chunk)",
        "for (i64 chunk = 1; chunk + 1 < p.chunks; ++chunk)",
        f"{TESTS} -k test_exact_around_blocks",
    ),
    Mutation(
        "each block's sums replace those before",
        WGRAD,
        "run_block(x, block, next, s, j > 0);",
        "run_block(x, block, next, s, false);",
        f"{TESTS} -k test_exact_around_blocks",
    ),
    Mutation(
        "chunks by the number of threads",
        PLAN,
        "  if (floats * 4 <= kSmall) p.chunks = std::max<i64>(p.chunks, 4);",
        "  if (floats * 4 <= kSmall) p.chunks = std::max<i64>(4, threads);",
        f"{TESTS} -k 'test_bits or test_workspace'",
    ),
    Mutation(
        "the bias of a block's first row",
        WGRAD,
        "ConvWgradRun all = {0, 0, b.count * b.steps};",
        "ConvWgradRun all = {0, 0, b.steps};",
        f"{TESTS} -k 'test_exact and pixels'",
    ),
    Mutation(
        "sums begin with what lay in scratch",
        TILE,
        "t.accumulate ? L::add(L::load(c + v * W), acc[i][v]) : acc[i][v]",
        "L::add(L::load(c + v * W), acc[i][v])",
        f"{TESTS} -k test_exact_around_tiles",
    ),
    Mutation(
        "padding on the right of a tile's pixels not cleared",
        TILES,
        "      std::memset(dst + line.end * item, 0, bytes(b.width - line.end));\n",
        "",
        f"{SPLIT} -k test_tails_of_tiles_wgrad",
    ),
    Mutation(
        "the largest magnitudes of the first chunk for all",
        WGRAD,
        "peaks[j] = std::max(peaks[j], f.sum[x.sum_floats() + j]);",
        "peaks[j] = std::max(peaks[j], 0.0f);",
        f"{SPLIT} -k 'test_special_and_tiny_values_wgrad and chunks'",
    ),
    Mutation(
        "pixels that follow each other in memory taken for those of any rows",
        TILES,
        "    if (r > 0 && p.lines[r].first != p.lines[r - 1].first + bytes) return false;\n",
        "",
        f"{SPLIT} -k test_tails_of_tiles_wgrad",
    ),
    Mutation(
        "special sums of the weight gradient kept",
        WGRAD,
        "      if (p.chunks > 1 || !numbers) continue;\n      repair(x, s);\n",
        "      if (p.chunks > 1 || !numbers) continue;\n",
        f"{SPLIT} -k 'test_special_and_tiny_values_wgrad and one'",
    ),
    Mutation(
        "the last pixel of a row cleared with the row of padding behind it",
        FLAT,
        "copy + (pixel / 2 + odd) * x_row;",
        "copy + pixel / 2 * x_row;",
        f"{TESTS} -k 'test_exact and flat'",
    ),
    Mutation(
        "pairs of odd pixels taken from one pixel before",
        FLAT,
        "(pixel + 1) / 2 * t.b_row",
        "pixel / 2 * t.b_row",
        f"{TESTS} -k 'test_exact and flat'",
    ),
    Mutation(
        "what some taps meet taken for what all do",
        FLAT,
        "pixels(low, std::max(low, high), met);",
        "pixels(begin, std::max(low, high), met);",
        f"{TESTS} -k test_tiny_values_that_some_taps_meet",
    ),
    Mutation(
        "tiny values of dy in float32 relied on",
        FLAT,
        "least_peak(y, x.k.size())",
        "1.0f",
        f"{TESTS} -k test_tiny_values_that_some_taps_meet",
    ),
    Mutation(
        "boxes of fewer taps with rows closer together",
        FLAT,
        "    l.each = each;\n",
        "",
        f"{TESTS} -k 'test_bits_do_not_depend_on_threads and flat'",
    ),
    Mutation(
        "zeros between rows times NaN kept",
        WGRAD,
        "if (p.flat && x.blocks.size() > 0 && !trusted(x, s)) numbers = false;",
        "",
        f"{TESTS} -k 'test_special_values'",
    ),
    Mutation(
        "parts of a row begin with what the part before left there",
        FLAT,
        "!inside || x.p.segments > 1",
        "!inside",
        f"{TESTS} -k 'test_exact and flat'",
    ),
]
