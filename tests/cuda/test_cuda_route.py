"""Where calls with CUDA tensors go, and what is said of it; on fake tensors, so that it needs no GPU.

Without gradients: a torch built for CPUs aborts where autograd meets a tensor that calls itself CUDA.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastdl
from fastdl.functional import linear, matmul, scaled_dot_product_attention
from fastdl.ops import calls, cuda
from fastdl.ops.packed import PackedWeight
from fastdl.testing import twin

NO_TWIN = cuda.load("_twin")[1]
needs_twin = pytest.mark.skipif(bool(NO_TWIN), reason="the host twin is not built (FASTDL_TWIN=ON)")


@pytest.fixture(autouse=True)
def records():
    calls.handbacks.clear()


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


def reasons():
    return {reason for _, reason in calls.handbacks}


def on_gpu(*shape, index=0):
    return torch.empty(*shape, device=f"cuda:{index}")


def module_on_gpu():
    layer = fastdl.nn.Linear(3, 4, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(on_gpu(4, 3), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "run",
    [
        lambda: linear(on_gpu(2, 3), on_gpu(4, 3)),
        lambda: linear(on_gpu(2, 3), on_gpu(4, 3), activation="relu"),
        lambda: matmul(on_gpu(2, 3), on_gpu(3, 4)),
        lambda: module_on_gpu()(on_gpu(2, 3)),
    ],
    ids=["linear", "fused", "matmul", "module"],
)
def test_off_by_default_with_the_reason(run, fake, monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda name: (object(), ""))
    monkeypatch.setattr(cuda, "UNVERIFIED", False)
    out = run()
    assert out.device.type == "cuda" and out.shape == (2, 4)
    assert reasons() == {
        "CUDA kernels are not verified on a GPU yet (FASTDL_CUDA_UNVERIFIED=1 turns them on)",
    }


def test_a_build_without_them_says_so(fake, monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda name: (None, "no CUDA kernels in this build: no nvcc"))
    linear(on_gpu(2, 3), on_gpu(4, 3))
    assert reasons() == {"no CUDA kernels in this build: no nvcc"}


class Gpus:
    """Stands for `_cuda`: two GPUs, the second one too old."""

    @staticmethod
    def gpu_count():
        return 2

    @staticmethod
    def gpu_info(index):
        return {"sm": (90, 75)[index]}


@pytest.fixture
def two_gpus(fake, monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda name: (Gpus, ""))
    monkeypatch.setattr(cuda, "UNVERIFIED", True)
    cuda.gpu_reason.cache_clear()
    yield
    cuda.gpu_reason.cache_clear()


def test_on_each_gpu_that_can(two_gpus):
    for index, expected in (
        (0, set()),
        (1, {"CUDA kernels need sm_80 or newer, cuda:1 is sm_75"}),
        (2, {"no GPU with index 2 can be used"}),
    ):
        calls.handbacks.clear()
        x, w = (torch.empty(*shape, device=f"cuda:{index}") for shape in ((2, 3), (4, 3)))
        assert cuda.runs(x) == (not expected)
        assert linear(x, w).device == x.device
        assert reasons() == expected


@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
def test_a_frozen_weight_that_went_to_a_gpu(two_gpus, check):
    """Moved by its data, so that the layer did not notice: its pack, on the CPU, is left alone."""
    layer = module_on_gpu()
    layer._pack = PackedWeight(layer.weight, None, "a row of the CPU's", "layer", check)  # None: nothing may touch it
    assert layer(on_gpu(2, 3)).shape == (2, 4) and layer(on_gpu(2, 3), activation="relu").shape == (2, 4)
    assert not reasons()


def test_freeze_leaves_layers_on_a_gpu_alone(two_gpus):
    layer = module_on_gpu()
    with pytest.warns(UserWarning, match=r"left unfrozen: .*: expected a .* weight on cpu, got .* on cuda:0"):
        fastdl.freeze(torch.nn.Sequential(layer))
    assert layer._pack is None and layer(on_gpu(2, 3)).shape == (2, 4)


def test_devices_that_differ_are_named(two_gpus):
    with pytest.raises(RuntimeError, match="expected all tensors on one device, got input on cuda:0, weight on cpu"):
        linear(on_gpu(2, 3), torch.empty(4, 3))
    with pytest.raises(RuntimeError, match="input on cuda:0, other on cuda:1"):
        matmul(on_gpu(2, 3), on_gpu(3, 4, index=1))
    with pytest.raises(RuntimeError, match="input on cuda:0, weight on cuda:0, bias on cpu"):
        linear(on_gpu(2, 3), on_gpu(4, 3), torch.empty(4))


@contextmanager
def autocast_to_bfloat16(device):
    """torch.autocast, which warns where there is no GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def test_autocast_is_that_of_the_device(two_gpus):
    x, w = on_gpu(2, 3), on_gpu(4, 3)
    with autocast_to_bfloat16("cuda"):
        assert linear(x, w).dtype == torch.bfloat16
        assert matmul(x, w.mT).dtype == torch.bfloat16
        assert linear(x.double(), w.double()).dtype == torch.float64
    with autocast_to_bfloat16("cpu"):
        assert linear(x, w).dtype == torch.float32
    assert not reasons()


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_the_variable_is_read_at_import(value, run_python):
    code = "from fastdl.ops import cuda; print(cuda.UNVERIFIED)"
    assert run_python("-c", code, env={"FASTDL_CUDA_UNVERIFIED": value}).strip() == str(value == "1")


