"""MultiheadAttention and the transformer layers: every option against torch's own, and that fastdl's kernels run."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdl
from fastdl import _C
from fastdl.ops import calls

E, HEADS, N, L, S = 16, 4, 3, 5, 6
# torch warns of its own nested tensors, and of the layouts it would rather have.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(11)


@pytest.fixture
def kernel_calls():
    """kernel_calls() -> (attention kernels, other kernels) run since the last time it was asked."""

    def count():
        counts = _C.counters()
        attention = sum(n for name, n in counts.items() if name.startswith("attention"))
        _C.reset_counters()
        return attention, sum(counts.values()) - attention

    count()
    return count


def swapped(module):
    """A fastdl copy."""
    return fastdl.optimize(copy.deepcopy(module))


def randn(*shape):
    return torch.randn(shape)


def inputs(kind, batch_first, batched=True, kdim=E, vdim=E):
    """(query, key, value), sharing objects as the kind says; leaves."""

    def make(length, size):
        shape = ((N, length, size) if batch_first else (length, N, size)) if batched else (length, size)
        return torch.randn(shape, requires_grad=True)

    if kind == "self":
        x = make(L, E)
        return x, x, x
    query = make(L, E)
    if kind == "memory":
        x = make(S, E)
        return query, x, x
    return query, make(S, kdim), make(S, vdim)


def assert_alike(ours, theirs, leaves, *args, **kwargs):
    """Results, and the gradients of all leaves and parameters, agree to float32 rounding."""
    results = []
    for module in (ours, theirs):
        out = module(*args, **kwargs)
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
        parameters = [p for p in module.parameters() if p.requires_grad]
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors)
        grads = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
        results.append((tensors, [g for g in grads if g is not None]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


# --- MultiheadAttention ----------------------------------------------------------------------------------------------
MODULES = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_multihead_options(options, kind):
    for batch_first, batched, need_weights in itertools.product((False, True), repeat=3):
        theirs = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **options)
        ours = swapped(theirs)
        args = inputs(kind, batch_first, batched)
        leaves = list({id(x): x for x in args}.values())
        for average in (True, False) if need_weights else (True,):
            flags = {"need_weights": need_weights, "average_attn_weights": average}
            assert_alike(ours, theirs, leaves, *args, **flags)
    assert not calls.handbacks


def test_multihead_kdim_vdim():
    for options, batched in itertools.product(MODULES.values(), (True, False)):
        theirs = nn.MultiheadAttention(E, HEADS, kdim=7, vdim=9, **options)
        args = inputs("cross", False, batched, 7, 9)
        for need_weights in (True, False):
            assert_alike(swapped(theirs), theirs, args, *args, need_weights=need_weights)
    assert not calls.handbacks


def masks_of(kind, shape):
    """Leaves the last key of every row in sight."""
    hidden = torch.rand(shape) < 0.4
    hidden[..., -1] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape).masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_multihead_masks(options, kind):
    for shape, padded, need_weights in itertools.product(
        ((L, S), (N * HEADS, L, S), None), (True, False), (True, False)
    ):
        theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)
        args = inputs("memory", True)
        given = {
            "attn_mask": None if shape is None else masks_of(kind, shape),
            "key_padding_mask": masks_of(kind, (N, S)) if padded else None,
        }
        assert_alike(swapped(theirs), theirs, args[:2], *args, need_weights=need_weights, **given)
    assert not calls.handbacks


def test_multihead_masks_unbatched():
    theirs = nn.MultiheadAttention(E, HEADS)
    args = inputs("memory", False, batched=False)
    for shape in ((L, S), (HEADS, L, S)):
        given = {"attn_mask": masks_of("bool", shape), "key_padding_mask": masks_of("bool", (S,))}
        assert_alike(swapped(theirs), theirs, args[:2], *args, need_weights=False, **given)
        assert_alike(swapped(theirs), theirs, args[:2], *args, **given)


def test_multihead_mixed_masks_warn_as_torch_does():
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True)
    args = inputs("memory", True)
    given = {"attn_mask": masks_of("float", (L, S)), "key_padding_mask": masks_of("bool", (N, S))}
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        assert_alike(swapped(theirs), theirs, args[:2], *args, **given)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_multihead_causal(options):
    for padded, need_weights in itertools.product((True, False), repeat=2):
        theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)
        args = inputs("self", True)
        given = {
            "attn_mask": nn.Transformer.generate_square_subsequent_mask(L),
            "key_padding_mask": torch.arange(L) >= torch.tensor([[L], [L - 1], [2]]) if padded else None,
        }
        if padded:
            given["key_padding_mask"] = torch.zeros(N, L).masked_fill(given["key_padding_mask"], -torch.inf)
        assert_alike(swapped(theirs), theirs, args[:1], *args, need_weights=need_weights, is_causal=True, **given)


def test_multihead_rows_that_see_nothing_are_zero():
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, bias=False)
    args = inputs("self", True)
    hidden = torch.zeros(N, L, dtype=torch.bool)
    hidden[1] = True
    for need_weights in (True, False):
        out, weights = swapped(theirs)(*args, key_padding_mask=hidden, need_weights=need_weights)
        assert (out[1] == 0).all() and (out[0] != 0).any()
        assert weights is None or (weights[1] == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), args[:1])
        assert grad.isfinite().all() and (grad[1] == 0).all()


def test_multihead_dropout():
    module = fastdl.nn.MultiheadAttention(E, HEADS, dropout=0.5, batch_first=True)
    args = inputs("self", True)
    for need_weights in (True, False):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(module(*args, need_weights=need_weights)[0])
        torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
        assert not torch.allclose(runs[0], runs[2])
        module.eval()
        torch.testing.assert_close(module(*args, need_weights=need_weights)[0], module(*args)[0], rtol=1e-4, atol=1e-5)
        module.train()


def test_multihead_runs_kernels_in_eval(kernel_calls):
    """torch's eval fast path would run its own kernels."""
    module = swapped(nn.MultiheadAttention(E, HEADS, batch_first=True)).eval()
    x = randn(N, L, E)
    with torch.no_grad():
        module(x, x, x, need_weights=False)
        assert kernel_calls() == (1, 2)
        module(x, x, x)
        assert kernel_calls() == (0, 4)
    assert not calls.handbacks


