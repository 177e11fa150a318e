"""fastdl.nn.Conv* and ConvTranspose*: swapping, padding modes, packs, folded batch norms, layouts in a network."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
from fastdl import _C
from fastdl.nn import folded
from fastdl.ops import calls
from models import Residual, resnet

KINDS = {
    "Conv1d": (nn.Conv1d, (2, 4, 11)),
    "Conv2d": (nn.Conv2d, (2, 4, 9, 8)),
    "Conv3d": (nn.Conv3d, (2, 4, 5, 6, 5)),
    "ConvTranspose1d": (nn.ConvTranspose1d, (2, 4, 11)),
    "ConvTranspose2d": (nn.ConvTranspose2d, (2, 4, 9, 8)),
    "ConvTranspose3d": (nn.ConvTranspose3d, (2, 4, 5, 6, 5)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(11)


def pair(cls, *args, **options):
    """(ours, stock) with the same parameters."""
    stock = cls(*args, **options)
    return fastdl.optimize(copy.deepcopy(stock)), stock


def results(model, x, *args):
    leaf = x.detach().requires_grad_()
    y = model(leaf, *args)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [leaf, *model.parameters()], dy)]


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)


# --- the swap -----------------------------------------------------------------------------------------------------
@every_kind
def test_swap_restore_and_values(kind):
    cls, shape = KINDS[kind]
    ours, stock = pair(cls, 4, 6, 3, stride=2, padding=1, groups=2)
    assert type(ours) is getattr(fastdl.nn, kind) and isinstance(ours, cls)
    x = torch.randn(shape)
    _C.reset_counters()
    close(results(ours, x), results(stock, x), 1e-3)
    assert sum(n for k, n in _C.counters().items() if k.startswith("conv_")) == 3 and not calls.handbacks
    close(ours(x[0]), stock(x[0]))
    assert repr(ours) == "fastdl." + repr(stock)
    fastdl.restore(ours)
    assert type(ours) is cls and set(vars(ours)) == set(vars(stock))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", "valid"])
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_padding_modes(kind, padding, mode):
    cls, shape = KINDS[kind]
    ours, stock = pair(cls, 4, 3, 3, padding=padding, padding_mode=mode)
    x = torch.randn(shape)
    close(results(ours, x), results(stock, x), 1e-3)
    assert not calls.handbacks


@pytest.mark.parametrize("kind", ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_output_size(kind):
    cls, shape = KINDS[kind]
    ours, stock = pair(cls, 4, 3, 3, stride=2, padding=1)
    x = torch.randn(shape)
    size = [2 * n for n in shape[2:]]
    close(ours(x, size), stock(x, size))
    close(ours(x, output_size=(2, 3, *size)), stock(x, (2, 3, *size)))
    for wrong in ([5 * n for n in shape[2:]], size[1:] or [1, 2, 3, 4]):
        for layer in (ours, stock):
            with pytest.raises(ValueError, match=r"output[_ ]size"):
                layer(x, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    ours, stock = pair(nn.Conv2d, 4, 6, 3, padding=1)
    x = torch.randn(2, 4, 6, 6)
    found, expected = results(ours.to(dtype), x.to(dtype)), results(stock.double(), x.double())
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03 * want.abs().max().item())


@every_kind
def test_pickles_and_copies(kind):
    cls, shape = KINDS[kind]
    ours, stock = pair(cls, 4, 3, 2)
    assert type(pickle.loads(pickle.dumps(ours))) is cls
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is cls
    x = torch.randn(shape)
    for twin in (copy.copy(ours), copy.deepcopy(ours)):
        assert type(twin) is type(ours)
        close(twin(x), stock(x))
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())


def test_lazy_layers_and_subclasses_are_left_alone():
    class Custom(nn.Conv2d):
        pass

    model = nn.Sequential(nn.LazyConv2d(4, 3), Custom(4, 4, 1), nn.LazyConvTranspose2d(3, 2), nn.Conv2d(3, 2, 1))
    fastdl.optimize(model)
    assert [type(m) for m in model] == [nn.LazyConv2d, Custom, nn.LazyConvTranspose2d, fastdl.nn.Conv2d]
    reasons = [row.reason for row in fastdl.explain(model).rows]
    assert "lazy" in reasons[0] and "a subclass" in reasons[1] and "lazy" in reasons[2]
    model(torch.randn(1, 3, 8, 8))
    fastdl.optimize(model)
    assert type(model[0]) is fastdl.nn.Conv2d and type(model[2]) is fastdl.nn.ConvTranspose2d


def test_parametrised():
    ours, stock = pair(nn.Conv2d, 4, 6, 3)
    for layer in (ours, stock):
        torch.nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(1, 4, 6, 6)
    close(results(ours, x), results(stock, x), 1e-3)
    with pytest.warns(UserWarning, match="parametrised"):
        fastdl.restore(ours)


def test_explain():
    model = fastdl.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2)))
    rows = fastdl.explain(model, torch.randn(1, 3, 8, 8)).rows
    assert [(row.type, row.status) for row in rows] == [("Conv2d", "fastdl"), ("ConvTranspose2d", "fastdl")]
    names = {row["name"] for row in _C.kernels("conv")}
    assert all(row.kernel in names for row in rows) and rows[0].shapes == "1x3x8x8 8x3x3x3 8"
    (row,) = fastdl.explain(fastdl.optimize(nn.Conv2d(3, 8, 3).double()), torch.randn(1, 3, 8, 8).double()).rows
    assert row.kernel == "reference"
    with pytest.warns(UserWarning, match="Complex modules"):
        layer = fastdl.optimize(nn.Conv2d(3, 8, 3).to(torch.cfloat))
    (row,) = fastdl.explain(layer, torch.randn(1, 3, 8, 8).cfloat()).rows
    assert (row.status, row.reason) == ("torch", "dtype complex64")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_epilogue(activation):
    kinds = {"relu": F.relu, "gelu": F.gelu}
    for cls in (nn.Conv2d, nn.ConvTranspose2d):
        ours, stock = pair(cls, 4, 4, 3, padding=1)
        x = torch.randn(2, 4, 6, 6)
        with torch.no_grad():
            for layer in (ours, fastdl.freeze(copy.deepcopy(ours))):
                close(layer(x, activation=activation, residual=x), kinds[activation](stock(x)) + x)


# --- packs --------------------------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen(kind, dtype, monkeypatch):
    cls, shape = KINDS[kind]
    layer = fastdl.optimize(cls(4, 6, 3, stride=2, padding=1, groups=2)).to(dtype)
    x = torch.randn(shape).to(dtype)
    expected = results(layer, x)
    fastdl.freeze(layer)
    assert layer._pack.packed.nbytes == layer.pack_size()
    given = []
    for name in ("conv", "conv_dgrad"):
        native = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, native=native, **o: (given.append(o["pack"]), native(*a, **o)))
    found = results(layer, x)
    assert given[0] is layer._pack.packed and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (row,) = fastdl.explain(layer, x).rows
    assert row.status == "fastdl, frozen"
    fastdl.unfreeze(layer)
    assert layer._pack is None


def test_stale_packs_are_noticed(monkeypatch):
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", "1")
    layer = fastdl.freeze(fastdl.optimize(nn.Conv2d(3, 4, 3)))
    x = torch.randn(1, 3, 6, 6)
    layer(x)
    layer.weight.data.add_(1)
    with pytest.raises(RuntimeError, match=r"layer '\(model\)' is frozen"):
        layer(x)


def test_packs_follow_what_they_were_made_for():
    layer = fastdl.freeze(fastdl.optimize(nn.Conv2d(3, 4, 3)))
    x = torch.randn(1, 3, 6, 6)
    stock = fastdl.restore(copy.deepcopy(layer))
    stock.weight = layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    close(layer(x), stock(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastdl.freeze(layer)(x), fastdl.unfreeze(layer)(x))


# --- folded batch norms -------------------------------------------------------------------------------------------
def settled(model):
    """Batch norms with statistics and parameters that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def norms(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("trace", [True, False])
def test_folding(trace, freeze):
    stock = settled(resnet())
    if not trace:  # a forward that torch.fx cannot follow: the blocks and sequences inside are looked at one by one
        stock = nn.Sequential(Branching(stock), nn.Identity())
    stock.eval()
    ours = fastdl.optimize(copy.deepcopy(stock), fold_batchnorm=True)
    parameters, state = list(ours.parameters()), copy.deepcopy(ours.state_dict())
    assert set(norms(ours)) == {folded.BatchNorm2d} and len(norms(ours)) == 20
    if freeze:
        fastdl.freeze(ours)
    x = torch.randn(2, 1, 8, 8)
    seen = []
    F_batch_norm, F.batch_norm = F.batch_norm, lambda *a, **k: (seen.append(1), F_batch_norm(*a, **k))[1]
    try:
        with torch.no_grad():
            found = ours(x)
    finally:
        F.batch_norm = F_batch_norm
    assert not seen
    close(found, stock(x).detach(), 1e-3)
    for got, want in zip(results(ours, x), results(stock, x), strict=True):  # gradients flow through the folding
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * max(1.0, want.abs().max().item()))
    rows = {row.fqn: row for row in fastdl.explain(ours, x).rows}
    conv = next(row for row in rows.values() if row.type == "Conv2d")
    norm = next(row for row in rows.values() if row.type == "BatchNorm2d")
    assert conv.reason == f"with {norm.fqn} folded in" and norm.reason == f"folded into {conv.fqn}"
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert all(torch.equal(a, state[k]) for k, a in ours.state_dict().items())
    ours.train(), stock.train()
    close(ours(x), stock(x), 1e-3)
    assert "training mode" in next(r for r in fastdl.explain(ours, x).rows if r.type == "BatchNorm2d").reason
    stock(x)
    ours.eval(), stock.eval()
    if freeze:
        fastdl.freeze(ours)
    close(ours(x), stock(x), 1e-3)
    fastdl.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert [set(vars(m)) for m in ours.modules()] == [set(vars(m)) for m in stock.modules()]
    close(ours(x), stock(x), 1e-3)


