"""Where tensors enter the CUDA modules: each argument of each native call, of every wrong kind; streams, devices,
threads; what waits for the GPU. On the host twin, and on a GPU."""

import re
import subprocess
import threading

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdl import functional
from fastdl.ops import calls, cuda
from fastdl.testing import integer_matrix

STEP = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
F32, BF16 = torch.float32, torch.bfloat16


# Native function -> (what it is called in messages, its tensors, its other arguments). A shape stands for zeros of
# float32, (shape, dtype) for those of another dtype.
def gemm():
    a = {"a": (3, 4), "b": (4, 5), "out": (3, 5), "bias": (5,), "residual": (3, 5), "pre": (3, 5)}
    return "gemm", a, {"activation": "relu"}


def attention():
    qkv = {"query": (1, 2, 3, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8), "mask": (1, 1, 3, 5)}
    return "scaled_dot_product_attention", {"out": (1, 2, 3, 8), "lse": (1, 2, 3, 2)} | qkv, {"scale": 1.0}


def attention_packed():
    qkv = {name: (1, 2, 5, 8) for name in ("query", "key", "value", "out")}
    offsets = {f"cu_seqlens_{x}": ((2,), torch.int32) for x in "qk"}
    return "scaled_dot_product_attention", {"lse": (1, 2, 5, 2)} | qkv | offsets, {"scale": 1.0}


def attention_backward():
    _, tensors, options = attention()
    grads = {f"d{x[0]}": tensors[x] for x in ("query", "key", "value")} | {"dmask": (1, 1, 3, 5)}
    return "scaled_dot_product_attention", grads | {"dout": tensors["out"]} | tensors, options


def rnn():
    outputs = {"y": (2, 3, 4), "h_n": (3, 4), "c_n": (3, 4), "x_gates": (2, 3, 16), "h0": (3, 4), "c0": (3, 4)}
    return "rnn", outputs | {"w_hh": (16, 4), "b_hh": (16,), "workspace": ((1 << 20,), torch.uint8)}, {
        "saved": None, "w_hr": None, "mode": "lstm",
    }  # fmt: skip


def rnn_backward():
    states = {f"{name}{end}": (3, 4) for name in ("dh", "dc") for end in ("0", "_n")}
    tensors = {"d_gates": (2, 3, 16), "dy": (2, 3, 4), "y": (2, 3, 4), "h0": (3, 4), "c0": (3, 4)} | states
    return "rnn_backward", tensors | {"w_hh": (16, 4), "b_hh": (16,), "workspace": ((1 << 20,), torch.uint8)}, {
        "saved": torch.zeros(6, 20), "w_hr": None, "mode": "lstm",
    }  # fmt: skip


def conv():
    shapes = {"y": (2, 5, 3, 3), "x": (2, 4, 4, 4), "w": (5, 4, 2, 2)}
    shapes |= {"bias": (5,), "residual": (2, 5, 3, 3), "pre": (2, 5, 3, 3)}
    return "conv", shapes, STEP | {"activation": "relu"}


NATIVE = {
    "gemm": gemm,
    "activation_grad": lambda: (
        "activation_grad", {"dy": (3, 5), "z": (3, 5), "dz": (3, 5)}, {"activation": "relu"},
    ),
    "sum_rows": lambda: ("sum_rows", {"x": (3, 5), "out": (5,)}, {}),
    "attention": attention,
    "attention_packed": attention_packed,
    "attention_backward": attention_backward,
    "conv": conv,
    "conv_dgrad": lambda: (
        "conv", {"dx": (2, 4, 4, 4), "dy": (2, 5, 3, 3), "w": (5, 4, 2, 2), "bias": (4,)}, STEP,
    ),
    "conv_wgrad": lambda: (
        "conv", {"dw": (5, 4, 2, 2), "dy": (2, 5, 3, 3), "x": (2, 4, 4, 4), "dbias": (5,)}, STEP,
    ),
    "rnn": rnn,
    "rnn_backward": rnn_backward,
    "rnn_states_before": lambda: (
        "rnn_states_before", {"out": (6, 4), "y": (6, 4), "h0": (3, 4)}, {"batch_sizes": torch.tensor([3, 3])},
    ),
    "mma_probe": lambda: (
        "mma_probe", {"a": ((16, 16), BF16), "b": ((8, 16), BF16), "out": ((16, 8), F32)}, {},
    ),
}  # fmt: skip
OPTIONAL = {"bias", "residual", "pre", "mask", "lse", "dq", "dk", "dv", "dmask", "dbias"}
OPTIONAL |= {"h_n", "c_n", "h0", "c0", "b_hh"}
OPTIONAL |= {"dh0", "dc0", "dh_n", "dc_n"} | {("rnn_backward", "dy"), "workspace"}
# What the tensors of convolutions are called in messages, as in the CPU's.
CALLED = {
    "conv": {"y": "out", "x": "input", "w": "weight"},
    "conv_dgrad": {"dx": "out", "dy": "grad", "w": "weight"},
    "conv_wgrad": {"dw": "out", "dy": "grad", "x": "input"},
}


