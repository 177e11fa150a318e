"""explain: the rows tell what ran where, and why."""

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastdl
from fastdl import _C
from fastdl.ops import calls

KERNELS = {row["name"] for row in _C.kernels("gemm")}


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def row_of(explanation, fqn):
    (row,) = [row for row in explanation.rows if row.fqn == fqn]
    return row


X = torch.linspace(-1, 1, 40).view(5, 8)


def test_without_inputs_nothing_runs():
    model = fastdl.optimize(mlp())
    model[0].register_forward_hook(lambda *args: pytest.fail("the model was called"))
    rows = fastdl.explain(model).rows
    assert [(r.fqn, r.type, r.status, r.kernel, r.dtype, r.calls) for r in rows] == [
        (fqn, "Linear", "fastdl", "unknown until called", "float32", 0) for fqn in ("0", "2")
    ]


def test_kernels_shapes_and_calls():
    shared = nn.Linear(8, 8)
    model = fastdl.optimize(nn.Sequential(shared, shared, nn.Linear(8, 4, bias=False)))
    rows = fastdl.explain(model, X).rows
    assert [(r.fqn, r.status, r.shapes, r.dtype, r.calls, r.reason) for r in rows] == [
        ("0", "fastdl", "5x8 8x8 8", "float32", 2, ""),
        ("2", "fastdl", "5x8 4x8", "float32", 1, ""),
    ]
    assert {r.kernel for r in rows} <= KERNELS


def test_kernel_is_the_one_that_ran():
    model = fastdl.optimize(nn.Linear(8, 4))
    row = row_of(fastdl.explain(model, X), "(model)")
    _C.reset_counters()
    with torch.no_grad():
        model(X)
    assert [name for name, count in _C.counters().items() if count] == [row.kernel]


def test_each_distinct_call_has_a_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x).sum() + self.layer(x[:2]).sum() + self.layer(x.bfloat16().float()).sum()

    rows = fastdl.explain(fastdl.optimize(Twice()), X).rows
    assert sorted((r.shapes, r.calls) for r in rows) == [("2x8 4x8 4", 1), ("5x8 4x8 4", 2)]


def _kernel_dtype(name):
    return next(row["dtype"] for row in _C.kernels("gemm") if row["name"] == name)


def test_hand_backs_carry_the_reason():
    model = fastdl.optimize(mlp())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = fastdl.explain(model, X).rows
    assert {(r.status, r.dtype, r.reason) for r in rows} == {("fastdl", "bfloat16", "")}
    rows = fastdl.explain(model.bfloat16(), X.bfloat16()).rows
    assert {(r.status, r.dtype, r.reason) for r in rows} == {("fastdl", "bfloat16", "")}
    assert {_kernel_dtype(r.kernel) for r in rows} == {"bfloat16"}
    model[0].weight.data, model[0].bias.data = model[0].weight.data + 0j, model[0].bias.data + 0j
    (row, *_) = fastdl.explain(nn.Sequential(model[0]), X + 0j).rows
    assert (row.status, row.kernel, row.reason) == ("torch", "torch", "dtype complex64")
    model = fastdl.optimize(mlp())
    rows = fastdl.explain(model.double(), X.double()).rows
    assert {(r.status, r.kernel, r.dtype) for r in rows} == {("fastdl", "reference", "float64")}


def test_frozen_layers_say_so():
    model = fastdl.freeze(fastdl.optimize(mlp()))
    rows = fastdl.explain(model, X).rows
    assert {r.status for r in rows} == {"fastdl, frozen"}
    assert {r.kernel for r in rows} <= KERNELS


class Custom(nn.Linear):
    pass


def test_layers_that_were_not_swapped():
    model = nn.Sequential(nn.Linear(8, 8), Custom(8, 8), nn.Linear(8, 8), nn.LazyLinear(4))
    parametrizations.weight_norm(model[2])
    explanation = fastdl.explain(model)
    assert {row.status for row in explanation.rows} == {"not swapped"}
    reasons = [row.reason for row in explanation.rows]
    assert reasons[0].startswith("optimize() was not applied")
    assert reasons[1].startswith("a subclass, ") and reasons[1].endswith("Custom")
    assert reasons[2] == "parametrised"
    assert reasons[3].startswith("lazy")
    called = fastdl.explain(model, X)
    assert [(row.kernel, row.calls) for row in called.rows] == [("torch", 1)] * 4


def test_parametrized_after_the_swap_still_runs_fastdl():
    model = fastdl.optimize(mlp())
    parametrizations.weight_norm(model[0])
    row = row_of(fastdl.explain(model, X), "0")
    assert (row.type, row.status) == ("ParametrizedLinear", "fastdl")
    assert row.kernel in KERNELS


