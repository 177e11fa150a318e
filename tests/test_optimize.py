"""optimize and restore: what swapping by class must leave alone, and what it must survive."""

import copy
import io
import pickle
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, parametrize

import fastdl
from fastdl import _C
from fastdl.ops import calls


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(7)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def x(generator):
    return torch.randn(5, 8, generator=generator)


@pytest.fixture
def kernel_calls():
    """kernel_calls() -> native GEMM calls since the last time it was asked."""

    def count():
        total = sum(_C.counters().values())
        _C.reset_counters()
        return total

    count()
    return count


def classes(model):
    return [type(module) for module in model.modules()]


# --- the swap -----------------------------------------------------------------------------------------------------
def test_swaps_in_place_and_keeps_every_object(x, kernel_calls):
    model = mlp()
    expected, parameters, state = model(x), list(model.parameters()), model.state_dict()
    assert fastdl.optimize(model) is model
    assert classes(model) == [nn.Sequential, fastdl.nn.Linear, nn.ReLU, fastdl.nn.Linear]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert isinstance(model[0], nn.Linear)
    torch.testing.assert_close(model(x), expected)
    assert kernel_calls() == 2


def test_root_module_itself():
    layer = nn.Linear(3, 2)
    assert fastdl.optimize(layer) is layer
    assert type(layer) is fastdl.nn.Linear


def test_idempotent(recwarn):
    model = fastdl.optimize(mlp())
    before = classes(model)
    assert classes(fastdl.optimize(model)) == before
    assert classes(fastdl.optimize(model, strict=True)) == before
    assert not recwarn.list


def test_restore_undoes_it():
    model = mlp()
    before = classes(model)
    vars_before = [set(vars(module)) for module in model.modules()]
    assert fastdl.restore(fastdl.freeze(fastdl.optimize(model))) is model
    assert classes(model) == before
    assert [set(vars(module)) for module in model.modules()] == vars_before
    assert classes(fastdl.restore(model)) == before


def test_shared_module_is_one_module():
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    asked = []
    fastdl.optimize(model, filter_fn=lambda module, fqn: asked.append(fqn) or True)
    assert asked == ["0"]
    assert model[0] is model[1][0] is shared
    assert type(shared) is fastdl.nn.Linear
    fastdl.restore(model)
    assert type(shared) is nn.Linear


def test_filter_gets_module_and_name():
    model = nn.ModuleDict({"a": mlp(), "b": nn.Linear(2, 2)})
    asked = {}

    def only_a(module, fqn):
        asked[fqn] = type(module)
        return fqn.startswith("a.")

    fastdl.optimize(model, filter_fn=only_a)
    assert asked == {"a.0": nn.Linear, "a.2": nn.Linear, "b": nn.Linear}
    assert type(model["a"][0]) is type(model["a"][2]) is fastdl.nn.Linear
    assert type(model["b"]) is nn.Linear
    fastdl.optimize(model, filter_fn=lambda module, fqn: False, strict=True)  # what the filter keeps is not an error
    assert type(model["b"]) is nn.Linear


def test_filter_names_the_root():
    asked = []
    with pytest.warns(UserWarning, match="nothing was swapped"):
        fastdl.optimize(nn.Linear(2, 2), filter_fn=lambda module, fqn: bool(asked.append(fqn)))
    assert asked == ["(model)"]


class Custom(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def test_subclasses_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), Custom(4, 4), nn.LazyLinear(3))
    fastdl.optimize(model)
    assert [type(m) for m in model] == [fastdl.nn.Linear, Custom, nn.LazyLinear]
    with pytest.raises(RuntimeError) as error:
        fastdl.optimize(model, strict=True)
    assert "1 (Custom): a subclass" in str(error.value)
    assert "test_optimize.Custom" in str(error.value)
    assert "2 (LazyLinear): lazy" in str(error.value)
    model(torch.ones(2, 4))
    assert type(fastdl.optimize(model)[2]) is fastdl.nn.Linear


def test_strict_raises_before_touching_anything():
    model = nn.Sequential(nn.Linear(4, 4), Custom(4, 4))
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"strict=True(.|\n)*1 \(Custom\)"):
        fastdl.optimize(model, strict=True)
    assert classes(model) == before


def test_warns_when_nothing_was_swapped():
    with pytest.warns(UserWarning, match=r"nothing was swapped in ReLU$"):
        fastdl.optimize(nn.ReLU())
    with pytest.warns(UserWarning, match=r"nothing was swapped in Sequential; left alone: 0 \(Custom\): a subclass"):
        fastdl.optimize(nn.Sequential(Custom(2, 2)))


