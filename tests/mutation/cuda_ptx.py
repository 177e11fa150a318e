"""Bugs to plant in csrc/ptx: in instructions and their twins, and in what the twin is there to notice.

Headers that every kernel includes make everything be compiled again: few of those.
"""

from mutation import Mutation

FIBER = "csrc/ptx/twin/fiber.cc"
PTX = "tests/cuda/test_cuda_ptx.py"
TWIN = "tests/cuda/test_cuda_twin.py"

MUTATIONS = [
    Mutation(
        "twin: a copy lands with the group before it",
        FIBER,
        "if (c.group >= done) continue;",
        "if (c.group > done) continue;",
        f"{TWIN} -k test_a_race_shows",
    ),
    Mutation(
        "twin: a copy is there at once",
        FIBER,
        "  std::memset(dst, 0xff, static_cast<std::size_t>(bytes));\n",
        "  std::memcpy(dst, src, static_cast<std::size_t>(valid));\n",
        f"{TWIN} -k test_a_race_shows",
    ),
    Mutation(
        "twin: a barrier lets go one thread too early",
        FIBER,
        "if (static_cast<int>(b.waiting.size()) == threads) ++b.round, wake(&b.waiting);",
        "if (static_cast<int>(b.waiting.size()) == threads - 1) ++b.round, wake(&b.waiting);",
        f"{TWIN} -k test_without_the_bug",
    ),
    Mutation(
        "twin: what a copy leaves out is not zeroed",
        FIBER,
        "    std::memset(static_cast<char*>(c.dst) + c.valid, 0, static_cast<std::size_t>(c.bytes - c.valid));\n",
        "",
        "tests/cuda/test_cuda_gemm.py -k 'test_aligned_rows_that_end and bf16_16x64'",
    ),
    Mutation(
        "twin: lanes of a warp at different instructions go on",
        FIBER,
        'if (std::strcmp(w.name, name) != 0) fail("lanes of a warp are at different instructions");',
        "",
        f"{TWIN} -k test_what_would_hang",
    ),
    Mutation(
        "twin: rows and columns of A's fragments swapped",
        "csrc/ptx/mma.cuh",
        "A[g + r % 2 * 8][2 * t + r / 2 * 8 + e]",
        "A[g + r / 2 * 8][2 * t + r % 2 * 8 + e]",
        f"{PTX} -k test_fragments",
    ),
    Mutation(
        "lanes of a sum keep what they hand on",
        "csrc/ptx/shuffle.cuh",
        "shuffle_xor(upper ? low : high, mask)",
        "shuffle_xor(upper ? high : low, mask)",
        f"{PTX} -k test_sums",
    ),
    Mutation(
        "rounds ties away from zero",
        "csrc/ptx/convert.cuh",
        "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16",
        "(bits + 0x8000u) >> 16",
        "tests/cuda/test_cuda_gemm.py -k 'test_few_rows_by_many and bf16_dot_2x4'",
    ),
]