@pytest.mark.parametrize("swap_first", [True, False])
def test_forward_overridden(swap_first):
    model = mlp()
    if swap_first:
        fastdl.optimize(model)
    model[0].forward = types.MethodType(
        lambda module, input: nn.functional.linear(input, module.weight, module.bias), model[0]
    )
    if not swap_first:
        fastdl.optimize(model)
    for explanation in (fastdl.explain(model), fastdl.explain(model, X)):
        row = row_of(explanation, "0")
        assert row.status == "forward overridden"
        assert row.kernel == "torch"
        assert "forward overridden" in str(explanation)
    assert row_of(fastdl.explain(model, X), "2").status == "fastdl"


def test_forward_overridden_but_calling_the_class():
    model = fastdl.optimize(mlp())
    original = model[0].forward
    model[0].forward = lambda input: original(input)
    row = row_of(fastdl.explain(model, X), "0")
    assert row.status == "fastdl"
    assert row.kernel in KERNELS
    assert row.reason.startswith("forward overridden")


def test_layers_whose_weights_are_read_by_their_owner():
    layer = fastdl.optimize(nn.MultiheadAttention(8, 2))
    x = torch.ones(3, 1, 8)
    row = row_of(fastdl.explain(layer, x, x, x), "out_proj")
    assert (row.status, row.kernel, row.reason, row.calls) == ("fastdl", "in (model)", "run by (model)", 0)


def test_functional_calls_of_other_modules():
    class Scores(nn.Module):
        def forward(self, q, *, k):
            return fastdl.functional.matmul(q, k.mT)

    rows = fastdl.explain(nn.Sequential(nn.Identity(), Scores())[1], X, k=X).rows
    assert [(r.fqn, r.type, r.status, r.shapes, r.calls) for r in rows] == [
        ("(model)", "Scores: functional.matmul", "fastdl", "5x8 8x5", 1)
    ]
    assert rows[0].kernel in KERNELS


def test_products_of_vectors():
    class Products(nn.Module):
        def forward(self, x):
            return fastdl.functional.matmul(x, x[0]), fastdl.functional.matmul(x[0], x[0])

    rows = fastdl.explain(Products(), X).rows
    assert {r.shapes for r in rows} == {"5x8 8", "8 8"}
    assert {r.kernel for r in rows} <= KERNELS


def test_compiled_models_are_explained_eagerly():
    torch._dynamo.reset()
    model = fastdl.optimize(mlp())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(X)
    rows = fastdl.explain(compiled, X).rows
    assert [(row.fqn, row.status, row.calls) for row in rows] == [
        ("_orig_mod.0", "fastdl", 1),
        ("_orig_mod.2", "fastdl", 1),
    ]


def test_the_model_runs_as_it_stands():
    model = fastdl.optimize(mlp())
    seen = []
    model.register_forward_hook(lambda module, args, y: seen.append((module.training, y.requires_grad)))
    fastdl.explain(model, X)
    with torch.no_grad():
        fastdl.explain(model.eval(), X)
    assert seen == [(True, True), (False, False)]


def test_a_failing_model_leaves_nothing_behind():
    model = fastdl.optimize(mlp())
    with pytest.raises(RuntimeError, match="argument 'input'"):
        fastdl.explain(model, torch.ones(5, 9))
    assert calls.observer is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_parts_are_passed_over():
    model = fastdl.optimize(nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 4)))
    assert [(row.fqn, row.status) for row in fastdl.explain(model, X).rows] == [("1", "fastdl")]


def test_fake_tensors_have_no_kernel():
    with torch._subclasses.FakeTensorMode():
        model = fastdl.optimize(nn.Linear(8, 4))
        (row,) = fastdl.explain(model, torch.empty(5, 8)).rows
    assert (row.status, row.kernel) == ("fastdl", "no kernel: traced")


def test_table_shows_every_row():
    explanation = fastdl.explain(fastdl.optimize(mlp()), X)
    table = str(explanation)
    assert repr(explanation) == table
    for row in explanation.rows:
        (line,) = [line for line in table.splitlines() if line.startswith(f"│ {row.fqn} ")]
        for value in (row.status, row.kernel, row.shapes):
            assert value in line
    for heading in ("fqn", "type", "status", "kernel", "shapes", "dtype", "reason", "calls"):
        assert heading in table


def test_table_of_markup_like_names():
    assert "[red]" in str(fastdl.explain(nn.ModuleDict({"[red]": fastdl.nn.Linear(2, 2)})))
