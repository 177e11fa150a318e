"""Bad calls of the native module: torch's exception type, a message that names operation, argument, expected, got."""

import re

import numpy
import pytest
import torch

from fastdl import _C

T = torch.empty
UNAVAILABLE = [row["name"] for row in _C.kernels("gemm") if not row["available"]]
PACK = _C.pack_kernel()


def wrong_kinds(shape):
    """What is no dense CPU tensor of the other arguments' dtype: (id, value, exception type, what must be said)."""
    return [
        ("none", None, TypeError, "None"),
        ("list", [[1.0, 2.0]], TypeError, "list"),
        ("numpy", numpy.zeros(shape, dtype=numpy.float32), TypeError, "ndarray"),
        ("float64", T(shape, dtype=torch.float64), RuntimeError, "float64"),
        ("bfloat16", T(shape, dtype=torch.bfloat16), RuntimeError, "bfloat16"),
        ("float16", T(shape, dtype=torch.float16), RuntimeError, "float16"),
        ("int32", T(shape, dtype=torch.int32), RuntimeError, "int32"),
        ("bool", T(shape, dtype=torch.bool), RuntimeError, "bool"),
        ("complex64", T(shape, dtype=torch.complex64), RuntimeError, "complex64"),
        ("meta", T(shape, device="meta"), RuntimeError, "meta|device|storage"),
        ("sparse", torch.zeros(shape).to_sparse(), RuntimeError, "[Ss]parse|doesn't have storage"),
    ]


OPERATIONS = {
    "gemm": (_C.gemm, {"out": (3, 5), "a": (3, 4), "b": (4, 5), "bias": (5,)}),
    "linear": (_C.linear, {"out": (3, 5), "input": (3, 4), "weight": (5, 4), "bias": (5,)}),
    "linear_fused": (
        _C.linear_fused,
        {"out": (3, 5), "input": (3, 4), "weight": (5, 4), "bias": (5,), "residual": (3, 5), "pre": (3, 5)}
        | {"packed": (_C.pack_numel(4, 5, PACK),)},
    ),
    "activation_grad": (_C.activation_grad, {"out": (3, 5), "grad": (3, 5), "pre": (3, 5), "activation": "relu"}),
    "linear_wgrad": (_C.linear_wgrad, {"out": (5, 4), "grad": (3, 5), "input": (3, 4)}),
    "sum_rows": (_C.sum_rows, {"out": (5,), "x": (3, 5)}),
    "pack": (_C.pack, {"out": (_C.pack_numel(4, 5, PACK),), "b": (4, 5), "kernel": PACK}),
    "linear_packed": (
        _C.linear_packed,
        {"out": (3, 5), "input": (3, 4), "packed": (_C.pack_numel(4, 5, PACK),), "bias": (5,), "N": 5, "kernel": PACK},
    ),
}


OPTIONAL = {"linear_fused": ("bias", "residual", "pre", "packed")}  # arguments that may be None, elsewhere the bias


def call(operation, **changes):
    function, shapes = OPERATIONS[operation]
    args = {name: torch.zeros(s) if isinstance(s, tuple) else s for name, s in shapes.items()}
    return function(**{**args, **changes})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_good_call_passes(operation):
    """The calls that the other tests spoil are good themselves."""
    call(operation)


@pytest.mark.parametrize(
    "operation, argument, value, exception, saying",
    [
        pytest.param(operation, argument, value, exception, saying, id=f"{operation}-{argument}-{kind}")
        for operation, (_, shapes) in OPERATIONS.items()
        for argument, shape in shapes.items()
        if isinstance(shape, tuple)
        for kind, value, exception, saying in wrong_kinds(shape)
        if not (value is None and argument in OPTIONAL.get(operation, ("bias",)))
    ],
)
def test_wrong_kind_of_argument(operation, argument, value, exception, saying):
    with pytest.raises(exception, match=rf"{operation}\b.*\b{argument}\b") as caught:
        call(operation, **{argument: value})
    assert re.search(saying, str(caught.value)), caught.value