@pytest.mark.parametrize("verb", ["optimize", "restore", "freeze", "unfreeze", "explain"])
def test_not_a_module_is_a_type_error(verb):
    with pytest.raises(TypeError, match=rf"fastdl.{verb}: argument 'model': expected a torch.nn.Module, got dict"):
        getattr(fastdl, verb)({})


def test_attention_out_proj(generator):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    query = torch.randn(2, 5, 8, generator=generator)
    expected, _ = attention(query, query, query)
    fastdl.optimize(attention)
    assert type(attention.out_proj) is fastdl.nn.NonDynamicallyQuantizableLinear
    assert isinstance(attention.out_proj, NonDynamicallyQuantizableLinear)
    torch.testing.assert_close(attention(query, query, query)[0], expected)
    torch.testing.assert_close(attention.out_proj(query), nn.functional.linear(query, *attention.out_proj.parameters()))
    assert type(fastdl.restore(attention).out_proj) is NonDynamicallyQuantizableLinear


def test_construct_directly(x):
    layer = fastdl.nn.Linear(8, 3, bias=False, dtype=torch.float32)
    assert layer.bias is None
    assert "fastdl.Linear(in_features=8, out_features=3, bias=False)" in repr(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight))


# --- training -----------------------------------------------------------------------------------------------------
def train(model, steps, generator, optimizer=torch.optim.Adam):
    data, target = torch.randn(32, 8, generator=generator), torch.randn(32, 4, generator=generator)
    optimizer = optimizer(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_trains_like_stock():
    stock = mlp()
    ours = fastdl.optimize(copy.deepcopy(stock))
    expected = train(stock, 20, torch.Generator().manual_seed(1))
    losses = train(ours, 20, torch.Generator().manual_seed(1))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


def test_optimizer_made_before_steps_the_same_objects(x):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    fastdl.optimize(model)
    before = model[0].weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight] is state
    assert state["step"] == 2
    assert not torch.equal(model[0].weight, before)


def test_state_dict_both_ways(x):
    stock, ours = mlp(), fastdl.optimize(mlp())
    assert ours.load_state_dict(stock.state_dict(), strict=True).missing_keys == []
    torch.testing.assert_close(ours(x), stock(x))
    fresh = mlp()
    fresh.load_state_dict(fastdl.optimize(mlp()).state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    torch.testing.assert_close(fresh(x), stock(x))


def test_hooks_survive_and_run(x):
    model = mlp()
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[0].register_forward_hook(lambda module, args, output: seen.append("forward"))
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    model[0].weight.register_hook(lambda grad: seen.append("tensor"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append("state"))
    fastdl.optimize(model)
    model(x.requires_grad_()).sum().backward()
    model.state_dict()
    assert seen == ["pre", "forward", "tensor", "accumulated", "backward", "state"]


def test_modes_flags_and_attributes_survive():
    model = mlp().eval()
    model[0].note = "kept"
    model[0].weight.requires_grad_(False)
    fastdl.optimize(model)
    assert not model[0].training
    assert model[0].note == "kept"
    assert not model[0].weight.requires_grad


# --- parametrisations, old-style weight norm, pruning ---------------------------------------------------------------
def test_parametrized_after_the_swap(x, kernel_calls):
    model = fastdl.optimize(mlp())
    parametrizations.weight_norm(model[0])
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model[0](x), expected)
    model(x).sum().backward()
    assert kernel_calls() > 0
    assert model[0].parametrizations.weight.original0.grad is not None
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(ParametrizedLinear\): parametrised$"):
        fastdl.restore(model)
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model[0](x), expected)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is fastdl.nn.Linear
    assert type(fastdl.restore(model)[0]) is nn.Linear


def test_parametrized_before_the_swap():
    model = mlp()
    parametrizations.orthogonal(model[0])
    with pytest.raises(RuntimeError, match=r"0 \(ParametrizedLinear\): parametrised"):
        fastdl.optimize(model, strict=True)
    fastdl.optimize(model)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    assert not isinstance(model[0], fastdl.nn.Linear)
    assert type(model[2]) is fastdl.nn.Linear


def test_parametrized_copies_and_state(x):
    model = fastdl.optimize(mlp())
    parametrizations.weight_norm(model[0])
    twin = copy.deepcopy(model)
    assert isinstance(twin[0], fastdl.nn.Linear)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), model(x))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)