def test_precision_follows_torch_and_the_variable(run_python):
    code = """if True:
        import torch
        from fastdl.ops import cuda
        print(*(cuda.precision(op) for op in ("matmul", "conv", "rnn")))
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        print(*(cuda.precision(op) for op in ("matmul", "conv", "rnn")))
    """
    assert run_python("-c", code).splitlines() == ["ieee tf32 tf32", "tf32 ieee tf32"]
    assert run_python("-c", code, env={"FASTDL_FLOAT32": "ieee"}).splitlines() == ["fma fma fma"] * 2
    code = "import torch; torch.backends.cuda.matmul.allow_tf32 = True\nfrom fastdl.ops.cuda import precision"
    assert run_python("-c", code + '\nprint(precision("matmul"))').strip() == "tf32"


# --- the twin ------------------------------------------------------------------------------------------------------
@needs_twin
def test_the_twin_is_left_again():
    with twin() as module:
        assert module.twin and cuda.native(torch.ones(2)) is module
        with twin(3):
            assert cuda.twin_active
        assert cuda.twin_active
    assert cuda.native(torch.ones(2)) is None
    with pytest.raises(ZeroDivisionError), twin():
        1 / 0  # noqa: B018
    assert not cuda.twin_active


@needs_twin
def test_nothing_is_plain_under_the_twin(monkeypatch):
    """Every eager call takes the general way: a native function of the CPU that ran would be seen."""
    from fastdl.ops import gemm_native, plain

    def forbidden(*args):
        raise AssertionError("the CPU's kernels ran")

    for name in ("linear", "linear_fused", "matmul", "linear_wgrad", "sum_rows", "activation_grad"):
        monkeypatch.setattr(gemm_native, name, forbidden)
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
    with twin():
        assert not plain.eager_is_plain()
        (linear(x, w, activation="silu").sum() + matmul(x, w.mT).sum()).backward()
    assert x.grad is not None and not reasons()


@needs_twin
def test_an_operation_without_cuda_kernels_says_so(monkeypatch):
    from fastdl.ops import gemm

    monkeypatch.setattr(gemm, "LINEAR", gemm.LINEAR.__class__(**{**vars(gemm.LINEAR), "unsupported_on_cuda": None}))
    with twin():
        assert linear(torch.ones(2, 3), torch.ones(4, 3)).shape == (2, 4)
    assert reasons() == {"the operation has no CUDA kernels"}


def test_without_a_twin_it_says_how_to_build_one(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda name: (None, "nothing"))
    with pytest.raises(RuntimeError, match=r"FASTDL_TWIN=ON builds it"), twin():
        pass


def test_other_operations_hand_back_alike(fake, monkeypatch):
    monkeypatch.setattr(cuda, "UNVERIFIED", False)
    monkeypatch.setattr(cuda, "load", lambda name: (object(), ""))
    q = on_gpu(1, 2, 4, 8)
    assert scaled_dot_product_attention(q, q, q).shape == q.shape
    assert reasons() == {cuda.OFF}
