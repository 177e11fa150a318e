"""freeze and unfreeze: packs give the same results and gradients, go when they must, and tell when they are stale."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fastdl
from fastdl import _C
from fastdl.ops import calls, packed
from fastdl.testing import assert_gemm_close, integer_matrix


@pytest.fixture(autouse=True)
def fresh_record(monkeypatch):
    calls.handbacks.clear()
    monkeypatch.delenv("FASTDL_CHECK_FROZEN", raising=False)
    torch.manual_seed(7)


def model_of(*sizes, bias=True, dtype=torch.float32):
    """Linear layers of small integers: sums are exact, so packs must change no bit."""
    generator = torch.Generator().manual_seed(3)
    layers = nn.Sequential(*(nn.Linear(k, n, bias=bias) for k, n in itertools.pairwise(sizes)))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(integer_matrix(parameter.shape, 2**17, generator))
    return fastdl.optimize(layers.to(dtype))


def frozen(model):
    return [module._pack is not None for module in model.modules() if isinstance(module, nn.Linear)]


def watch_packs(monkeypatch):
    """Names of the native functions that get a pack from now on."""
    used = []

    def watch(name, pack, native):
        def watched(*args):
            used.extend([name] if args[pack] is not None else [])
            return native(*args)

        monkeypatch.setattr(_C, name, watched)

    for name, pack in (("plain_linear", 3), ("linear_result", 3), ("linear_fused", 7)):
        watch(name, pack, getattr(_C, name))
    return used


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("N", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_the_same(dtype, shape, N, bias, generator, monkeypatch):
    model = model_of(8, N, bias=bias, dtype=dtype)
    x = integer_matrix(shape, 64, generator, dtype).requires_grad_()
    leaves = [x, *model.parameters()]
    y = model(x)
    dy = integer_matrix(y.shape, 64, generator, dtype)
    expected = torch.autograd.grad(y, leaves, dy)
    assert fastdl.freeze(model) is model
    used = watch_packs(monkeypatch)
    again = model(x)
    assert used == ["plain_linear", "linear_result"]  # the first says that autograd must record the call
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert used[2:] == ["plain_linear"]
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(again, leaves, dy), expected, rtol=0, atol=0)
    assert not calls.handbacks


@pytest.mark.parametrize(("activation", "residual"), [(None, True), ("relu", False), ("relu", True), ("gelu", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_epilogues_read_the_pack(dtype, activation, residual, generator, monkeypatch):
    """Sums are exact, so that every kernel hands the epilogue the same z: values and gradients equal bit for bit."""
    model = model_of(8, 33, dtype=dtype)
    layer = model[0]
    x = integer_matrix((2, 9, 8), 64, generator, dtype).requires_grad_()
    rest = integer_matrix((2, 9, 33), 64, generator, dtype).requires_grad_() if residual else None
    leaves = [x, *model.parameters(), *([rest] if residual else [])]

    def run():
        y = layer(x, activation=activation, residual=rest)
        return y, torch.autograd.grad(y, leaves, torch.ones_like(y))

    expected = run()
    fastdl.freeze(model)
    used = watch_packs(monkeypatch)
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, activation=activation, residual=rest), expected[0], rtol=0, atol=0)
    assert used == ["linear_fused"] * 2

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Watch():  # the general path
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    assert used == ["linear_fused"] * 3
    assert not calls.handbacks


def test_an_epilogue_notices_a_stale_pack_and_another_weight(monkeypatch):
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", "1")
    model = fastdl.freeze(model_of(8, 4))
    x = torch.ones(3, 8)
    other = {"weight": torch.full((4, 8), 2.0), "bias": torch.zeros(4)}
    y = torch.func.functional_call(model[0], other, (x,), {"activation": "relu"})
    assert torch.equal(y, torch.full((3, 4), 16.0))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="layer '0' is frozen"):
        model[0](x, activation="relu")


def test_epilogue_under_autocast_reads_the_weight(generator):
    model = fastdl.freeze(model_of(8, 4))
    x = torch.randn(5, 8, generator=generator)
    with torch.autocast("cpu"):
        y = model[0](x, activation="gelu")
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, fastdl.unfreeze(copy.deepcopy(model))[0](x, activation="gelu"), rtol=0, atol=0)


def test_double_backward(generator):
    model = model_of(6, 4)
    x = torch.randn(3, 6, generator=generator, requires_grad=True)

    def penalty():
        first = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *model.parameters()])

    expected = penalty()
    fastdl.freeze(model)
    torch.testing.assert_close(penalty(), expected)


@pytest.mark.parametrize("transform", ["vmap", "grad", "functional_call"])
def test_torch_func(transform, generator):
    model = model_of(8, 4)
    x = torch.randn(3, 5, 8, generator=generator)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def run():
        if transform == "vmap":
            return torch.func.vmap(model)(x)
        if transform == "grad":
            return torch.func.vmap(torch.func.grad(lambda x: model(x).square().sum()))(x)
        return torch.func.functional_call(model, other, (x,))

    expected = run()
    fastdl.freeze(model)
    torch.testing.assert_close(run(), expected)


def test_autocast_reads_the_weight_and_other_inputs_are_errors(generator):
    model = fastdl.freeze(model_of(8, 4))
    x = torch.randn(5, 8, generator=generator)
    with torch.autocast("cpu"):
        y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, fastdl.unfreeze(copy.deepcopy(model))(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="one dtype, got input float64, weight float32"):
        model(x.double())
    with pytest.raises(RuntimeError, match=r"argument 'input': expected \[..., 8\]"):
        model(torch.ones(5, 9))
    assert not calls.handbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_general_path_with_half_packs(dtype, generator):
    model = model_of(8, 4, dtype=dtype)
    x = integer_matrix((3, 5, 8), 64, generator, dtype)
    expected = model(x)
    fastdl.freeze(model)
    torch.testing.assert_close(torch.func.vmap(model)(x), expected, rtol=0, atol=0)
    assert not calls.handbacks


# --- what a pack is and is not ------------------------------------------------------------------------------------
def test_packs_are_in_no_parameter_buffer_or_state():
    model = model_of(8, 6, 4)
    parameters, state = dict(model.named_parameters()), dict(model.state_dict())
    fastdl.freeze(model)
    assert frozen(model) == [True, True]
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(model.state_dict()) == list(state)
    assert not list(model.buffers())
    fastdl.unfreeze(model)
    assert frozen(model) == [False, False]
    assert "_pack" not in vars(model[0])


DROPS = {
    "to_dtype": lambda model: model.double(),
    "half": lambda model: model.half(),
    "to_same": lambda model: model.to("cpu"),
    "share_memory": lambda model: model.share_memory(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "restore": lambda model: fastdl.optimize(fastdl.restore(model)),
    "unfreeze": fastdl.unfreeze,
}


@pytest.mark.parametrize("how", DROPS)
def test_what_drops_packs(how):
    model = fastdl.freeze(model_of(8, 6, 4))
    DROPS[how](model)
    assert frozen(model) == [False, False]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
def test_copies_have_no_pack(duplicate):
    layer = fastdl.freeze(model_of(8, 6))[0]
    assert duplicate(layer)._pack is None
    assert layer._pack is not None


def test_tied_weights_share_a_pack():
    model = model_of(8, 8, 8)
    model[1].weight = model[0].weight
    fastdl.freeze(model, max_bytes=packed.pack_bytes(model[0].weight))
    assert frozen(model) == [True, True]
    assert model[0]._pack is model[1]._pack


def test_another_weight_object_is_read_itself(generator):
    model = fastdl.freeze(model_of(8, 4))
    x = torch.randn(5, 8, generator=generator)
    model[0].weight = nn.Parameter(torch.zeros(4, 8))
    torch.testing.assert_close(model(x), model[0].bias.expand(5, 4))


def test_the_bias_is_not_frozen(generator):
    model = fastdl.freeze(model_of(8, 4))
    x = torch.randn(5, 8, generator=generator)
    before = model(x)
    with torch.no_grad():
        model[0].bias += 1
    torch.testing.assert_close(model(x), before + 1)


# --- how much -----------------------------------------------------------------------------------------------------
def test_max_bytes_stops_in_order_and_names_the_rest():
    model = model_of(8, 40, 8, 4)
    sizes = [packed.pack_bytes(layer.weight) for layer in model]
    assert sizes[0] >= 4 * 8 * 40
    with pytest.warns(UserWarning, match=r"left unfrozen: 1: its pack of \d+ bytes does not fit.*; 2: its pack"):
        fastdl.freeze(model, max_bytes=sizes[0])
    assert frozen(model) == [True, False, False]
    with pytest.warns(UserWarning, match="left unfrozen: 0: .*; 1: .*; 2: "):
        fastdl.freeze(model, max_bytes=0)
    assert frozen(model) == [False] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdl.freeze(model, max_bytes=sum(sizes))
    assert frozen(model) == [True] * 3
    with pytest.raises(ValueError, match="expected None or at least 0, got -1"):
        fastdl.freeze(model, max_bytes=-1)


def test_layers_that_cannot_be_frozen_are_named():
    model = model_of(8, 6, 4)
    model[0].double()
    parametrizations.weight_norm(model[1])
    with pytest.warns(
        UserWarning, match=r"0: expected a float32, bfloat16 or float16 weight on cpu, got .*float64.*; 1: parametrised"
    ):
        fastdl.freeze(model)
    assert model[0]._pack is None
    with pytest.warns(UserWarning, match="Sequential has no swapped layer: optimize it first"):
        fastdl.freeze(nn.Sequential(nn.Linear(2, 2)))


# --- stale packs --------------------------------------------------------------------------------------------------
def test_freezing_again_packs_the_present_weight(generator):
    model = fastdl.freeze(model_of(256, 192))
    x = torch.randn(256, 256, generator=generator)  # rows and columns enough for the pack to pay at every level
    with torch.no_grad():
        model[0].weight.mul_(2)
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert not torch.allclose(model(x), expected)  # the documented error of writing a frozen weight
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    assert_gemm_close(fastdl.freeze(model)(x).detach(), x, weight.t(), bias, precision="ieee")


WRITES = {
    "in_place": lambda w: w.mul_(2),
    "data": lambda w: w.data.copy_(torch.zeros(w.shape)),
    "one_element": lambda w: w.data.view(-1)[-1:].add_(1),
    "nan": lambda w: w.data.view(-1)[:1].fill_(float("nan")),
    "negative_zero": lambda w: w.data.view(-1)[:1].copysign_(torch.tensor(-1.0)),
    "data_replaced": lambda w: setattr(w, "data", torch.zeros(w.shape)),
}


@pytest.mark.parametrize("write", WRITES)
def test_check_frozen_names_the_stale_layer(write, monkeypatch, generator):
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", "1")
    model = model_of(8, 6, 4)
    with torch.no_grad():
        model[1].weight.view(-1)[0] = 0.0
    fastdl.freeze(model)
    x = torch.randn(5, 8, generator=generator)
    model(x)
    with torch.no_grad():
        WRITES[write](model[1].weight)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"layer '1' is frozen: expected the weight that freeze\(\) packed"):
                model(x)
    fastdl.unfreeze(model)
    model(x)


def test_check_frozen_accepts_nan(monkeypatch):
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", "1")
    model = model_of(8, 4)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert fastdl.freeze(model)(torch.ones(1, 8)).isnan().any()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_check_frozen_catches_fused_optimizers(optimizer, monkeypatch, generator):
    """Fused steps leave the version counter alone, so only contents tell."""
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", "1")
    model = fastdl.freeze(model_of(8, 4))
    x = torch.randn(5, 8, generator=generator)
    step = optimizer(model.parameters(), lr=0.1, fused=True)
    model(x).sum().backward()
    step.step()
    with pytest.raises(RuntimeError, match="layer '0' is frozen"):
        model(x)
    fastdl.freeze(model)
    model(x)


def test_check_frozen_under_compile_reads_the_weight(monkeypatch, generator):
    monkeypatch.setenv("FASTDL_CHECK_FROZEN", "1")
    torch._dynamo.reset()
    model = fastdl.freeze(model_of(8, 4))
    x = torch.randn(64, 8, generator=generator)  # rows enough for the pack to pay at every level
    with torch.no_grad():
        model[0].weight.mul_(2)
        y = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(y, nn.functional.linear(x, model[0].weight, model[0].bias))