def test_pruning_recomputes_the_weight_as_a_plain_attribute(x):
    from torch.nn.utils import prune

    model = fastdl.optimize(mlp())
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert "weight" not in dict(model[0].named_parameters())
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
    model(x).sum().backward()
    assert model[0].weight_orig.grad is not None


# --- copies, pickles, scripts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
def test_copies_keep_the_class(duplicate, x):
    layer = fastdl.optimize(mlp())[0]
    twin = duplicate(layer)
    assert type(twin) is fastdl.nn.Linear
    assert (twin.weight is layer.weight) == (duplicate is copy.copy)
    torch.testing.assert_close(twin(x), layer(x))


def test_deepcopy_keeps_sharing():
    model = fastdl.optimize(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not model[0].weight


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_reduces_to_the_stock_class(protocol, x):
    model = fastdl.freeze(fastdl.optimize(mlp()))
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert classes(loaded) == classes(mlp())
    assert "_pack" not in vars(loaded[0])
    torch.testing.assert_close(loaded(x), model(x))
    assert type(model[0]) is fastdl.nn.Linear  # the original is as it was


def test_whole_model_loads_where_fastdl_is_not(tmp_path, run_python, x):
    model = fastdl.optimize(nn.Sequential(mlp(), nn.MultiheadAttention(4, 2)))
    fastdl.freeze(model)
    torch.save({"model": model, "x": x, "y": model[0](x)}, tmp_path / "model.pt")
    code = f"""
import sys
sys.modules["fastdl"] = None  # importing it raises ImportError
import torch
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(saved["model"][0](saved["x"]), saved["y"])
print([type(m).__module__ + "." + type(m).__name__ for m in saved["model"].modules()])
"""
    out = run_python("-c", code)
    assert "torch.nn.modules.linear.Linear" in out
    assert "torch.nn.modules.linear.NonDynamicallyQuantizableLinear" in out
    assert "fastdl" not in out


class UsersOwn(fastdl.nn.Linear):
    """A user's subclass of a fastdl layer keeps its own class when pickled."""


def test_subclass_of_a_fastdl_layer_pickles_as_itself():
    loaded = pickle.loads(pickle.dumps(UsersOwn(3, 2)))
    assert type(loaded) is UsersOwn


LOAD_SCRIPT = """
import sys, warnings
sys.modules["fastdl"] = None
warnings.simplefilter("ignore")  # torch.jit is deprecated
import torch
print(torch.jit.load("{path}")(torch.ones(1, 8)).shape)
"""


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_trace_and_script_hold_torchs_linear(frozen, x, tmp_path, run_python):
    model = fastdl.optimize(mlp()).eval()
    if frozen:
        fastdl.freeze(model)
    expected = model(x)
    for name, module in (("traced", torch.jit.trace(model, (x,))), ("scripted", torch.jit.script(model))):
        torch.testing.assert_close(module(x), expected)
        graph = torch.jit.freeze(module).graph if name == "scripted" else module.inlined_graph
        assert sum("linear" in node.kind() for node in graph.nodes()) == 2
        assert not any("fastdl" in node.kind() for node in graph.nodes())
        module.save(tmp_path / f"{name}.pt")
        out = run_python("-c", LOAD_SCRIPT.format(path=tmp_path / f"{name}.pt"))
        assert "[1, 4]" in out


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_emits_aten(frozen, strict, x):
    torch._dynamo.reset()
    model = fastdl.optimize(mlp()).eval()
    if frozen:
        fastdl.freeze(model)
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default", "aten.relu.default", "aten.linear.default"]
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_compile_fullgraph(frozen, x, kernel_calls):
    torch._dynamo.reset()
    model = fastdl.optimize(mlp())
    if frozen:
        fastdl.freeze(model)
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    kernel_calls()
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    assert kernel_calls() > 0
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_swapping_a_compiled_model_recompiles(x, kernel_calls):
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x)
        fastdl.optimize(compiled)
        assert kernel_calls() == 0
        torch.testing.assert_close(compiled(x), expected)
        assert kernel_calls() == 2