def test_multihead_output_is_contiguous():
    """The output of attention turns back into [N, L, E] and [L, N, E] by a view, not a copy."""
    for batch_first in (True, False):
        module = fastdl.nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
        seen = []
        module._project_out = lambda x, seen=seen: seen.append(x._is_view()) or x
        x = randn(N, L, E)
        with torch.no_grad():
            module(x, x, x, need_weights=False)
        assert seen == [True]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"query": torch.ones(E)}, AssertionError),
        ({"key": torch.ones(N, S, E - 1)}, AssertionError),
        ({"value": torch.ones(N, S - 1, E)}, AssertionError),
        ({"attn_mask": torch.ones(L, S + 1)}, RuntimeError),
        ({"attn_mask": torch.ones(L, S, dtype=torch.int64)}, AssertionError),
        ({"key_padding_mask": torch.ones(N, S + 1)}, AssertionError),
        ({"is_causal": True}, RuntimeError),
    ],
    ids=str,
)
def test_multihead_errors_are_torchs(change, error):
    module = fastdl.nn.MultiheadAttention(E, HEADS, batch_first=True)
    given = {"query": randn(N, L, E), "key": randn(N, S, E), "value": randn(N, S, E)} | change
    with pytest.raises(error) as theirs:
        nn.MultiheadAttention.forward(module, **given, need_weights=False)
    with pytest.raises(type(theirs.value)):
        module(**given, need_weights=False)
    with pytest.raises(TypeError, match=r"argument 'query': expected a torch\.Tensor, got list"):
        module([1.0], given["key"], given["value"])


# --- transformer layers ----------------------------------------------------------------------------------------------
LAYERS = {
    "post_norm": {},
    "norm_first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": nn.GELU(approximate="tanh")},
    "silu": {"activation": F.silu},
    "other": {"activation": F.softplus},
    "no_bias": {"bias": False},
    "time_first": {"batch_first": False},
}


