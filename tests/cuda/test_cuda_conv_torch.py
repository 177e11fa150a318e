"""CUDA convolution from Python: functions and their gradients, modules, torch's own checks; on the twin or a GPU."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck

import fastdl
from conv_on_gpu import needs_module
from conv_reference import LAYOUTS, lay
from fastdl.functional import conv2d, conv_transpose2d
from fastdl.ops import calls, conv_shapes, cuda_conv
from fastdl.testing import UNIT_ROUNDOFF

pytestmark = [
    needs_module,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


# --- from Python -----------------------------------------------------------------------------------------------------
def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


@pytest.fixture
def exact_float32():
    """torch gives cuDNN leave to use tf32 unless it is told otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_functions_and_their_gradients(gpu, layout, transposed, generator, exact_float32):
    x = lay(torch.randn(2, 6, 7, 8, generator=generator), layout).to(gpu.device)
    w = torch.randn(6, 3, 3, 3, generator=generator) if transposed else torch.randn(4, 3, 3, 3, generator=generator)
    b = torch.randn(6 if transposed else 4, generator=generator)
    options = {"stride": 2, "padding": 1, "groups": 2}
    fast, slow = (conv_transpose2d, torch.conv_transpose2d) if transposed else (conv2d, torch.conv2d)
    tensors = [x, w.to(gpu.device), b.to(gpu.device)]
    ours = gradients(lambda *t: fast(*t, **options), tensors)
    theirs = gradients(lambda *t: slow(*t, **options), [t.double().cpu() for t in tensors])
    for a, e in zip(ours, theirs, strict=True):
        assert torch.allclose(a.cpu().double(), e, rtol=1e-5, atol=1e-5)


def test_activation_and_residual_differentiate(gpu, generator, exact_float32):
    shapes = ((1, 8, 5, 6), (8, 8, 3, 3), (8,), (1, 8, 5, 6))
    tensors = [torch.randn(*shape, generator=generator).to(gpu.device) for shape in shapes]

    def theirs(x, w, b, r):
        return torch.nn.functional.gelu(torch.conv2d(x, w, b, padding=1)) + r

    ours = gradients(lambda x, w, b, r: conv2d(x, w, b, padding=1, activation="gelu", residual=r), tensors)
    for a, e in zip(ours, gradients(theirs, [t.double().cpu() for t in tensors]), strict=True):
        assert torch.allclose(a.cpu().double(), e, rtol=1e-5, atol=1e-5)


def test_precision_follows_torch(gpu, exact_float32):
    x, w = torch.randn(1, 4, 5, 5, device=gpu.device), torch.randn(3, 4, 3, 3, device=gpu.device)
    exact = conv2d(x, w)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    short = conv2d(x, w)
    expected = torch.nn.functional.conv2d(x.double(), w.double())
    errors = [(y.double() - expected).abs().max().item() for y in (exact, short)]
    assert errors[0] < errors[1] / 8 < 1e-4


@pytest.fixture
def planned(monkeypatch):
    """The kernels that Python's calls have asked for, so far."""
    found, plan = [], cuda_conv._plan

    def spy(*args):
        found.append(plan(*args)["kernel"])
        return plan(*args)

    monkeypatch.setattr(cuda_conv, "_plan", spy)
    return found