@pytest.mark.parametrize(
    "operation, argument, changes",
    [
        pytest.param(operation, argument, changes, id=f"{operation}-{case}")
        for operation, argument, case, changes in [
            ("gemm", "b", "inner dimension", {"b": T(3, 5)}),
            ("gemm", "a", "a is 0-D", {"a": T(())}),
            ("gemm", "a", "a is 1-D", {"a": T(4)}),
            ("gemm", "b", "b is 0-D", {"b": T(())}),
            ("gemm", "b", "b is 1-D", {"b": T(4)}),
            ("gemm", "out", "out is 0-D", {"out": T(())}),
            ("gemm", "out", "out is 1-D", {"out": T(5)}),
            ("gemm", "out", "rows of out", {"out": T(4, 5)}),
            ("gemm", "out", "columns of out", {"out": T(3, 6)}),
            ("gemm", "out", "out transposed", {"out": T(5, 3).t()}),
            ("gemm", "out", "columns of out strided", {"out": T(3, 10)[:, ::2]}),
            ("gemm", "out", "out expanded", {"out": T(1, 5).expand(3, 5)}),
            ("gemm", "out", "out overlaps itself", {"out": T(20).as_strided((3, 5), (2, 1))}),
            ("gemm", "a", "out lacks the batch of a", {"a": T(2, 3, 4)}),
            ("gemm", "b", "out lacks the batch of b", {"b": T(2, 4, 5)}),
            ("gemm", "a", "batch of out", {"a": T(2, 3, 4), "out": T(3, 3, 5)}),
            ("gemm", "b", "batches that do not broadcast", {"a": T(2, 3, 4), "b": T(3, 4, 5), "out": T(2, 3, 5)}),
            ("gemm", "out", "batch of out expanded", {"a": T(2, 3, 4), "out": T(1, 3, 5).expand(2, 3, 5)}),
            ("gemm", "bias", "bias length", {"bias": T(4)}),
            ("gemm", "bias", "bias of one", {"bias": T(1)}),
            ("gemm", "bias", "bias is 2-D", {"bias": T(1, 5)}),
            ("gemm", "bias", "bias is 0-D", {"bias": T(())}),
            ("gemm", "kernel", "no such kernel", {"kernel": "gemm_f32_999x999_none"}),
            ("gemm", "threads", "threads below 0", {"threads": -1}),
            ("linear", "weight", "inner dimension", {"weight": T(5, 3)}),
            ("linear", "weight", "weight is 1-D", {"weight": T(4)}),
            ("linear", "weight", "weight is 3-D", {"weight": T(1, 5, 4)}),
            ("linear", "input", "input is 0-D", {"input": T(())}),
            ("linear", "out", "columns of out", {"out": T(3, 4)}),
            ("linear", "out", "rows of out", {"out": T(2, 5)}),
            ("linear", "out", "rank of out", {"out": T(3, 1, 5)}),
            ("linear", "bias", "bias length", {"bias": T(6)}),
            ("linear", "bias", "bias is 2-D", {"bias": T(1, 5)}),
            ("linear", "kernel", "no such kernel", {"kernel": "linear"}),
            ("linear", "threads", "threads below 0", {"threads": -2}),
            ("linear_fused", "activation", "no such activation", {"activation": "tanh"}),
            ("linear_fused", "weight", "inner dimension", {"weight": T(5, 3)}),
            ("linear_fused", "bias", "bias length", {"bias": T(6)}),
            ("linear_fused", "residual", "rows of residual", {"residual": T(4, 5)}),
            ("linear_fused", "residual", "rank of residual", {"residual": T(5)}),
            ("linear_fused", "residual", "residual strided", {"residual": T(5, 3).t()}),
            ("linear_fused", "packed", "pack of another size", {"packed": T(_C.pack_numel(4, 5, PACK) + 1)}),
            ("linear_fused", "kernel", "kernel beside a pack", {"kernel": PACK}),
            ("linear_fused", "pre", "columns of pre", {"pre": T(3, 4)}),
            ("linear_fused", "pre", "rank of pre", {"pre": T(1, 3, 5)}),
            ("linear_fused", "pre", "pre strided", {"pre": T(3, 10)[:, ::2]}),
            ("linear_fused", "out", "out transposed", {"out": T(5, 3).t()}),
            ("linear_fused", "kernel", "no such kernel", {"kernel": "linear"}),
            ("linear_fused", "threads", "threads below 0", {"threads": -1}),
            ("activation_grad", "activation", "no such activation", {"activation": "Relu"}),
            ("activation_grad", "grad", "shape of grad", {"grad": T(3, 4)}),
            ("activation_grad", "grad", "grad strided", {"grad": T(5, 3).t()}),
            ("activation_grad", "pre", "shape of pre", {"pre": T(15)}),
            ("activation_grad", "pre", "pre strided", {"pre": T(3, 10)[:, ::2]}),
            ("activation_grad", "out", "out strided", {"out": T(3, 10)[:, ::2]}),
            ("activation_grad", "threads", "threads below 0", {"threads": -1}),
            ("linear_wgrad", "grad", "rows of grad", {"grad": T(2, 5)}),
            ("linear_wgrad", "grad", "rank of grad", {"grad": T(1, 3, 5)}),
            ("linear_wgrad", "grad", "grad is 0-D", {"grad": T(()), "input": T(())}),
            ("linear_wgrad", "out", "out transposed", {"out": T(4, 5)}),
            ("linear_wgrad", "out", "out strided", {"out": T(5, 8)[:, ::2]}),
            ("linear_wgrad", "threads", "threads below 0", {"threads": -1}),
            ("sum_rows", "threads", "threads below 0", {"threads": -1}),
            ("sum_rows", "out", "out length", {"out": T(4)}),
            ("sum_rows", "out", "out is 2-D", {"out": T(1, 5)}),
            ("sum_rows", "x", "x is 0-D", {"x": T(())}),
            ("pack", "out", "out too short", {"out": T(_C.pack_numel(4, 5, PACK) - 1)}),
            ("pack", "b", "b is 1-D", {"b": T(4)}),
            ("pack", "b", "b is 3-D", {"b": T(1, 4, 5)}),
            ("pack", "kernel", "no such kernel", {"kernel": "panel"}),
            ("linear_packed", "packed", "pack of another size", {"packed": T(_C.pack_numel(4, 5, PACK) + 1)}),
            ("linear_packed", "packed", "strided pack", {"packed": T(2 * _C.pack_numel(4, 5, PACK))[::2]}),
            ("linear_packed", "out", "columns of out", {"out": T(3, 4)}),
            ("linear_packed", "bias", "bias length", {"bias": T(6)}),
            ("linear_packed", "kernel", "no such kernel", {"kernel": "panel"}),
        ]
    ],
)
def test_bad_shape_or_option(operation, argument, changes):
    with pytest.raises(RuntimeError, match=rf"{operation}\b.*\b{argument}\b.*expected.*got"):
        call(operation, **changes)