def layer_of(kind, **options):
    options = {"batch_first": True, "dropout": 0.0, "dim_feedforward": 24} | options
    return (nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer)(E, HEADS, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layers(kind, options, training, kernel_calls):
    theirs, ours = layer_of(kind, **options).train(training), layer_of(kind, **options).train(training)
    ours.load_state_dict(theirs.state_dict())  # torch's copies of a decoder layer lose an activation that is a module
    fastdl.optimize(ours)
    assert type(ours) in (fastdl.nn.TransformerEncoderLayer, fastdl.nn.TransformerDecoderLayer)
    batch_first = options.get("batch_first", True)
    x, memory, _ = inputs("memory", batch_first)
    args = (x,) if kind == "encoder" else (x, memory)
    assert_alike(ours, theirs, args, *args)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    given = {"src_mask": causal} if kind == "encoder" else {"tgt_mask": causal, "memory_mask": randn(L, S)}
    assert_alike(ours, theirs, args, *args, **given)
    if kind == "encoder":
        assert_alike(ours, theirs, args, *args, src_mask=causal, is_causal=True)
    else:
        assert_alike(ours, theirs, args, *args, tgt_mask=causal, tgt_is_causal=True)
    assert not calls.handbacks
    kernel_calls()
    with torch.no_grad():
        ours(*args)
    attention, products = kernel_calls()
    assert attention == (1 if kind == "encoder" else 2)
    assert products == (4 if kind == "encoder" else 7)


def test_activation_and_residual_are_fused(monkeypatch):
    fused = []
    native = _C.linear_fused
    monkeypatch.setattr(_C, "linear_fused", lambda *args: fused.append((args[4], args[5] is not None)) or native(*args))
    layer = swapped(layer_of("encoder", dropout=0.1))
    x = randn(N, L, E)
    with torch.no_grad():
        layer(x)
        assert fused == [("relu", False)]
        layer.eval()(x)
        assert fused[1:] == [("relu", False), ("none", True)]
        fused.clear()
        layer.linear1.register_forward_hook(lambda *args: None)
        fastdl.freeze(layer)(x)
        assert fused == [("none", True)], "a hook must see what linear1 alone returns; packs are read by both"


def test_dropout_of_layers_is_drawn_in_training_only():
    layer = swapped(layer_of("encoder", dropout=0.5))
    x = randn(N, L, E)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("padding", ["none", "left_aligned", "scattered"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "norm_first"])
def test_encoder_fast_path_does_not_bypass_fastdl(norm_first, padding, kernel_calls):
    """In eval, torch.nn.TransformerEncoder makes padded batches nested tensors, and its layers skip their modules."""
    theirs = nn.TransformerEncoder(layer_of("encoder", norm_first=norm_first), 2).eval()
    ours = swapped(theirs)
    x = randn(N, L, E)
    hidden = {
        "none": None,
        "left_aligned": torch.arange(L) >= torch.tensor([[L], [2], [3]]),
        "scattered": torch.arange(L) == torch.tensor([[0], [2], [3]]),
    }[padding]
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=hidden)
        kernel_calls()
        out = ours(x, src_key_padding_mask=hidden)
    assert kernel_calls() == (2, 8)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not calls.handbacks


def test_nested_input_of_one_layer(kernel_calls):
    theirs = layer_of("encoder").eval()
    ours = swapped(theirs)
    x = torch.nested.nested_tensor([randn(n, E) for n in (4, 1, 6)])
    with torch.no_grad():
        out, expected = ours(x), theirs(x)
    assert out.is_nested and kernel_calls()[0] == 1
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_transformer(batch_first):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.Transformer(E, HEADS, 2, 2, 24, dropout=0.0, batch_first=batch_first)
    ours = swapped(theirs)
    src, tgt = randn(N, S, E), randn(N, L, E)
    src, tgt = (src, tgt) if batch_first else (src.transpose(0, 1), tgt.transpose(0, 1))
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    assert_alike(ours, theirs, [], src, tgt, tgt_mask=causal)
    assert_alike(ours.eval(), theirs.eval(), [], src, tgt, tgt_mask=causal, tgt_is_causal=True)
    assert not calls.handbacks


# --- swapping --------------------------------------------------------------------------------------------------------
def model_of_all():
    return nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(E, HEADS, batch_first=True),
            "encoder": layer_of("encoder"),
            "decoder": layer_of("decoder"),
        }
    )