# (input, weight, geometry, activation, channels_last): torch.ops.fastdl.conv, a kind of kernel each
SAMPLES = {
    "tile": (torch.bfloat16, (2, 4, 6, 5), (6, 4, 3, 3), ((2, 1), (1, 0), (0, 1), (1, 1), 1, False), "gelu", True),
    "direct": (torch.float32, (1, 4, 5, 4), (8, 1, 3, 3), ((1, 1), (1, 1), (0, 0), (1, 1), 4, False), None, False),
    "groups": (torch.float16, (1, 4, 5), (8, 2, 3), ((1,), (1,), (0,), (1,), 2, False), None, False),
    "depthwise": (torch.float16, (1, 3, 9), (3, 1, 4), ((2,), (1,), (0,), (2,), 3, False), "relu", True),
    "transposed": (torch.float32, (2, 4, 4, 5), (4, 3, 3, 2), ((2, 2), (1, 0), (1, 0), (1, 1), 1, True), None, True),
    "3d": (
        torch.float32,
        (1, 2, 3, 4, 3),
        (3, 2, 2, 2, 2),
        ((1, 2, 1), (0, 1, 0), (0,) * 3, (1,) * 3, 1, False),
        None,
        False,
    ),
    "float64": (torch.float64, (1, 2, 5, 4), (3, 2, 3, 3), ((1, 1), (1, 1), (0, 0), (1, 1), 1, False), "silu", False),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(gpu, sample, planned):
    """Schemas, fakes and layouts hold for what the CUDA kernels give."""
    dtype, x, w, geometry, activation, last = SAMPLES[sample]
    x, w = torch.randn(x).to(gpu.device, dtype), torch.randn(w).to(gpu.device, dtype)
    g = conv_shapes.Geometry(*geometry)
    y = torch.randn(conv_shapes.result(x, w, g)).to(gpu.device, dtype)
    b = torch.randn(y.shape[1]).to(gpu.device, dtype)
    opcheck(torch.ops.fastdl.conv.default, (x, w, b, y, *geometry, activation, last, True))
    first, second = (x, y) if g.transposed else (y, x)
    rest = (g.stride, g.padding, tuple(-n for n in g.extra) if g.transposed else g.extra, g.dilation, g.groups)
    opcheck(torch.ops.fastdl.conv_wgrad.default, (first, second, w.shape[2:], *rest, last, True))
    assert bool(planned) == (dtype != torch.float64)


MODULES = {
    "Conv1d": ({"kernel_size": 3}, (7,)),
    "Conv2d": ({"kernel_size": (3, 2), "dilation": (1, 2)}, (6, 7)),
    "Conv3d": ({"kernel_size": 2, "groups": 2}, (4, 3, 5)),
    "ConvTranspose1d": ({"kernel_size": 3, "stride": 2, "output_padding": 1}, (5,)),
    "ConvTranspose2d": ({"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "groups": 2}, (4, 5)),
    "ConvTranspose3d": ({"kernel_size": 2, "stride": (1, 2, 2)}, (3, 2, 4)),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def cases():
    for name, (options, size) in MODULES.items():
        yield name, "zeros", 1 if "Transpose" not in name else options.get("padding", 0), options, size
        if "Transpose" not in name:
            yield name, "zeros", "same", options, size
            yield name, "zeros", "valid", options, size
            for mode in ("reflect", "replicate", "circular"):
                yield name, mode, 1, options, size


@pytest.mark.parametrize("format", ["contiguous", "channels_last", "unbatched"])
@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c[0]}-{c[1]}-{c[2]}") for c in cases()])
def test_modules_in_every_dimension(gpu, case, format, planned, generator, exact_float32):
    """Results and gradients: the layout of stock's, within a float32 sum's bound of stock's in float64 on the CPU."""
    name, mode, padding, options, size = case
    stock = getattr(nn, name)(4, 6, **{**options, "padding": padding, "padding_mode": mode})
    x = torch.randn(2, 4, *size, generator=generator)
    if format == "channels_last" and x.ndim in FORMATS:
        x, stock = x.contiguous(memory_format=FORMATS[x.ndim]), stock.to(memory_format=FORMATS[x.ndim])
    if format == "unbatched":
        x = x[0]
    ours = nn.Sequential(copy.deepcopy(stock)).to(gpu.device)
    fastdl.optimize(ours)
    results = []
    stride = stock(x).stride()  # in float32: torch lays out float64 otherwise
    scale = copy.deepcopy(stock).double()  # all that is summed in absolute value
    for parameter in scale.parameters():
        parameter.data.abs_()
    for module, at in ((ours, x.to(gpu.device)), (stock.double(), x.double()), (scale, x.double().abs())):
        leaf = at.detach().requires_grad_()
        out = module(leaf)
        weights = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
        weights = weights.abs() if module is scale else weights
        results.append([out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], weights)])
    assert len(planned) >= 3 and not calls.handbacks
    terms = max(6 * stock.weight[0, 0].numel(), x.numel() // 4, results[0][0].numel() // 6)  # of the longest sum
    u, roundings = UNIT_ROUNDOFF[torch.float32], terms + 16  # and those of three parts, padding and bias
    for a, e, of in zip(*results, strict=True):
        error = (a.cpu().double() - e).abs()
        assert bool((error <= roundings * u / (1 - roundings * u) * of).all()), (error / of / u).max()
    assert results[0][0].stride() == stride


def test_modules(gpu, generator, exact_float32):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding="same"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=8, stride=2),
        torch.nn.ConvTranspose2d(8, 2, 2, stride=2),
    ).to(gpu.device)
    x = torch.randn(1, 3, 9, 9, generator=generator).to(gpu.device)
    expected = model(x).detach()
    fastdl.optimize(model)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
