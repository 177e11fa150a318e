"""What every swapped layer must survive alike: checkpoints, one tensor given twice to the compiler, odd records."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdl
from fastdl import functional as F
from fastdl.ops import calls

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning"),
]


def _attend(layer, x):
    return layer(x, x, x, need_weights=False)[0]


# A layer of width 8, and how it is called with x [4, 3, 8].
LAYERS = {
    "linear": (lambda: nn.Linear(8, 8), lambda layer, x: layer(x)),
    "conv1d": (lambda: nn.Conv1d(3, 3, 3), lambda layer, x: layer(x)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 3, 3), lambda layer, x: layer(x)),
    "lstm": (lambda: nn.LSTM(8, 8), lambda layer, x: layer(x)[0]),
    "gru": (lambda: nn.GRU(8, 8, 2, bidirectional=True), lambda layer, x: layer(x)[0]),
    "rnn": (lambda: nn.RNN(8, 8), lambda layer, x: layer(x)[0]),
    "lstm_cell": (lambda: nn.LSTMCell(8, 8), lambda layer, x: layer(x[0])[0]),
    "gru_cell": (lambda: nn.GRUCell(8, 8), lambda layer, x: layer(x[0])),
    "attention": (lambda: nn.MultiheadAttention(8, 2), _attend),
    "encoder_relu": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0), lambda layer, x: layer(x)),
    "encoder_gelu": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu"), lambda layer, x: layer(x)),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0), lambda layer, x: layer(x, x)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(2)
    calls.handbacks.clear()


def pair(name):
    """(fastdl's, stock's, call)."""
    make, call = LAYERS[name]
    stock = make()
    return fastdl.optimize(copy.deepcopy(stock)), stock, call


@every_layer
@pytest.mark.parametrize("mode", ["float32", "float64", "autocast"])
def test_checkpoints_that_read_what_is_saved_once(name, mode):
    """torch's non-reentrant checkpoint computes again what the backward pass unpacks, and refuses a second time."""
    ours, _, call = pair(name)
    dtype = torch.float64 if mode == "float64" else torch.float32
    ours.to(dtype)
    x = torch.randn(4, 3, 8, dtype=dtype, requires_grad=True)

    def gradients(run):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            y = run(lambda x: call(ours, x), x)
        return torch.autograd.grad(y.float().square().sum(), [x, *ours.parameters()])

    expected = gradients(lambda f, x: f(x))
    torch.testing.assert_close(gradients(lambda f, x: checkpoint(f, x, use_reentrant=False)), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_checkpoint_of_an_epilogue(activation):
    x, w, r = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (5, 8), (3, 5)))

    def run(x, w, r):
        return F.linear(x, w, activation=activation, residual=r)

    expected = torch.autograd.grad(run(x, w, r).square().sum(), (x, w, r))
    actual = torch.autograd.grad(checkpoint(run, x, w, r, use_reentrant=False).square().sum(), (x, w, r))
    torch.testing.assert_close(actual, expected)


# --- one tensor in the place of two -------------------------------------------------------------------------------
def _tied(layer):
    layer.weight_hh_l0_reverse, layer.bias_hh_l0 = layer.weight_hh_l0, layer.bias_ih_l0
    return layer


TWICE = {
    "linear weight": lambda x, _: F.linear(x, x),
    "linear residual": lambda x, _: F.linear(x, x, residual=x),
    "matmul": lambda x, _: F.matmul(x, x),
    "conv": lambda x, _: F.conv1d(x[None], x[None]),
    "attention": lambda x, _: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "lstm states": lambda x, layer: layer(x[None], (x.expand(2, 8, 8),) * 2)[0],
    "tied parameters": lambda x, layer: layer(x[None])[0],
}


@pytest.mark.parametrize("case", TWICE)
def test_compiled_with_one_tensor_twice(case):
    torch._dynamo.reset()
    layer = _tied(fastdl.optimize(nn.LSTM(8, 8, bidirectional=True)))
    x = torch.randn(8, 8, requires_grad=True)

    def loss(x):
        return TWICE[case](x, layer).square().sum()

    expected = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)


# --- outputs that are written before the backward pass ------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("cls", [nn.GRU, nn.RNN, nn.LSTM])
def test_results_of_recurrent_layers_may_be_written(cls, options):
    ours = fastdl.optimize(cls(8, 8, **options))
    x = torch.randn(4, 3, 8, requires_grad=True)
    leaves = [x, *ours.parameters()]
    expected = torch.autograd.grad(ours(x)[0].mul(3).relu().square().sum(), leaves)
    y = ours(x)[0]
    y.mul_(3).relu_()
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)
    y, _ = ours(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- records ------------------------------------------------------------------------------------------------------
def test_explain_of_a_nested_input():
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    rows = fastdl.explain(fastdl.optimize(nn.Linear(8, 8)), nested).rows
    assert [row.reason for row in rows] == ["input is nested"]


def test_a_nested_batch_that_torch_computes_is_on_record():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    fastdl.optimize(model, filter_fn=lambda module, fqn: "self_attn" not in fqn)
    padding = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        model(torch.randn(2, 4, 8), src_key_padding_mask=padding)
    name, reason = "transformer_encoder_layer", "src is nested, and the layer cannot pack it"
    assert calls.handbacks[name, reason] == 1


def test_recurrent_layers_keep_the_methods_of_stock_layers():
    x = torch.randn(4, 2, 8)
    for cls in (nn.LSTM, nn.GRU, nn.RNN):
        stock = cls(8, 5, bidirectional=True)
        ours = fastdl.optimize(copy.deepcopy(stock))
        methods = {m for m in dir(cls) if m not in dir(nn.Module)} - {"__constants__", "__jit_unused_properties__"}
        assert not [m for m in methods if not hasattr(ours, m)], cls
        assert ours.get_expected_hidden_size(x, None) == stock.get_expected_hidden_size(x, None)
        with pytest.raises(RuntimeError):
            ours.check_input(x[..., :3], None)


def test_traced_where_only_the_states_are_proxies():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.cell = nn.GRU(8, 8), nn.LSTMCell(8, 8)
            self.register_buffer("x", torch.randn(4, 3, 8))

        def forward(self, h):
            y, _ = self.gru(self.x, h)
            return y, self.cell(self.x[0], (h[0], h[0]))

    model = Steps()
    h = torch.randn(1, 3, 8)
    expected = model(h)
    graph = torch.fx.symbolic_trace(fastdl.optimize(model))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["gru", "cell"]
    torch.testing.assert_close(graph(h), expected)


class _EveryStack(nn.Module):
    """Layers that torch's tracer takes whole, where they are its own."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.cell = nn.LSTM(8, 16), nn.GRU(16, 16), nn.GRUCell(16, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        y, (h, _) = self.lstm(x)
        z, _ = self.gru(y, h)
        z = self.decoder(self.encoder(z), y)
        z, _ = self.attention(z, z, z, need_weights=False)
        return self.cell(z[0], h[0])


def test_torch_fx_takes_layers_whole_as_torchs_own():
    model = _EveryStack().eval()
    x = torch.randn(5, 3, 8)
    expected, stock = model(x), torch.fx.symbolic_trace(model)
    graph = torch.fx.symbolic_trace(fastdl.optimize(model))

    def called(g):
        return [node.target for node in g.graph.nodes if node.op == "call_module"]

    assert called(graph) == called(stock) == ["lstm", "gru", "encoder", "decoder", "attention", "cell"]
    torch.testing.assert_close(graph(x), expected)