def test_swap_and_restore_keep_everything():
    model = model_of_all()
    classes = [type(m) for m in model.modules()]
    parameters, state = list(model.parameters()), model.state_dict()
    fastdl.optimize(model)
    assert type(model["attention"]) is fastdl.nn.MultiheadAttention
    assert type(model["encoder"]) is fastdl.nn.TransformerEncoderLayer
    assert type(model["decoder"]) is fastdl.nn.TransformerDecoderLayer
    assert type(model["encoder"].self_attn) is fastdl.nn.MultiheadAttention
    assert isinstance(model["attention"], nn.MultiheadAttention)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert model_of_all().load_state_dict(model.state_dict(), strict=True).missing_keys == []
    fastdl.restore(fastdl.freeze(model))
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_pickles(duplicate):
    model = swapped(model_of_all())
    twin = duplicate(model)
    stock = duplicate is not copy.deepcopy
    assert isinstance(twin["encoder"], fastdl.nn.TransformerEncoderLayer) != stock
    x = randn(N, L, E)
    torch.testing.assert_close(twin["encoder"](x), model["encoder"](x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin["attention"](x, x, x), model["attention"](x, x, x), rtol=1e-4, atol=1e-5)


def test_freeze_packs_the_projections(monkeypatch):
    packed = []

    def watch(name, position):
        native = getattr(_C, name)

        def watched(*args):
            if args[position] is not None:
                packed.append(name)
            return native(*args)

        monkeypatch.setattr(_C, name, watched)

    watch("plain_linear", 3)
    watch("linear_fused", 7)
    model = swapped(nn.TransformerEncoder(layer_of("encoder"), 1)).eval()
    x = randn(N, L, E)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fastdl.freeze(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert len(packed) == 4  # in and out projection, and the feed-forward half
    model.layers[0].self_attn.to(torch.float32)
    assert model.layers[0].self_attn._pack is None
    separate = fastdl.optimize(nn.MultiheadAttention(E, HEADS, kdim=7))
    with pytest.warns(UserWarning, match="query, key and value have weights of their own"):
        fastdl.freeze(separate)


def test_explain():
    model = swapped(nn.TransformerEncoder(layer_of("encoder"), 1)).eval()
    rows = fastdl.explain(model, randn(N, L, E)).rows
    assert {row.status for row in rows} == {"fastdl"}
    by_name = {}
    for row in rows:
        by_name.setdefault(row.fqn, []).append(row)
    assert {row.type for row in by_name["layers.0.self_attn"]} == {
        "MultiheadAttention: linear",
        "MultiheadAttention: scaled_dot_product_attention",
    }
    assert by_name["layers.0.linear1"][0].kernel.startswith("gemm_")


def test_explain_names_what_torch_runs():
    module = swapped(nn.MultiheadAttention(E, HEADS).to("meta"))
    x = torch.empty(L, N, E, device="meta")
    row, *_ = fastdl.explain(module, x, x, x).rows
    assert (row.status, row.kernel, row.reason) == ("torch", "torch", "query is on meta")


# --- compile, scripts, export ----------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["attention", "weights", "encoder", "decoder"])
def test_compile_fullgraph(kind, kernel_calls):
    torch._dynamo.reset()
    x, memory = torch.randn(N, L, E, requires_grad=True), torch.randn(N, S, E, requires_grad=True)
    if kind in ("attention", "weights"):
        module = swapped(nn.MultiheadAttention(E, HEADS, batch_first=True))

        def run(x, memory):
            return module(x, memory, memory, need_weights=kind == "weights")[0]
    else:
        module = swapped(layer_of(kind))

        def run(x, memory):
            return module(x) if kind == "encoder" else module(x, memory)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x, *module.parameters()]
    expected, out = run(x, memory), compiled(x, memory)
    torch.testing.assert_close(out, expected)
    kernel_calls()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert sum(kernel_calls()) > 0
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), leaves), rtol=1e-4, atol=1e-4)
    assert not calls.handbacks


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["attention", "encoder", "decoder"])
def test_trace_and_script(kind):
    x = randn(N, L, E)
    if kind == "attention":
        module, args = nn.MultiheadAttention(E, HEADS, batch_first=True).eval(), (x, x, x)
    else:
        module, args = layer_of(kind).eval(), (x,) if kind == "encoder" else (x, x)
    expected = module(*args)
    fastdl.optimize(module)
    for scripted in (torch.jit.script(module), torch.jit.trace(module, args, check_trace=False)):
        torch.testing.assert_close(scripted(*args), expected, rtol=1e-4, atol=1e-5)
        assert "fastdl::" not in str(scripted.inlined_graph)


def test_export_emits_aten():
    torch._dynamo.reset()
    model = swapped(nn.TransformerEncoder(layer_of("encoder"), 1)).eval()
    x = randn(N, L, E)
    program = torch.export.export(model, (x,), strict=False)
    assert not any("fastdl" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    theirs = nn.TransformerEncoder(layer_of("encoder"), 1)
    ours = swapped(theirs).to(dtype)
    x = randn(N, L, E)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(ours(x.to(dtype)).double(), theirs.double()(x.double()), **tolerance)
    assert not calls.handbacks


def test_autocast():
    theirs = layer_of("decoder")
    ours = swapped(theirs)
    args = randn(N, L, E), randn(N, S, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = ours(*args), theirs(*args)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert not calls.handbacks
