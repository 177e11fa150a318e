"""fastdl's recurrent layers as modules: swapped and back, copied, pickled, scripted, hooked, explained, frozen."""

import copy
import io
import pickle
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastdl
from fastdl import _C
from rnn_layers import CELL_X, CELLS, HIDDEN, INPUT, LAYERS, X, cell_of, every_cell, every_layer, layer_of, swapped

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


class Tagger(nn.Module):
    """An embedding, a recurrent layer of each kind, a cell and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, INPUT)
        self.lstm = nn.LSTM(INPUT, 8, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(16, 8)
        self.rnn = nn.RNN(8, 8, nonlinearity="relu")
        self.cell = nn.LSTMCell(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        x, _ = self.rnn(x)
        state = None
        for step in x:
            state = self.cell(step, state)
        return self.head(state[0])


IDS = torch.arange(12).view(4, 3) % 11


def test_optimize_and_restore():
    model = Tagger()
    expected, parameters = model(IDS), list(model.parameters())
    before = [(type(m), set(vars(m))) for m in model.modules()]
    fastdl.optimize(model, strict=True)
    found = [type(m).__name__ for m in model.modules() if isinstance(m, fastdl.nn.swapped.Swapped)]
    assert found == ["LSTM", "GRU", "RNN", "LSTMCell", "Linear"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(IDS), expected)
    fastdl.restore(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)


@every_layer
def test_construct_directly(kind):
    cls, options = LAYERS[kind]
    torch.manual_seed(9)
    stock = cls(INPUT, HIDDEN, 2, bidirectional=True, **options)
    torch.manual_seed(9)
    ours = getattr(fastdl.nn, cls.__name__)(INPUT, HIDDEN, 2, bidirectional=True, **options)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(stock.named_parameters()), rtol=0, atol=0)
    assert repr(ours) == "fastdl." + repr(stock)
    assert ours.extra_repr() == stock.extra_repr()
    torch.testing.assert_close(ours(X), stock(X))
    assert getattr(fastdl.nn, cls.__name__)(3, 4, dtype=torch.float64).weight_ih_l0.dtype == torch.float64
    assert getattr(fastdl.nn, cls.__name__)(3, 4, device="meta").weight_ih_l0.is_meta


@every_cell
def test_construct_cells_directly(kind):
    cls, options = CELLS[kind]
    ours = getattr(fastdl.nn, cls.__name__)(INPUT, HIDDEN, bias=False, **options)
    assert isinstance(ours, cls)
    assert repr(ours).startswith(f"fastdl.{cls.__name__}(6, 9, bias=False")


def test_bookkeeping_of_flat_weights():
    ours = fastdl.optimize(layer_of("lstm", num_layers=2))
    ours.flatten_parameters()
    names = [name for name, _ in ours.named_parameters()]
    assert [len(weights) for weights in ours.all_weights] == [4, 4]
    assert all(w is getattr(ours, name) for w, name in zip(chain(*ours.all_weights), names, strict=True))
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    replacement = nn.Parameter(torch.zeros(36, INPUT))
    ours.weight_ih_l0 = replacement
    assert ours._flat_weights[0] is replacement
    ours.double()
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert all(ref() is p for ref, p in zip(ours._flat_weight_refs, ours.parameters(), strict=True))
    assert fastdl.restore(ours)(X.double())[0].dtype == torch.float64


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
def test_copies(duplicate):
    ours = fastdl.optimize(layer_of("gru", num_layers=2))
    twin = duplicate(ours)
    assert type(twin) is fastdl.nn.GRU
    assert (twin.weight_ih_l0 is ours.weight_ih_l0) == (duplicate is copy.copy)
    assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))
    torch.testing.assert_close(twin(X), ours(X), rtol=0, atol=0)
    torch.testing.assert_close(fastdl.restore(twin)(X), ours(X))


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_load_as_the_stock_class(protocol):
    model = fastdl.optimize(Tagger())
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in Tagger().modules()]
    torch.testing.assert_close(loaded(IDS), model(IDS))
    assert type(model.lstm) is fastdl.nn.LSTM


def test_whole_model_loads_where_fastdl_is_not(tmp_path, run_python):
    model = fastdl.optimize(nn.ModuleList([layer_of(kind) for kind in LAYERS] + [cell_of("lstm")]))
    torch.save({"model": model, "x": X, "y": model[0](X)[0].detach()}, tmp_path / "model.pt")
    code = f"""