def spoilt(shape, dtype):
    """What is no dense tensor of this dtype on that device: kind -> (a function of the device, exception, said)."""
    strangers = (torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8)
    others = {str(t)[6:]: t for t in strangers if t != dtype}
    others["bfloat16" if dtype is F32 else "float32"] = BF16 if dtype is F32 else F32
    kinds = {
        name: (lambda device, t=t: torch.zeros(shape, dtype=t, device=device), RuntimeError, "dtype|expected .* got")
        for name, t in others.items()
    }

    def fake(device):
        with FakeTensorMode():
            return torch.empty(shape, dtype=dtype, device=device)

    return kinds | {
        "none": (lambda device: None, TypeError, "None"),
        "list": (lambda device: [1.0, 2.0], TypeError, "list"),
        "numpy": (lambda device: numpy.zeros(shape, dtype=numpy.float32), TypeError, "ndarray"),
        "meta": (lambda device: torch.empty(shape, dtype=dtype, device="meta"), RuntimeError, "memory|meta|storage"),
        "fake": (fake, RuntimeError, "memory|storage"),
        "sparse": (
            lambda device: torch.zeros(shape, dtype=dtype, device=device).to_sparse(),
            RuntimeError, "[Ss]parse|storage",
        ),
        "elsewhere": (
            lambda device: torch.zeros(shape, dtype=dtype, device="cpu" if device.type == "cuda" else "meta"),
            RuntimeError, "cpu|memory",
        ),
        "0-D": (lambda device: torch.zeros((), dtype=dtype, device=device), RuntimeError, "expected"),
        "7-D": (lambda device: torch.zeros((1,) * 7, dtype=dtype, device=device), RuntimeError, "expected"),
    }  # fmt: skip


def arguments(name, device):
    said, tensors, options = NATIVE[name]()
    made = {
        key: torch.zeros(value[0], dtype=value[1], device=device)
        if isinstance(value[0], tuple) else torch.zeros(value, device=device)
        for key, value in tensors.items()
    }  # fmt: skip
    options = {
        key: v.to(device) if isinstance(v, torch.Tensor) and key != "batch_sizes" else v for key, v in options.items()
    }
    if name.startswith("attention"):
        made["workspace"] = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    elif name in ("conv", "conv_dgrad", "conv_wgrad"):
        options["workspace"] = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    return said, made | options


def native(gpu, name):
    return getattr(gpu.module, name.removesuffix("_packed"))


CASES = [
    pytest.param(name, argument, kind, id=f"{name}-{argument}-{kind}")
    for name, build in NATIVE.items()
    for argument, shape in build()[1].items()
    for kind in spoilt((1,), F32)
    if not (kind == "none" and (argument in OPTIONAL or (name, argument) in OPTIONAL))
    # a mask may be bool
    and not (argument == "mask" and kind == "bool")
    and not (argument.startswith("cu_") and kind == "none")
]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.sanitized
def test_good_call_passes(gpu, name):
    """The calls that the others spoil are good themselves, whether or not gradients are asked of their tensors."""
    _, args = arguments(name, gpu.device)
    native(gpu, name)(**args)
    leaves = {
        key: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in args.items()
    }
    native(gpu, name)(**leaves)


@pytest.mark.parametrize(("name", "argument", "kind"), CASES)
def test_wrong_kind_of_argument(gpu, name, argument, kind):
    said, args = arguments(name, gpu.device)
    good = args[argument]
    make, exception, saying = spoilt(tuple(good.shape), good.dtype).get(kind, (None, None, None))
    if make is None:
        pytest.skip("that is the right dtype")
    called = CALLED.get(name, {}).get(argument, argument)
    if kind in ("bfloat16", "float32", "0-D", "7-D"):  # may make one of the others the odd one
        called = r"\w+"
    with pytest.raises(exception, match=rf"\b{said}\w*: argument '{called}'") as caught:
        native(gpu, name)(**{**args, argument: make(gpu.device)})
    assert re.search(saying, str(caught.value)), caught.value


