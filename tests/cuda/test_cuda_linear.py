"""linear and matmul on CUDA tensors as users call them, on the host twin or a GPU: forward, gradients, gradients of
gradients, epilogues, strides, empty shapes, and nn.Linear through optimize()."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import fastdl
from fastdl.functional import linear, matmul
from fastdl.ops import calls
from fastdl.testing import LAYOUTS, assert_within_bound, gemm_reference, integer_matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def nothing_is_handed_back():
    calls.handbacks.clear()
    yield
    assert not calls.handbacks


@pytest.fixture
def integers(gpu, generator):
    """integers(K, *shape, dtype): such that sums of K products are exact."""
    return lambda K, *shape, dtype=torch.float32: integer_matrix(shape, K, generator, dtype).to(gpu.device)


@pytest.fixture
def normals(gpu, generator):
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype).to(gpu.device)


def exact(a, b, *terms):
    return sum((t.double() for t in terms), a.double() @ b.double()).to(a.dtype)


@pytest.mark.sanitized
@every_dtype
def test_linear_and_its_gradients_are_exact(integers, dtype):
    M, N, K = 19, 21, 35
    x, w, b, dy = (integers(35, *shape, dtype=dtype) for shape in ((M, K), (N, K), (N,), (M, N)))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y = linear(*leaves)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(y, exact(x, w.mT, b))
    assert torch.equal(dx, exact(dy, w))
    assert torch.equal(dw, exact(dy.mT, x))
    assert torch.equal(db, dy.double().sum(0).to(dtype))


@pytest.mark.sanitized
def test_linear_within_the_bound(normals):
    x, w, b = normals(17, 33), normals(9, 33), normals(9)
    assert_within_bound(linear(x, w, b), gemm_reference(x, w.mT, b), precision="ieee")


def test_every_order_gives_the_same_bits(gpu, normals):
    x, w, dy = normals(33, 70, dtype=torch.bfloat16), normals(40, 70, dtype=torch.bfloat16), normals(33, 40)
    dy = dy.bfloat16()
    results = []
    for _ in gpu.orders():
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = linear(*leaves, activation="silu")
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "activation", [pytest.param("gelu", marks=pytest.mark.sanitized), "relu", "gelu_tanh", "silu", None]
)
def test_epilogues_and_their_gradients(normals, activation):
    """Against float64; gradients of gradients too."""
    functions = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "silu": F.silu,
        None: lambda z: z,
    }
    x, w, b, r = normals(2, 5, 12), normals(10, 12), normals(10), normals(2, 5, 10)
    outer = normals(2, 5, 12)

    def results(run, args):
        x, w, b, r = args = [t.clone().requires_grad_() for t in args]
        y = run(x, w, b, r)
        first = torch.autograd.grad(
            y, args, torch.cos(torch.arange(100.0, device=y.device)).view(2, 5, 10).to(y.dtype), create_graph=True
        )
        second = torch.autograd.grad(first[0], (x, w), outer.to(y.dtype), allow_unused=True)
        return [y, *first, *(t for t in second if t is not None)]

    ours = results(lambda x, w, b, r: linear(x, w, b, activation=activation, residual=r), (x, w, b, r))
    theirs = results(
        lambda x, w, b, r: functions[activation](F.linear(x, w, b)) + r, [t.double() for t in (x, w, b, r)]
    )
    assert len(ours) == len(theirs)
    for actual, expected in zip(ours, theirs, strict=True):
        scale = expected.abs().max().clamp_min(1.0)
        assert ((actual.double() - expected).abs() <= 3e-6 * scale).all()


@pytest.mark.parametrize("layouts", [("transposed", "contiguous"), ("both_strided", "transposed"),
                                     ("offset_1", "expanded_rows"), ("overlapping", "wide_rows")])  # fmt: skip
def test_layouts(gpu, generator, layouts):
    a = LAYOUTS[layouts[0]](integer_matrix((2, 18, 20), 20, generator)).to(gpu.device)
    b = LAYOUTS[layouts[1]](integer_matrix((2, 20, 10), 20, generator)).to(gpu.device)
    assert torch.equal(matmul(a, b), exact(a, b))


@pytest.mark.parametrize(
    "shapes",
    [((7,), (7,)), ((7,), (7, 4)), ((4, 7), (7,)), ((3, 4, 7), (7, 5)), ((3, 4, 7), (3, 7, 5)),
     ((2, 1, 4, 7), (3, 7, 5)), ((4, 7), (3, 7, 5)), ((3, 4, 7), (7,))],
    ids=str,
)  # fmt: skip
def test_matmul_broadcasts_forward_and_backward(integers, shapes):
    a, b = (integers(64, *shape) for shape in shapes)
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    doubles = [t.double().requires_grad_() for t in (a, b)]
    out, expected = matmul(*leaves), torch.matmul(*doubles)
    assert torch.equal(out.double(), expected)
    grad = integers(64, *out.shape) if out.ndim else torch.tensor(3.0, device=out.device)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, grad),
                              torch.autograd.grad(expected, doubles, grad.double()), strict=True):  # fmt: skip
        assert torch.equal(actual.double(), wanted)


def test_inputs_whose_rows_have_no_one_stride(integers):
    x = integers(20, 5, 3, 20).transpose(0, 1)
    w, dy = integers(20, 6, 20), integers(20, 3, 5, 6)
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_(), w.clone().requires_grad_()]
    assert leaves[0].stride() == x.stride()
    y = linear(*leaves)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(y, exact(x, w.mT))
    assert torch.equal(dx, exact(dy, w))
    assert torch.equal(dw, exact(dy.reshape(15, 6).mT, x.reshape(15, 20)))


@pytest.mark.parametrize("sizes", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty_shapes(normals, sizes):
    M, N, K = sizes
    x, w, b, r = (normals(*s).requires_grad_() for s in ((M, K), (N, K), (N,), (M, N)))
    for activation in (None, "gelu"):
        y = linear(x, w, b, activation=activation, residual=r)
        expected = F.linear(x, w, b) if activation is None else F.gelu(F.linear(x, w, b))
        torch.testing.assert_close(y, expected + r, rtol=1e-6, atol=1e-6)
        for actual, wanted in zip(torch.autograd.grad(y, (x, w, b, r), torch.ones_like(y)), (x, w, b, r), strict=True):
            assert actual.shape == wanted.shape and bool(actual.isfinite().all())
    assert torch.equal(matmul(x, w.mT), torch.matmul(x, w.mT))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_double_precision_runs_the_reference(normals, activation):
    x, w, b, r = (normals(*s).double().requires_grad_() for s in ((3, 4), (5, 4), (5,), (3, 5)))
    residual = None if activation is None else r
    function = lambda *args: linear(*args, activation=activation, residual=residual)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradcheck(matmul, (x, normals(2, 4, 3).double().requires_grad_()), fast_mode=True)


def registered_samples(dtype):
    """Arguments of every operation of this family as torch.library knows it, in strides that a model makes."""

    def randn(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)

    pack = torch.zeros(40)  # of the CPU's kernels: not read
    yield "linear", (randn(4, 8), randn(5, 8), randn(5))
    yield "linear", (randn(3, 2, 8).transpose(0, 1), randn(5, 8), None)
    yield "linear", (randn(8), randn(5, 8), randn(5), pack)
    for activation, save in (("gelu", True), ("relu", False), (None, True)):
        yield "linear_fused", (randn(2, 3, 8), randn(5, 8), randn(5), randn(2, 3, 5), activation, save)
    yield "linear_fused", (randn(4, 8), randn(5, 8), None, None, "silu", True, pack)
    yield "activation_grad", (randn(3, 4).mT, randn(4, 3), "silu")
    yield "matmul", (randn(2, 1, 4, 8), randn(3, 8, 3))
    yield "matmul", (randn(8), randn(8))
    yield "matmul", (randn(4, 8), randn(8))
    yield "linear_wgrad", (randn(2, 3, 5).transpose(0, 1), randn(3, 2, 8))
    yield "sum_rows", (randn(2, 4, 5),)
    yield "sum_rows", (randn(0, 5),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_opcheck(gpu, dtype):
    """Schemas, fakes and autograd keys of torch.ops.fastdl.* hold for what the CUDA implementations return."""
    for name, sample in registered_samples(dtype):
        sample = [x.to(gpu.device) if isinstance(x, torch.Tensor) else x for x in sample]
        opcheck(getattr(torch.ops.fastdl, name).default, sample)


@every_dtype
def test_negative_views_are_resolved(integers, dtype):
    """The minus that torch keeps as a bit does not cross the border."""
    x, w, b = integers(12, 4, 12, dtype=dtype), integers(12, 6, 12, dtype=dtype), integers(12, 6, dtype=dtype)
    negative = [torch._neg_view(t) for t in (x, w, b)]
    assert torch.equal(linear(*negative), exact(x, w.mT, -b))
    assert torch.equal(linear(*negative, activation="relu"), exact(x, w.mT, -b).relu())
    assert torch.equal(matmul(negative[0], w.mT), exact(-x, w.mT))


# --- frozen -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
@every_dtype
def test_packs_of_the_cpu_are_not_read(gpu, integers, dtype, check, monkeypatch):
    """A frozen model gives what it gave, forward and backward: a pack holding anything else would show."""
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", str(int(check)))
    model = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.ReLU(), torch.nn.Linear(9, 5)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(integers(64, *p.shape, dtype=dtype).cpu() % 4)
    model, x = fastdl.optimize(model).to(gpu.device), (integers(64, 3, 12, dtype=dtype) % 4).requires_grad_()
    leaves = [x, *model.parameters()]

    def results():
        y = model(x)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y)), model[0](x, activation="relu", residual=None)

    expected = results()
    if gpu.is_twin:
        fastdl.freeze(model)
        packs = [m._pack.packed for m in (model[0], model[2])]
        if not check:
            for pack in packs:
                pack.fill_(float("nan"))
        assert not [row for row in fastdl.explain(model, x.detach()).rows if not row.status.startswith("fastdl")]
    else:
        with pytest.warns(
            UserWarning, match=r"left unfrozen: 0: expected a .* weight on cpu, got Parameter .* on cuda"
        ):
            fastdl.freeze(model)
        assert model[0]._pack is None
    for actual, wanted in zip(results(), expected, strict=True):
        assert torch.equal(actual, wanted)


@every_dtype
def test_a_model_through_optimize(gpu, normals, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 6)).to(dtype)
    model = model.to(gpu.device)
    x = normals(4, 12, dtype=dtype)

    def gradients(run, x):
        run.zero_grad()
        run(x).float().square().sum().backward()
        return [p.grad.double().clone() for p in run.parameters()]

    exact_model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 6)).double()
    exact_model = exact_model.to(gpu.device)
    exact_model.load_state_dict(model.state_dict())
    expected = gradients(exact_model, x.double())
    optimized = fastdl.optimize(model)
    assert type(optimized[0]) is fastdl.nn.Linear
    unit = {torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    for actual, wanted in zip(gradients(optimized, x), expected, strict=True):
        assert ((actual - wanted).abs() <= unit * (1 + wanted.abs().max())).all()
    report = fastdl.explain(optimized, x)
    assert {row.status for row in report.rows} == {"fastdl"}
    assert all(row.kernel.startswith("gemm_") for row in report.rows)


def test_autocast(gpu, normals):
    x, w = normals(4, 12), normals(6, 12)
    with torch.autocast(gpu.device.type, torch.bfloat16):
        y = linear(x, w)
    assert y.dtype == torch.bfloat16 and torch.equal(y, linear(x.bfloat16(), w.bfloat16()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_through_the_compiler(gpu, integers):
    """aot_eager: the graph holds the operation, and running it reaches the kernel."""
    x, w = integers(12, 4, 12).requires_grad_(), integers(12, 6, 12).requires_grad_()
    compiled = torch.compile(lambda x, w: linear(x, w, activation="relu"), backend="aot_eager", fullgraph=True)
    y = compiled(x, w)
    assert torch.equal(y, exact(x, w.mT).relu())
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    mask = (y > 0).float()
    assert torch.equal(dx, exact(mask, w)) and torch.equal(dw, exact(mask.mT, x))