@pytest.mark.parametrize("argument", ["a", "b", "bias"])
@pytest.mark.parametrize("case", ["same", "shifted", "one element"])
def test_out_must_not_overlap_an_input(argument, case):
    """torch.mm(a, a, out=a) is silently wrong; here it is an error."""
    memory = torch.zeros(200)
    out = memory[50:66].view(4, 4)
    start = {"same": 50, "shifted": 54, "one element": 65}[case]
    shape = (4,) if argument == "bias" else (4, 4)
    value = memory[start:].as_strided(shape, (4, 1)[-len(shape) :], start)
    others = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4), "bias": None}
    with pytest.raises(RuntimeError, match=rf"gemm\b.*\bout\b.*\b{argument}\b|gemm\b.*\b{argument}\b.*\bout\b"):
        _C.gemm(out, **{**others, argument: value})


def test_neighbours_in_one_storage_are_no_overlap():
    memory = torch.ones(48)
    out, a, b = (memory[i : i + 16].view(4, 4) for i in (16, 0, 32))
    _C.gemm(out, a, b)
    assert torch.equal(out, torch.full((4, 4), 4.0))


def test_nothing_is_written_before_an_error():
    out = torch.full((3, 5), 7.0)
    with pytest.raises(RuntimeError):
        _C.gemm(out, T(3, 4), T(4, 5), T(4))
    assert bool((out == 7).all())


@pytest.mark.skipif(not UNAVAILABLE, reason="every kernel of the table runs here")
@pytest.mark.parametrize("name", UNAVAILABLE or ["-"])
def test_kernel_that_cannot_run_here_is_an_error(name):
    with pytest.raises(RuntimeError, match=rf"gemm\b.*\bkernel\b.*{name}"):
        call("gemm", kernel=name)