def test_one_device_for_all(gpu):
    """The second GPU's tensors are refused by name, where there are two."""
    if gpu.is_twin or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    a, b, out = (torch.zeros(4, 4, device=f"cuda:{i}") for i in (0, 1, 0))
    with pytest.raises(RuntimeError, match=r"'b': expected a tensor on cuda:0 as the others, got cuda:1"):
        gpu.module.gemm(a, b, out)
    a, b = (torch.ones(4, 4, device="cuda:1") for _ in range(2))
    assert torch.equal(functional.matmul(a, b), torch.full((4, 4), 4.0, device="cuda:1"))
    assert torch.cuda.current_device() == 0


# --- as Python calls them -----------------------------------------------------------------------------------------
def test_negated_views_are_resolved(gpu):
    """x.conj().imag is a view with a bit that says: the negative of this memory."""
    z = torch.complex(torch.ones(5, 6), torch.arange(30.0).view(5, 6)).to(gpu.device)
    x, w = z.conj().imag, torch.ones(4, 6, device=gpu.device)
    assert x.is_neg()
    calls.handbacks.clear()
    leaf = x.clone().requires_grad_()
    expected = functional.linear(leaf, w)
    assert torch.equal(functional.linear(x, w), expected)
    assert torch.equal(functional.matmul(x, w.mT), expected)
    assert torch.equal(functional.linear(w, x), expected.mT)
    dw = functional.linear(leaf, w.clone().requires_grad_())
    dw.backward(z[:, :4].conj().imag)  # a negated gradient
    assert torch.equal(leaf.grad, functional.matmul(z[:, :4].conj().imag.resolve_neg(), w))
    q = x.view(1, 1, 5, 6)
    assert torch.equal(
        functional.scaled_dot_product_attention(q, q, q),
        functional.scaled_dot_product_attention(*[q.resolve_neg()] * 3),
    )
    image = x.view(1, 1, 5, 6)
    kernel = torch.ones(2, 1, 2, 2, device=gpu.device)
    assert torch.equal(functional.conv2d(image, kernel), functional.conv2d(image.resolve_neg(), kernel))
    assert not calls.handbacks


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.as_subclass(Own), "input is a Own"),
        (lambda x: x.to_sparse(), "input is sparse_coo"),
        (lambda x: x.double(), None),  # float64 has a way of its own
        (lambda x: x.to(torch.complex64), "dtype complex64"),
    ],
    ids=["subclass", "sparse", "float64", "complex"],
)
def test_what_else_is_no_plain_tensor_goes_to_torch(gpu, make, reason):
    x = make(torch.ones(3, 4, device=gpu.device))
    w = torch.ones(5, 4, device=gpu.device).to(x.dtype)
    calls.handbacks.clear()
    assert torch.equal(torch.as_tensor(functional.linear(x, w)), torch.full((3, 5), 4.0, device=gpu.device).to(x.dtype))
    assert {said for _, said in calls.handbacks} == ({reason} if reason else set())


# --- streams, threads, processes ----------------------------------------------------------------------------------
def every_operation(device, dtype=F32):
    """name -> a call of the operation and its gradients, and the tensors that lie on the CPU by right."""
    g = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, generator=g).to(dtype).to(device).requires_grad_()

    x, w, b, r = leaf(5, 12), leaf(9, 12), leaf(9), leaf(5, 9)
    q, k = leaf(1, 2, 5, 8), leaf(1, 2, 7, 8)
    image, kernel = leaf(1, 4, 5, 5), leaf(6, 4, 3, 3)
    sizes = torch.tensor([0, 2, 5], dtype=torch.int32).to(device)
    total = leaf(5, 2, 8)
    import fastdl

    lstm, gru = (getattr(fastdl.nn, cls)(6, 8).to(device, dtype) for cls in ("LSTM", "GRU"))
    steps = leaf(4, 3, 6)
    lengths = torch.tensor([4, 2, 1])
    f = functional
    return {
        "linear": lambda: f.linear(x, w, b),
        "fused": lambda: f.linear(x, w, b, activation="gelu", residual=r),
        "matmul": lambda: f.matmul(x, w.mT),
        "attention": lambda: f.scaled_dot_product_attention(q, k, k, is_causal=True),
        "dropout": lambda: f.scaled_dot_product_attention(q, k, k, dropout_p=0.5),
        "varlen": lambda: f.attention_varlen(total, total, total, sizes, sizes),
        "conv": lambda: f.conv2d(image, kernel, padding=1),
        "transposed": lambda: f.conv_transpose2d(image, kernel.transpose(0, 1)),
        "lstm": lambda: lstm(steps)[0],
        "gru": lambda: gru(steps)[0],
        "packed": lambda: lstm(torch.nn.utils.rnn.pack_padded_sequence(steps, lengths))[0].data,
    }  # fmt: skip