# --- calls that must be left to torch ------------------------------------------------------------------------------
class QuantizedWeight(torch.Tensor):
    """Stands for a quantized weight: keeps int8 codes, and computes F.linear from what they stand for."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_subclass(cls, (weight * 16).round() / 16)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            cls.linear_calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_quantized_weight_is_left_to_torch(x, kernel_calls):
    QuantizedWeight.linear_calls = 0
    model = fastdl.optimize(mlp())
    model[0].weight = nn.Parameter(QuantizedWeight(model[0].weight.detach()), requires_grad=False)
    with torch.no_grad():
        model[0](x)
    assert QuantizedWeight.linear_calls == 1
    assert kernel_calls() == 0
    assert dict(calls.handbacks) == {("linear", "weight is a QuantizedWeight"): 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_converted_models_run_kernels_of_their_dtype(dtype, x):
    model = fastdl.optimize(mlp()).to(dtype)
    _C.reset_counters()
    assert model(x.to(dtype)).dtype == dtype
    used = {name for name, count in _C.counters().items() if count}
    dtypes = {row["dtype"] for row in _C.kernels("gemm") if row["name"] in used}
    assert dtypes == {str(dtype).removeprefix("torch.")}
    assert not calls.handbacks


def test_weights_of_another_dtype_are_left_to_torch(x):
    model = fastdl.optimize(mlp())
    for parameter in model.parameters():
        parameter.data = parameter.data + 0j
    assert model[0](x + 0j).dtype == torch.complex64
    assert set(calls.handbacks) == {("linear", "dtype complex64")}


def test_forward_overridden_on_the_instance_is_left_alone(x):
    """As Accelerate's hooks do: the instance's forward wraps the class's, bound before or after the swap."""
    model = mlp()
    original = model[0].forward
    model[0].forward = types.MethodType(lambda module, input: original(input) + 1, model[0])
    with pytest.raises(RuntimeError, match=r"0 \(Linear\): forward overridden"):
        fastdl.optimize(model, strict=True)
    fastdl.optimize(model)
    assert [type(model[0]), type(model[2])] == [nn.Linear, fastdl.nn.Linear]
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias) + 1)


def test_functional_call_and_vmapped_ensembles(x):
    models = [fastdl.optimize(mlp()) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)

    def run(params, buffers):
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    torch.testing.assert_close(torch.func.vmap(run)(params, buffers), torch.stack([m(x) for m in models]))


# --- torch.distributed, one process ---------------------------------------------------------------------------------
distributed_warnings = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")


@pytest.fixture
def mesh():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@distributed_warnings
def test_ddp_sees_plain_modules(mesh, x, kernel_calls):
    model = fastdl.optimize(mlp())
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    wrapped = nn.parallel.DistributedDataParallel(model)
    kernel_calls()
    wrapped(x).square().sum().backward()
    assert kernel_calls() > 0
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    model.zero_grad(set_to_none=False)
    after = nn.parallel.DistributedDataParallel(mlp())
    fastdl.optimize(after)
    assert type(after.module[0]) is fastdl.nn.Linear
    after(x).sum().backward()
    assert kernel_calls() > 0


@distributed_warnings
def test_fully_shard_after_the_swap(mesh, x, kernel_calls):
    from torch.distributed.fsdp import fully_shard

    model = fastdl.optimize(mlp())
    expected = model(x).detach()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    kernel_calls()
    y = model(x)
    assert kernel_calls() == 2
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(FSDPLinear\): wrapped by fully_shard$"):
        fastdl.restore(model)
    torch.testing.assert_close(model(x), expected)


@distributed_warnings
def test_fully_shard_before_the_swap(mesh, x, kernel_calls):
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    expected = model(x).detach()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"0 \(FSDPLinear\): wrapped by fully_shard"):
        fastdl.optimize(model, strict=True)
    fastdl.optimize(model)
    assert type(model[2]) is fastdl.nn.Linear  # sharded at rest, plain while it is called
    torch.testing.assert_close(model(x), expected)
    assert kernel_calls() == 1


@distributed_warnings
def test_dtensor_weights_are_left_to_torch(mesh, x, kernel_calls):
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    model = fastdl.optimize(mlp())
    expected = model(x).detach()
    kernel_calls()
    distribute_module(model, mesh)
    y = model(distribute_tensor(x, mesh, [Replicate()]))
    assert isinstance(y, DTensor)
    torch.testing.assert_close(y.full_tensor(), expected)
    y.sum().backward()
    assert isinstance(model[0].weight.grad, DTensor)
    assert kernel_calls() == 0
    assert set(calls.handbacks) == {("linear", "input is a DTensor")}


@distributed_warnings
def test_tensor_parallel(mesh, x):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = fastdl.optimize(mlp())
    expected = model(x).detach()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    torch.testing.assert_close(model(x).detach(), expected)
    assert set(calls.handbacks) == {("linear", "input is a DTensor")}
