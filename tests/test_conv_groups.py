"""Groups of few channels on the dense rows: tiles take several at a time, with zeros between their weights."""

import math

import pytest
import torch

from conftest import DTYPES
from conv_reference import LAYOUTS, Conv, lay
from fastdl import _C
from test_conv_native import ROWS, THREAD_BYTES, assert_exact, every_pass, every_row, run

# Channels and output channels of a group, groups: what is taken as one, and as how many panels of a part.
SIZES = [
    (2, 2, 5),
    (4, 4, 32),
    (4, 8, 6),
    (8, 4, 12),
    (6, 10, 7),
    (16, 16, 9),
    (14, 16, 4),
    (24, 20, 3),
    (32, 32, 10),
    (20, 40, 3),
    (40, 6, 3),
]
SHAPES = {
    "stride 1": dict(N=2, size=(7, 9), kernel=(3, 3), padding=(1, 1)),
    "stride 2": dict(N=2, size=(8, 11), kernel=(3, 3), padding=(1, 1), stride=(2, 2)),
    "dilated": dict(N=1, size=(9, 21), kernel=(2, 2), padding=(0, 1), dilation=(3, 17)),
    "1x1": dict(N=2, size=(5, 6), kernel=(1, 1)),
    "long": dict(N=1, size=(70,), kernel=(5,), padding=(2,)),
    "deep": dict(N=1, size=(3, 5, 6), kernel=(2, 3, 2), padding=(1, 1, 0)),
}
tiles = pytest.mark.parametrize(
    "row",
    [
        pytest.param(r, id=r["name"], marks=pytest.mark.skipif(not r["available"], reason=r["reason"] or "-"))
        for r in ROWS
        if r["isa"] == "amx"
    ],
)

built = pytest.mark.skipif(_C.cpu_info()["isa"] == "scalar", reason="no tiles on this kind of machine")


def problem(shape, channels, columns, groups, **options):
    return Conv(C=channels * groups, K=columns * groups, groups=groups, **SHAPES[shape], **options)


@every_row
@every_pass
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_exact(row, pass_, shape):
    for sizes in SIZES:
        for layout in LAYOUTS:
            assert_exact(problem(shape, *sizes, dtype=DTYPES[row["dtype"]], layout=layout), pass_, kernel=row["name"])


@tiles
@every_pass
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(row, pass_, value):
    """Inf times a zero between groups would be NaN."""
    for shape in ("stride 1", "stride 2", "dilated"):
        for sizes in SIZES:
            x = problem(shape, *sizes, dtype=DTYPES[row["dtype"]], layout="channels_last")
            source = x.operands(pass_)[0]
            source[0, source.shape[1] // 2, ..., 2] = value
            expected = x.reference(pass_).to(x.dtype)
            actual = run(x, pass_, kernel=row["name"])
            assert torch.equal(actual.isnan(), expected.isnan()), (shape, sizes)
            assert torch.equal(actual.nan_to_num(1), expected.nan_to_num(1)), (shape, sizes)


@tiles
@every_pass
@pytest.mark.parametrize("layout", LAYOUTS)
def test_epilogue_of_groups(row, pass_, layout):
    """relu(sum + bias) + residual, and what relu was applied to."""
    for sizes in SIZES:
        x = problem("stride 1", *sizes, dtype=DTYPES[row["dtype"]], layout=layout)
        z = x.reference(pass_)
        residual, pre = (lay(torch.full(z.shape, value, dtype=x.dtype), layout) for value in (3.0, math.nan))
        y = run(x, pass_, kernel=row["name"], activation="relu", residual=residual, pre=pre)
        assert torch.equal(pre, z.to(x.dtype)), sizes
        assert torch.equal(y, (z.relu() + 3).to(x.dtype)), sizes


@tiles
@every_pass
def test_the_threads_are_not_to_be_seen(row, pass_):
    for shape in SHAPES:
        x = problem(shape, 4, 4, 64, dtype=DTYPES[row["dtype"]], high=0)
        assert torch.equal(*(run(x, pass_, kernel=row["name"], threads=n) for n in (1, 5))), shape


@every_pass
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_groups(pass_, dtype):
    """A pack of the level's own row, of groups taken together or not."""
    for shape in SHAPES:
        for sizes in SIZES:
            x = problem(shape, *sizes, dtype=DTYPES[dtype])
            pack = torch.full((_C.conv_pack_numel(pass_, list(x.w.shape), **x.options, dtype=dtype),), math.nan)
            _C.conv_pack(pack, pass_, x.w, **x.options)
            assert torch.equal(run(x, pass_, pack=pack), x.reference(pass_).to(x.dtype)), (shape, sizes)


@built
@every_pass
@pytest.mark.parametrize("groups", [2, 32, 128])
def test_workspace_of_groups(pass_, groups):
    sizes = [8, 512, 56, 56], [512, 512 // groups, 3, 3], [8, 512, 56, 56]
    options = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=groups)
    plan = _C.conv_plan(pass_, *sizes, **options, dtype="bfloat16", isa="amx", threads=2)
    assert plan["thread_bytes"] <= THREAD_BYTES
    assert plan["workspace_bytes"] == plan["weight_bytes"] + plan["threads"] * plan["thread_bytes"]


@built
@every_pass
def test_tiles_where_they_pay(pass_):
    """bfloat16 on tiles from 4 channels a group on; fewer, small images and other dtypes by the direct kernels."""

    def kernel(channels, dtype, size=20):
        sizes = [1, 8 * channels, size, size], [8 * channels, channels, 3, 3], [1, 8 * channels, size, size]
        options = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=8)
        return _C.conv_plan(pass_, *sizes, **options, dtype=dtype, isa="amx")["kernel"]

    assert [kernel(c, "bfloat16") for c in (4, 8, 16, 32)] == ["conv_bf16_32x32_amx"] * 4
    assert "grouped" in kernel(2, "bfloat16")
    assert "grouped" in kernel(8, "bfloat16", size=4)
    assert "grouped" in kernel(8, "float32")