class Branching(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() < 1e9 else x


class Twice(nn.Module):
    """What must not be folded: the convolution's own result is wanted, or the layers run more than once."""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.b, self.bn_b = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.c, self.bn_c = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.d, self.bn_d = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)
        self.e, self.bn_e = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.again = self.e

    def forward(self, x):
        y = self.a(x)
        x = self.bn_a(y) + y
        x = self.bn_b(self.b(self.bn_b(self.b(x))))
        x = self.c(self.bn_c(x))
        x = self.bn_d(self.d(x))
        return self.bn_e(self.e(x))


def test_what_is_not_folded():
    stock = settled_or_not(Twice()).eval()
    ours = fastdl.optimize(copy.deepcopy(stock), fold_batchnorm=True)
    assert set(norms(ours)) == {nn.BatchNorm2d}
    x = torch.randn(1, 2, 3, 3)
    close(ours(x), stock(x))


def settled_or_not(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
    return model


def test_filter_and_sequences():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))
    fastdl.optimize(model, fold_batchnorm=True, filter_fn=lambda module, fqn: fqn != "3")
    assert norms(model) == [folded.BatchNorm1d, nn.BatchNorm1d]
    model = nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3))
    assert norms(fastdl.optimize(model)) == [nn.BatchNorm3d]
    assert norms(fastdl.optimize(model, fold_batchnorm=True)) == [folded.BatchNorm3d]
    assert norms(fastdl.optimize(model, fold_batchnorm=True)) == [folded.BatchNorm3d]