import sys, warnings
sys.modules["fastdl"] = None  # importing it raises ImportError
import torch
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(saved["model"][0](saved["x"])[0], saved["y"])
print([type(m).__module__ for m in saved["model"]])
"""
    assert "fastdl" not in run_python("-c", code)


class UsersOwn(fastdl.nn.LSTM):
    """A user's subclass of a fastdl layer keeps its own class."""

    def forward(self, input):
        return super().forward(input)[0]


def test_subclass_of_a_fastdl_layer():
    own = UsersOwn(INPUT, HIDDEN)
    loaded = pickle.loads(pickle.dumps(own))
    assert type(loaded) is UsersOwn
    torch.testing.assert_close(loaded(X), own(X))


def test_state_dict_both_ways():
    stock, ours = Tagger(), fastdl.optimize(Tagger())
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours(IDS), stock(IDS))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    fresh = Tagger()
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True, assign=True)
    torch.testing.assert_close(fresh(IDS), ours(IDS))
    ours.load_state_dict(fresh.state_dict(), assign=True)
    assert all(a is b for a, b in zip(ours.lstm._flat_weights, ours.lstm.parameters(), strict=True))


def test_hooks_survive_and_run():
    layer, seen = layer_of("lstm"), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    layer.weight_hh_l0.register_hook(lambda grad: seen.append("tensor"))
    fastdl.optimize(layer)(X.clone().requires_grad_())[0].sum().backward()
    assert seen[:2] == ["pre", "forward"]
    assert set(seen[2:]) == {"backward", "tensor"}


def test_parametrised_before_the_swap_stays():
    layer = parametrizations.weight_norm(layer_of("lstm"), "weight_hh_l0")
    with pytest.raises(RuntimeError, match=r"\(model\) \(ParametrizedLSTM\): parametrised"):
        fastdl.optimize(layer, strict=True)
    with pytest.warns(UserWarning, match="nothing was swapped"):
        fastdl.optimize(layer)


def test_parametrised_after_the_swap():
    stock = layer_of("lstm")
    layer = parametrizations.weight_norm(swapped(stock), "weight_hh_l0")
    torch.testing.assert_close(layer(X), stock(X))
    layer(X)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad is not None


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_by_hook():
    layer = torch.nn.utils.weight_norm(layer_of("lstm"), "weight_hh_l0")
    expected = layer(X)[0]
    fastdl.optimize(layer)
    found = layer(X)[0]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.weight_hh_l0_g.grad is not None


class Custom(nn.LSTM):
    pass


def test_subclasses_are_left_alone():
    with pytest.raises(RuntimeError, match=r"\(model\) \(Custom\): a subclass"):
        fastdl.optimize(Custom(3, 4), strict=True)


class First(nn.Module):
    """The output of a recurrent layer, without the states."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor):
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_takes_the_stock_class():
    model = fastdl.optimize(First(layer_of("lstm", num_layers=2)))
    expected = model(X)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(X), expected)
    assert type(model.layer) is nn.LSTM  # torch.jit.script leaves what it compiled
    scripted = torch.jit.script(fastdl.optimize(nn.Sequential(cell_of("gru"))))
    assert scripted(CELL_X).shape == (3, HIDDEN)


def test_data_parallel_replicas_own_their_lists():
    layer = fastdl.optimize(layer_of("lstm"))
    replica = layer._replicate_for_data_parallel()
    assert replica._flat_weights is not layer._flat_weights
    assert type(replica) is fastdl.nn.LSTM


def test_functional_call_uses_the_given_parameters():
    layer = fastdl.optimize(layer_of("lstm"))
    other = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, other, (X,))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(found, layer(X))


# --- explain, freeze ----------------------------------------------------------------------------------------------
def test_explain():
    model = fastdl.optimize(Tagger())
    explained = fastdl.explain(model, IDS).rows
    rows = {row.fqn: row for row in explained}
    assert rows["lstm"].status == "fastdl"
    assert rows["lstm"].kernel in {row["name"] for row in _C.kernels("rnn")}
    assert "isinstance" in rows["lstm"].reason
    assert rows["cell"].kernel in {row["name"] for row in _C.kernels("rnn")}
    assert sum(row.calls for row in explained if row.fqn == "cell") == 4
    assert rows["gru"].dtype == "float32"
    assert fastdl.explain(model.double(), IDS).rows[0].kernel == "reference"
    assert "isinstance" in fastdl.explain(fastdl.optimize(Tagger())).rows[0].reason


def test_freeze_and_unfreeze():
    model = fastdl.optimize(Tagger())
    expected = model(IDS)
    fastdl.freeze(model)
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)
    fastdl.unfreeze(model)
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)
