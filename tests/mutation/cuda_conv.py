"""Bugs planted in CUDA convolution, seen on the host twin."""

from mutation import Mutation

CUDA = "csrc/conv/cuda"
INDEX, PLAN = f"{CUDA}/index.h", f"{CUDA}/plan.cc"
GATHER, WGRAD, LOAD, DEPTHWISE = (f"{CUDA}/kernel_{name}.cuh" for name in ("gather", "wgrad", "load", "depthwise"))
PLANS = "tests/cuda/test_cuda_conv_plan.py"
KERNELS = "tests/cuda/test_cuda_conv.py -k 'twin and "
ORDER = f"{KERNELS}test_the_order_of_threads_has_no_say and "

MUTATIONS = [
    Mutation(
        "sums written over tiles that other warps still multiply",
        GATHER,
        "    block_sync(threads);  // sums take the place of tiles that other warps may still multiply\n",
        "",
        f"{ORDER}(tile or step)'",
    ),
    Mutation(
        "sums read before other warps have written them",
        GATHER,
        "    block_sync(threads);  // for all\n",
        "",
        f"{ORDER}tile'",
    ),
    Mutation(
        "a table of rows read before it is written",
        GATHER,
        "    block_sync(threads);  // both tables\n",
        "",
        f"{ORDER}tile'",
    ),
    Mutation(
        "no barrier between the steps of a gather",
        GATHER,
        "      block_sync(threads);  // the step has come for all threads, and nobody reads the one before any more\n",
        "",
        f"{ORDER}(tile or element or held)'",
    ),
    Mutation(
        "a step multiplied before its copies have come",
        GATHER,
        "copy_wait<kStages - 2>();",
        "copy_wait<kStages - 1>();",
        f"{ORDER}tile'",
    ),
    Mutation(
        "elements of a step ahead stored to the step at hand",
        GATHER,
        "elements.put(k / each, a(to), args.by_pixel);",
        "elements.put(k / each, a(s), args.by_pixel);",
        f"{ORDER}held'",
    ),
    Mutation(
        "columns of a step ahead worked out into the table of the next",
        GATHER,
        "        cols[s * kConvDepth + thread_x()] =",
        "        cols[(s + 1) % kStages * kConvDepth + thread_x()] =",
        f"{KERNELS}test_tails_of_tiles and conv_bf16_64x64'",
    ),
    Mutation(
        "weights from one group to another are not zeros",
        GATHER,
        "      if (divide(&c, args.groups.by_channels) == group % args.groups.count)",
        "      divide(&c, args.groups.by_channels);",
        f"{KERNELS}test_merged_groups'",
    ),
    Mutation(
        "zeros times NaN of another group",
        GATHER,
        "bool again = args.groups.count > 1 && x != x;",
        "bool again = false;",
        f"{KERNELS}test_special_values_stay_in_their_group'",
    ),
    Mutation(
        "one chunk's sums forgotten",
        GATHER,
        "    for (int c = 0; c < args.chunks; ++c) sum +=",
        "    for (int c = 0; c + 1 < args.chunks; ++c) sum +=",
        f"{KERNELS}test_sums_in_chunks'",
    ),
    Mutation(
        "the strides of a thread's elements swapped",
        LOAD,
        "ElementWalk{t % rows, 0, t / rows, threads / rows}",
        "ElementWalk{t % rows, threads / rows, t / rows, 0}",
        f"{KERNELS}test_exact and contiguous and conv_bf16_64x64'",
    ),
    Mutation(
        "no barrier between the steps of wgrad",
        WGRAD,
        "      block_sync(threads);  // the step has come for all threads, and nobody reads the one before any more\n",
        "",
        f"{ORDER}wgrad'",
    ),
    Mutation(
        "a step of wgrad multiplied before its copies have come",
        WGRAD,
        "copy_wait<kStages - 2>();",
        "copy_wait<kStages - 1>();",
        f"{ORDER}wgrad'",
    ),
    Mutation(
        "tables of wgrad read before they are written",
        WGRAD,
        "    block_sync(threads);  // both tables\n",
        "",
        f"{ORDER}wgrad'",
    ),
    Mutation(
        "pixels beyond the last one summed into dw",
        WGRAD,
        "m < args.phase.pixels ? dy_offset(m) : -1;",
        "dy_offset(m);",
        f"{KERNELS}test_tails_of_wgrad_tiles'",
    ),
    Mutation(
        "dw of one group from another's channels",
        WGRAD,
        " || args.groups.by_columns.quotient(tile_m * kM + k) != own_group[r % 2]",
        " || own_group[r % 2] < 0",
        f"{KERNELS}test_merged_groups'",
    ),
    Mutation(
        "depthwise dw: a tap's sums overwritten while they are added",
        DEPTHWISE,
        "    block_sync(kDepthwiseThreads);  // before the next tap's\n",
        "",
        f"{ORDER}depthwise'",
    ),
    Mutation(
        "depthwise dw: sums added before they are there",
        DEPTHWISE,
        "    block_sync(kDepthwiseThreads);  // of all threads\n",
        "",
        f"{ORDER}depthwise'",
    ),
    Mutation(
        "depthwise dw: a table of taps read before it is written",
        DEPTHWISE,
        "  block_sync(kDepthwiseThreads);  // the table\n",
        "",
        f"{ORDER}depthwise'",
    ),
    Mutation(
        "quotients one too small",
        INDEX,
        "static_cast<std::uint32_t>((power + d - 1) / d)",
        "static_cast<std::uint32_t>(power / d)",
        f"{PLANS} -k test_division_by_multiplication",
    ),
    Mutation(
        "positions of an image wrap around at 32 bits",
        INDEX,
        "    row.offset += row.z[i] * x.step[i];",
        "    row.offset += static_cast<int>(row.z[i] * x.step[i]);",
        f"{PLANS} -k test_tensors_beyond_32_bits",
    ),
    Mutation(
        "a pixel met twice, its neighbour never",
        INDEX,
        "    at.j[i] = at.n - q * p.by_count[i].divisor;",
        "    at.j[i] = (at.n - q * p.by_count[i].divisor) & ~(i == 1);",
        f"{PLANS} -k test_every_pixel_meets_its_taps_once",
    ),
    Mutation(
        "workspace of one chunk's sums for all of them",
        PLAN,
        "p->partial_bytes = p->chunks > 1 ? aligned(p->chunks * sum_bytes) : 0;",
        "p->partial_bytes = p->chunks > 1 ? aligned(sum_bytes) : 0;",
        f"{PLANS} -k test_plans",
    ),
]
