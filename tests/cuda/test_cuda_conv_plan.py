"""CUDA convolution: index arithmetic and plans, on any machine."""

import itertools
import math
import random

import pytest
import torch

from conv_on_gpu import DTYPES, MODULE, PASSES, needs_module, plan, rows
from conv_reference import Conv

pytestmark = needs_module


# --- index arithmetic, on any machine --------------------------------------------------------------------------------
def test_division_by_multiplication():
    numbers = [0, 1, 2, 3, 5, 7, 31, 32, 33, 2**16 - 1, 2**16, 2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1]
    divisors = {1, 2, 3, 5, 6, 7, 9, 11, 641, 2**16 + 1, 6700417, 2**30 + 1, 2**31 - 1}
    divisors |= {2**k + d for k in range(2, 31) for d in (-1, 0, 1)}
    r = random.Random(1)
    divisors |= {r.randrange(1, 2**31) for _ in range(200)} | {r.randrange(1, 4096) for _ in range(200)}
    for d in divisors:
        # A quotient that is too large shows just below a multiple, one too small on it; most of all at the end.
        last = (2**31 - 1) // d * d
        near = [q * d + e for q in (1, 2, 3, r.randrange(1, 2**31) // d) for e in (-1, 0, 1)] + [last - 1, last]
        for n in numbers + near + [r.randrange(2**31) for _ in range(20)]:
            if 0 <= n < 2**31:
                assert MODULE.divide_fast(n, d) == n // d, (n, d)


def by_hand(c, pass_):
    """{written position: {(tap, channel, position read)}}: what the definition of a pass sums over."""
    kernel, taps = c.w.shape[2:], list(itertools.product(*map(range, c.w.shape[2:])))
    read, written = (c.x, c.dy) if pass_ != "dgrad" else (c.dy, c.x)
    found = {}

    def number(at, sizes):
        return sum(a * math.prod(sizes[i + 1 :]) for i, a in enumerate(at))

    for n in range(c.N):
        for o in itertools.product(*map(range, c.dy.shape[2:])):
            for t in taps:
                at = tuple(o[i] * c.stride[i] - c.padding[i] + t[i] * c.dilation[i] for i in range(len(o)))
                if all(0 <= a < s for a, s in zip(at, c.x.shape[2:], strict=True)):
                    to, source = (at, o) if pass_ == "dgrad" else (o, at)
                    pair = number(t, kernel), number((n, *source), (c.N, *read.shape[2:]))
                    found.setdefault(number((n, *to), (c.N, *written.shape[2:])), set()).add(pair)
    return found


@pytest.mark.parametrize("pass_", PASSES)
def test_every_pixel_meets_its_taps_once(pass_):
    r = random.Random(7)
    for _ in range(40):
        n = r.choice((1, 2, 2, 3))
        kernel = tuple(r.randint(1, 4) for _ in range(n))
        dilation = tuple(r.randint(1, 3) for _ in range(n))
        padding = tuple(r.randint(0, 3) for _ in range(n))
        least = (d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True))
        size = tuple(max(1, x) + r.randint(0, 5) for x in least)
        stride = tuple(r.randint(1, 4 if n < 3 else 2) for _ in range(n))
        C, K = r.randint(1, 2), r.randint(1, 2)
        c = Conv(r.randint(1, 2), C, K, size, kernel, stride, padding, dilation)
        sizes = (tuple(c.x.shape), tuple(c.w.shape), tuple(c.dy.shape))
        channels, expected = K if pass_ == "dgrad" else C, by_hand(c, pass_)
        positions = c.N * math.prod(c.dy.shape[2:] if pass_ == "dgrad" else c.x.shape[2:])
        seen = set()
        for written, reads in MODULE.conv_coordinates(pass_, *sizes, **c.options):
            assert written not in seen
            seen.add(written)
            assert len({(tap, channel) for tap, channel, _ in reads}) == len(reads)
            for channel in range(channels):
                pairs = {(tap, at - channel * positions) for tap, k, at in reads if at >= 0 and k == channel}
                assert pairs == expected.get(written, set())
        assert len(seen) == c.N * math.prod(c.x.shape[2:] if pass_ == "dgrad" else c.dy.shape[2:])


@pytest.mark.parametrize("row", rows("tile"))
def test_each_tile_once(row):
    tile_m, tile_n, _ = row["tile"]
    c = Conv(3, 10, 2 * tile_n + 1, (23, 29), (3, 3), (2, 3), (1, 1), dtype=DTYPES[row["dtype"]])
    for pass_, columns, phases in (("forward", c.K, [(12, 10)]), ("dgrad", c.C, [(12, 10), (12, 10), (12, 9)] * 2)):
        sizes = (tuple(c.x.shape), tuple(c.w.shape), tuple(c.dy.shape))
        tiles = MODULE.conv_tiles(pass_, *sizes, **c.options, dtype=row["dtype"], kernel=row["name"])
        if pass_ == "dgrad":
            phases = [(h, w) for h in (12, 11) for w in (10, 10, 9)]
        expected = [
            (i, m, n)
            for i, (h, w) in enumerate(phases)
            for m in range(-(-c.N * h * w // tile_m))
            for n in range(-(-columns // tile_n))
        ]
        assert sorted(tiles) == sorted(expected)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_tensors_beyond_32_bits(last):
    """Billions of elements: where the last of them lie, worked out once more here."""
    N, C, K, size, out = 3, 64, 96, (8192, 8190), (4096, 4095)
    shapes = (N, C, *size), (K, C, 3, 3), (N, K, *out)
    options = {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "channels_last": last}

    def offset(n, c, at, channels, sizes):
        place = n * math.prod(sizes) + at[0] * sizes[1] + at[1]
        return place * channels + c if last else (n * channels + c) * math.prod(sizes) + at[0] * sizes[1] + at[1]

    found = []
    for m in (0, out[1] - 1, N * math.prod(out) // 2, N * math.prod(out) - 1):
        for k in (0, 5 * C - 1, 9 * C - 1):
            n, o = m // math.prod(out), divmod(m % math.prod(out), out[1])
            (tap, c) = divmod(k, C)
            at = tuple(2 * o[i] - 1 + t for i, t in enumerate(divmod(tap, 3)))
            read = offset(n, c, at, C, size) if all(0 <= a < s for a, s in zip(at, size, strict=True)) else -1
            weight = tap * C + c if last else c * 9 + tap
            expected = (offset(n, 0, o, K, out), read, weight)
            for pass_ in ("forward", "wgrad"):
                assert MODULE.conv_places(pass_, *shapes, **options, phase=0, m=m, k=k) == expected
            found.append(expected)
    assert max(f[0] for f in found) > 2**31 and max(f[1] for f in found) > 2**33

    # Phase 3 of dgrad: odd positions, which taps (2, 2), (2, 0), (0, 2) and (0, 0) reach from neighbours.
    count, farthest = (size[0] // 2, size[1] // 2), 0
    for m in (0, N * math.prod(count) - count[1] - 2):
        for k in range(0, 4 * K, K - 1):
            n, i = m // math.prod(count), divmod(m % math.prod(count), count[1])
            tap, channel = divmod(k, K)
            at = tuple(i[d] + t for d, t in enumerate(divmod(tap, 2)))
            read = offset(n, channel, at, K, out) if all(a < s for a, s in zip(at, out, strict=True)) else -1
            t = (2 - tap // 2 * 2) * 3 + 2 - tap % 2 * 2
            weight = channel * C * 9 + (t * C if last else t)
            written = offset(n, 0, (2 * i[0] + 1, 2 * i[1] + 1), C, size)
            assert MODULE.conv_places("dgrad", *shapes, **options, phase=3, m=m, k=k) == (written, read, weight)
            farthest = max(farthest, written)
    assert farthest > 2**33


# --- plans, of any GPU -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
def test_plans(gpu):
    def kernel(c, pass_="forward", **more):
        return plan(c, pass_, gpu=gpu, **more)["kernel"]

    exact = Conv(8, 64, 128, (56, 56), (3, 3), padding=(1, 1))
    assert " f32 tf32 " in plan(exact, "forward", gpu=gpu, precision="tf32")["text"]
    assert "tf32" not in plan(exact, "forward", gpu=gpu)["text"]
    dense = Conv(8, 64, 128, (56, 56), (3, 3), padding=(1, 1), dtype=torch.bfloat16, high=1)
    assert kernel(dense) == "conv_bf16_128x128_sm80"
    assert kernel(dense, "wgrad").startswith("conv_wgrad_bf16_")
    small = Conv(1, 64, 64, (7, 7), (3, 3), padding=(1, 1), dtype=torch.bfloat16)
    p = plan(small, "forward", gpu=gpu)
    assert p["kernel"] == "conv_bf16_64x64_sm80" and p["chunks"] > 1
    assert p["pack_bytes"] == 64 * 64 * 9 * 2 and p["partial_bytes"] >= p["chunks"] * 49 * 64 * 4
    assert p["workspace_bytes"] == p["pack_bytes"] + p["partial_bytes"]
    depthwise = Conv(2, 32, 32, (9, 9), (3, 3), groups=32, dtype=torch.float16)
    assert {kernel(depthwise, pass_) for pass_ in PASSES} == {"conv_depthwise_f16_sm80"}
    grouped = Conv(2, 32, 32, (9, 9), (3, 3), groups=8)
    assert kernel(grouped) == "conv_direct_f32_sm80"
    assert kernel(dense, precision="tf32") == "conv_bf16_128x128_sm80"
    f32 = Conv(1, 16, 16, (5, 5), (1, 1))
    assert kernel(Conv(8, 16, 64, (56, 56), (3, 3), padding=(1, 1))) == "conv_f32_128x64_sm80"
    names = {p: kernel(f32, precision=p) for p in ("fma", "ieee", "tf32", "bf16")}
    assert names["fma"] == "conv_direct_f32_sm80" and names["ieee"] == "conv_f32_64x64_sm80"
    assert names["tf32"] == "conv_f32_128x64_tf32_sm80" and names["bf16"] == "conv_f32_128x64_bf16_sm80"
    with pytest.raises(RuntimeError, match="cannot run this: less exact than asked"):
        kernel(f32, kernel="conv_f32_128x64_tf32_sm80")
    with pytest.raises(RuntimeError, match="cannot run this: another pass"):
        kernel(f32, "wgrad", kernel="conv_f32_128x64_sm80")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("pass_", PASSES)
def test_plans_of_small_groups(pass_, dtype):
    """16-bit groups are multiplied together until they have 64 columns; float32 ones are not, FMA takes the small."""

    def of(c):
        p = plan(c, pass_)
        return p["schedule"], p["merged"]

    def conv(C, K, groups):
        return Conv(2, C, K, (6, 6), (3, 3), padding=(1, 1), groups=groups, dtype=dtype)

    tile = "wgrad" if pass_ == "wgrad" else "tile"
    short = dtype != torch.float32
    resnext = conv(128, 128, 32)
    assert of(resnext) == ((tile, 16) if short else (tile if pass_ == "wgrad" else "direct", 1))
    assert of(conv(128, 128, 8)) == (tile, 4 if short else 1)
    assert of(conv(32, 64, 32)) == ((tile, 32) if short else ("direct", 1))
    assert of(conv(128, 128, 2)) == (tile, 1)
    assert of(conv(24, 24, 3)) == (tile, 3 if short else 1)
    assert of(conv(24, 24, 24)) == ("depthwise", 1)
    if short:  # the workspace holds the zeros from one group to another, but no sums of them
        c, p = resnext, plan(resnext, pass_)
        dense = 128 * 64 * 9
        assert p["partial_bytes"] == -(-p["chunks"] * 4 * c.w.numel() // 256) * 256 if pass_ == "wgrad" else True
        assert p["pack_bytes"] == (0 if pass_ == "wgrad" else 2 * dense)


def test_grids_fit():
    """The most that a grid takes, in each dimension, of problems of many groups, pixels or channels."""
    ones = {"stride": [1], "padding": [0], "dilation": [1]}
    most = (2**31 - 1, 65535, 65535)
    for pass_, dtype, shapes, groups in (
        ("forward", "float32", ((1, 64 * 65535, 1), (64 * 65535, 64, 1), (1, 64 * 65535, 1)), 65535),
        ("forward", "bfloat16", ((1, 2**20, 1), (2**20, 2, 1), (1, 2**20, 1)), 2**19),
        ("wgrad", "bfloat16", ((1, 2**20, 1), (2**20, 2, 1), (1, 2**20, 1)), 2**19),
        ("wgrad", "bfloat16", ((2**12, 8, 2**16), (8, 8, 1), (2**12, 8, 2**16)), 1),
        ("forward", "float32", ((2**14, 8, 2**16), (8, 8, 1), (2**14, 8, 2**16)), 1),
        ("dgrad", "float16", ((1, 2**24, 2), (64, 2**24, 1), (1, 64, 2)), 1),
    ):
        p = MODULE.conv_plan(pass_, *shapes, **ones, groups=groups, dtype=dtype, gpu="sm80")
        assert p["schedule"] in ("tile", "wgrad")
        assert all(1 <= n <= m for n, m in zip(p["grid"], most, strict=True)), p["grid"]
    shapes = (1, 8 * 65536, 1), (8 * 65536, 8, 1), (1, 8 * 65536, 1)
    p = MODULE.conv_plan("forward", *shapes, **ones, groups=65536, gpu="sm80")
    assert p["kernel"] == "conv_direct_f32_sm80" and p["why"] == "FMA"
    with pytest.raises(RuntimeError, match="more than 65535 groups"):
        MODULE.conv_plan("forward", *shapes, **ones, groups=65536, gpu="sm80", kernel="conv_f32_64x64_sm80")


def test_plans_of_huge_positions_are_direct():
    options = {"padding": [2**40], "stride": [1], "dilation": [2**41]}
    p = MODULE.conv_plan("forward", (1, 2, 1), (3, 2, 2), (1, 3, 1), **options, gpu="sm80")
    assert p["kernel"] == "conv_direct_f32_sm80" and "2^29" in p["why"]
    # Nothing moves along a dimension of one output: its stride has no say.
    options = {"padding": [0], "stride": [2**40], "dilation": [1]}
    p = MODULE.conv_plan("forward", (1, 2, 3), (3, 2, 3), (1, 3, 1), **options, gpu="sm80")
    assert p["kernel"] == "conv_f32_64x64_sm80"
    options = {"padding": [0, 0], "stride": [5, 5], "dilation": [1, 1]}
    p = MODULE.conv_plan("dgrad", (1, 2, 9, 9), (3, 2, 1, 1), (1, 3, 2, 2), **options, gpu="sm80")
    assert p["kernel"] == "conv_direct_f32_sm80" and "16 phases" in p["why"]