OPERATIONS = tuple(every_operation(torch.device("cpu")))


class Reads(TorchDispatchMode):
    """Finds what the CPU reads of a tensor: on a GPU it would wait for it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.seen.append((str(func), args[0].dtype, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_waits_for_the_gpu(gpu, name):
    """On the twin: no value of a tensor of the GPU's is read; batch sizes and seeds, int64, lie on the CPU by right."""
    call = every_operation(gpu.device)[name]
    call().sum().backward()
    if gpu.is_twin:
        with Reads() as reads:
            call().sum().backward()
        assert not [seen for seen in reads.seen if seen[1] != torch.int64], reads.seen
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", OPERATIONS)
def test_work_goes_to_the_current_stream(gpu, name):
    """Behind work that takes long: on another stream the operands would be read before they are there."""
    if gpu.is_twin:
        pytest.skip("streams are a GPU's")
    call = every_operation(gpu.device)[name]
    expected = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)
        call()
        assert not stream.query()  # nor did the call wait
    stream.synchronize()
    if name != "dropout":
        with torch.cuda.stream(stream):
            again = call()
        stream.synchronize()
        assert torch.equal(again, expected)


def test_operands_that_are_still_being_written(gpu):
    if gpu.is_twin:
        pytest.skip("streams are a GPU's")
    stream = torch.cuda.Stream()
    x, w = torch.zeros(64, 64, device="cuda"), torch.ones(64, 64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)
        x.fill_(1.0)
        out = functional.linear(x, w)
    stream.synchronize()
    assert torch.equal(out, torch.full_like(out, 64.0))


def test_the_device_and_the_error_state_are_left_alone(gpu):
    if gpu.is_twin:
        pytest.skip("needs a GPU")
    x = torch.ones(4, 4, device="cuda:0")
    before = torch.cuda.current_device()
    with pytest.raises(RuntimeError, match="'b'"):
        gpu.module.gemm(x, torch.ones(5, 4, device="cuda:0"), torch.ones(4, 4, device="cuda:0"))
    assert torch.cuda.current_device() == before
    assert torch.equal(x + 1, torch.full_like(x, 2))  # torch finds no error of ours
    torch.cuda.synchronize()


def test_threads_at_once(gpu, generator):
    """The GIL is free while a kernel is launched: other threads launch too."""
    pairs = [(integer_matrix((33, 40), 40, generator, dtype), integer_matrix((40, 17), 40, generator, dtype))
             for dtype in (F32, BF16, torch.float16) * 2]  # fmt: skip
    pairs = [(a.to(gpu.device), b.to(gpu.device)) for a, b in pairs]
    expected = [(a.double() @ b.double()).to(a.dtype) for a, b in pairs]
    wrong = []

    def work(index):
        a, b = pairs[index]
        for _ in range(3):
            out = torch.full_like(expected[index], float("nan"))
            size = gpu.module.gemm_workspace(a, b, out)
            gpu.module.gemm(
                a, b, out, workspace=torch.empty(size, dtype=torch.uint8, device=gpu.device) if size else None
            )
            if not torch.equal(out, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


needs_module = pytest.mark.skipif(cuda.load("_cuda")[0] is None, reason=f"{cuda.load('_cuda')[1] or '-'}")


@needs_module
def test_nothing_of_the_driver_is_linked():
    """The module is loaded on machines without a driver."""
    done = subprocess.run(
        ["readelf", "-dW", cuda.load("_cuda")[0].__file__], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    assert needed and not [name for name in needed if name.startswith(("libcuda", "libnv", "libtorch", "libc10"))]


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_it_is_an_exception(run_python):
    """And a forked process is no worse off."""
    code = """if True:
        import os
        import torch
        from fastdl import _cuda
        assert _cuda.gpu_count() == 0
        for call in (lambda: _cuda.gpu_info(0), lambda: _cuda.gpu_name(0)):
            try:
                call()
            except RuntimeError as error:
                assert "CUDA" in str(error), error
            else:
                raise AssertionError("no GPU, and no error")
        try:
            _cuda.gemm(*(torch.zeros(4, 4) for _ in range(3)))
        except RuntimeError as error:
            assert "'a': expected a float32, bfloat16 or float16 tensor on cuda, got float32 on cpu" in str(error)
        child = os.fork()
        if child == 0:
            os._exit(0 if _cuda.gpu_count() == 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("ok")
    """
    assert run_python("-c", code).strip() == "ok"