def test_changes_after_folding():
    """Whatever comes between the two, or in place of one, has them computed apart."""
    x = torch.randn(2, 2, 4, 4)

    def model():
        torch.manual_seed(1)
        stock = settled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))).eval()
        return fastdl.optimize(copy.deepcopy(stock), fold_batchnorm=True), stock

    ours, stock = model()
    assert ours[0]._fold.holds()
    seen = []
    handle = ours[0].register_forward_hook(lambda m, i, o: seen.append(o))
    close(ours(x), stock(x))
    close(seen[0], stock[0](x))
    handle.remove()
    assert ours[0]._fold.holds()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        close(twin(x), stock(x))
        close(twin[0](x), stock[0](x))
    ours[1] = stock[1]
    close(ours(x), stock(x))
    ours, stock = model()
    fastdl.freeze(ours)
    stock[1].running_mean.add_(1)
    ours[1].load_state_dict(stock[1].state_dict())
    assert ours[0]._pack is None
    close(ours(x), stock(x))
    close(torch.jit.trace(ours, x)(x), stock(x))
    close(torch.export.export(ours, (x,)).module()(x), stock(x))
    close(torch.compile(ours, fullgraph=True, backend="eager")(x), stock(x))
    ours.double(), stock.double()
    close(ours(x.double()), stock(x.double()))
    torch._dynamo.reset()


# --- a network ----------------------------------------------------------------------------------------------------
def test_channels_last_stays_through_a_residual_block():
    """No operation but the convolutions touches layouts, forward or backward: every tensor is channels_last."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            results = out if isinstance(out, (tuple, list)) else (out,)
            for t in results:
                image = isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[2] > 1
                if image and not t.is_contiguous(memory_format=torch.channels_last):
                    self.found.append((str(func), tuple(t.shape), t.stride()))
            if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
                self.found.append((str(func), tuple(args[0].shape)))
            return out

    block = fastdl.optimize(Residual(8, 16, 2)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Copies() as copies:
        y = block(x)
        y.backward(torch.ones_like(y))
    assert not copies.found
    assert y.is_contiguous(memory_format=torch.channels_last) and x.grad.is_contiguous(
        memory_format=torch.channels_last
    )
    assert all(p.grad.stride() == p.stride() for p in block.parameters())