def test_kernels_above_the_cap_are_errors(run_python):
    """FASTDL_ISA=scalar makes every vector row unavailable, forced or not, with the reason."""
    run_python(
        "-c",
        "import torch\n"
        "from fastdl import _C\n"
        "assert _C.cpu_info()['isa'] == 'scalar' and _C.cpu_info()['isa_cap'] == 'scalar'\n"
        "for row in _C.kernels('gemm'):\n"
        "    out, x = torch.ones(2, 3, 3, dtype=getattr(torch, row['dtype']))\n"
        "    assert row['available'] == (row['isa'] == 'scalar'), row\n"
        "    if row['available']:\n"
        "        _C.gemm(out, x, x, kernel=row['name'])\n"
        "        continue\n"
        "    assert row['reason'], row\n"
        "    try:\n"
        "        _C.gemm(out, x, x, kernel=row['name'])\n"
        "    except RuntimeError as e:\n"
        "        assert row['name'] in str(e), e\n"
        "    else:\n"
        "        raise AssertionError(row)\n",
        env={"FASTDL_ISA": "scalar"},
    )


def test_bad_isa_in_the_environment_is_named(run_python):
    code = (
        "import torch\n"
        "try:\n"
        "    from fastdl import _C\n"
        "    _C.cpu_info()\n"
        "except (ImportError, RuntimeError) as e:\n"
        "    assert 'FASTDL_ISA' in str(e) and 'sse9' in str(e), e\n"
        "else:\n"
        "    raise AssertionError('accepted')\n"
    )
    run_python("-c", code, env={"FASTDL_ISA": "sse9"})


@pytest.mark.parametrize("op", ["", "pool", "GEMM"])
def test_unknown_table(op):
    with pytest.raises(RuntimeError, match=r"kernels.*gemm"):
        _C.kernels(op)


@pytest.mark.parametrize(
    "argument, value",
    [("M", -1), ("N", -1), ("K", -1), ("batch", -1), ("isa", "sse9"), ("kernel", "x"), ("threads", -1)],
)
def test_bad_plan_argument(argument, value):
    with pytest.raises(RuntimeError, match=rf"gemm.*\b{argument}\b"):
        _C.gemm_plan(**{"M": 4, "N": 4, "K": 4, argument: value})


@pytest.mark.parametrize(
    "shapes", [((4,), (3, 4)), ((2, 4), (3, 4)), ((0, 4), (3, 4)), ((2, 5, 4), (3, 4), (3,))], ids=str
)
def test_linear_shape_is_torchs(shapes):
    args = [torch.zeros(s) for s in shapes]
    assert _C.linear_shape(*args) == tuple(torch.nn.functional.linear(*args).shape)


@pytest.mark.parametrize(
    "args",
    [
        (T(2, 4), T(3, 5)),
        (T(()), T(3, 4)),
        (T(2, 4), T(4)),
        (T(2, 4), T(3, 4), T(4)),
        (T(2, 4), T(3, 4), T(1, 3)),
        (T(2, 4).double(), T(3, 4)),
        (T(2, 4), T(3, 4, device="meta")),
        (T(2, 4), T(3, 4), "bias"),
        (None, T(3, 4)),
    ],
    ids=lambda args: "-".join(str(tuple(getattr(a, "shape", "?"))) for a in args),
)
def test_linear_shape_is_none_for_what_it_cannot_take(args):
    assert _C.linear_shape(*args) is None


@pytest.mark.parametrize(
    "a, b", [((2, 4), (4, 3)), ((5, 2, 4), (4, 3)), ((5, 1, 2, 4), (7, 4, 3)), ((0, 2, 4), (1, 4, 3))], ids=str
)
def test_matmul_shape_is_torchs(a, b):
    assert _C.matmul_shape(torch.zeros(a), torch.zeros(b)) == tuple(torch.matmul(torch.zeros(a), torch.zeros(b)).shape)


@pytest.mark.parametrize("a, b", [((4,), (4, 3)), ((2, 4), (4,)), ((2, 4), (3, 4)), ((2, 2, 4), (3, 4, 3))], ids=str)
def test_matmul_shape_is_none_for_what_it_cannot_take(a, b):
    assert _C.matmul_shape(torch.zeros(a), torch.zeros(b)) is None
