"""LSTM, GRU, RNN and their cells.

The layers do not derive from torch.nn.RNNBase: torch.compile refuses to look into what does. So isinstance(layer,
torch.nn.LSTM) is false once swapped; everything else that torch's classes have is here, most of it taken from them.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn.modules import rnn as stock
from torch.nn.utils.rnn import PackedSequence

from fastdl.nn.swapped import Swapped, traced_call
from fastdl.ops.rnn import cell, layers, plain_cell
from fastdl.ops.rnn_shapes import Config


def _require_tensor(op: str, argument: str, x: Any) -> None:
    """TypeError for what is none; tensors of other libraries, which torch's functions may know, pass."""
    if not isinstance(x, Tensor) and not hasattr(type(x), "__torch_function__"):
        raise TypeError(f"fastdl.{op}: argument '{argument}': expected a torch.Tensor, got {type(x).__name__}")


def _require_dims(op: str, argument: str, x: Tensor, ndim: int, why: str) -> None:
    if x.dim() != ndim:
        raise RuntimeError(
            f"fastdl.{op}: argument '{argument}': expected {ndim}-D for {why}, got shape {list(x.shape)}"
        )


def _pair(op: str, hx: Any) -> tuple[Tensor, Tensor]:
    """hx of an LSTM as two tensors. Unlike torch, which takes a bare tensor apart, that is a TypeError."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"fastdl.{op}: argument 'hx': expected a tuple (h_0, c_0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"fastdl.{op}: argument 'hx': expected two tensors (h_0, c_0), got {len(hx)}")
    _require_tensor(op, "hx[0]", hx[0])
    _require_tensor(op, "hx[1]", hx[1])
    return hx[0], hx[1]


def _proxy(input: Any, hx: Any) -> Proxy | None:
    """What stands for one of a call's tensors in a torch.fx graph, if anything does."""
    for x in (input, *hx) if type(hx) is tuple else (input, hx):
        if isinstance(x, Proxy):
            return x
    return None


class _ScriptedAsStock(Swapped):
    """torch.jit.script compiles a layer of the stock class with the same parameters; it also leaves it in the model."""

    packed_weight = None

    def __prepare_scriptable__(self) -> torch.nn.Module:
        twin = self.__copy__()
        twin.__class__ = self.stock_class
        return twin


class _Recurrent(_ScriptedAsStock, torch.nn.Module):
    """What LSTM, GRU and RNN share. Attributes, names and defaults are those of torch.nn.RNNBase."""

    _op: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        built = self.stock_class(*args, **kwargs)
        super().__init__()
        self.__dict__.update(built.__dict__)

    # What does not ask for its own class by super() serves as it is.
    _init_flat_weights = stock.RNNBase._init_flat_weights
    _update_flat_weights = stock.RNNBase._update_flat_weights
    _weights_have_changed = stock.RNNBase._weights_have_changed
    flatten_parameters = stock.RNNBase.flatten_parameters
    reset_parameters = stock.RNNBase.reset_parameters
    extra_repr = stock.RNNBase.extra_repr
    all_weights = stock.RNNBase.all_weights
    check_input = stock.RNNBase.check_input
    check_hidden_size = stock.RNNBase.check_hidden_size
    check_forward_args = stock.RNNBase.check_forward_args
    get_expected_hidden_size = stock.RNNBase.get_expected_hidden_size
    permute_hidden = stock.RNNBase.permute_hidden

    def forward(self, input: Any, hx: Any = None) -> Any:
        """input [T, B, I], [B, T, I] with batch_first, [T, I] or a PackedSequence -> (output, states), as in torch.

        Raises ValueError for an input of other rank or, outside autocast, of another dtype than the parameters;
        TypeError for what is no tensor, and for an LSTM's hx that is no pair; RuntimeError for shapes that do not fit,
        those of the parameters included (unlike torch, which reads a wrongly shaped one as it comes).
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if (proxy := _proxy(input, hx)) is not None:
            return traced_call(self, proxy, input, hx)
        op, lstm = self._op, self.mode == "LSTM"
        _require_tensor(op, "input", input)
        ndim = input.dim()
        if ndim not in (2, 3):
            raise ValueError(f"fastdl.{op}: argument 'input': expected 2-D or 3-D, got shape {list(input.shape)}")
        parameters = self._checked_parameters(input)
        hx, cx = self._states(hx)
        if hx is not None:
            why = "a batched (3-D) input" if ndim == 3 else "an unbatched (2-D) input"
            _require_dims(op, "hx", hx, ndim, why)
            if cx is not None:
                _require_dims(op, "cx", cx, ndim, why)
        if ndim == 2:
            input = input.unsqueeze(1)
            hx = None if hx is None else hx.unsqueeze(1)
            cx = None if cx is None else cx.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        y, h_n, c_n = layers(input, hx, cx, parameters, None, self._config())
        if ndim == 2:
            y, h_n, c_n = y.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, (h_n, c_n) if lstm else h_n

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if data.dim() != 2:
            raise RuntimeError(f"fastdl.{self._op}: argument 'input': expected packed 2-D data, got {data.dim()}-D")
        parameters = self._checked_parameters(data)
        config = self._config()
        states = config.num_layers * config.directions
        hx, cx = self._states(hx)
        if hx is None:
            # Where the order tells the batch, nothing has to be read from a tensor, and compiled graphs stay whole.
            batch = int(batch_sizes[0]) if sorted_indices is None else sorted_indices.shape[0]
            hx = data.new_zeros(states, batch, config.output_size)
            cx = data.new_zeros(states, batch, config.hidden_size) if self.mode == "LSTM" else None
        else:
            _require_dims(self._op, "hx", hx, 3, "packed input")
            hx = _permuted(hx, sorted_indices)
            if cx is not None:
                _require_dims(self._op, "cx", cx, 3, "packed input")
                cx = _permuted(cx, sorted_indices)
        y, h_n, c_n = layers(data, hx, cx, parameters, batch_sizes, config)
        h_n = _permuted(h_n, unsorted_indices)
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return output, h_n if c_n is None else (h_n, _permuted(c_n, unsorted_indices))

    def _states(self, hx: Any) -> tuple[Tensor | None, Tensor | None]:
        if hx is None:
            return None, None
        if self.mode == "LSTM":
            return _pair(self._op, hx)
        _require_tensor(self._op, "hx", hx)
        return hx, None

    def _checked_parameters(self, input: Tensor) -> list[Tensor]:
        """In torch's order, as the attributes now are: parametrised by hooks, or put in by torch.func, or not."""
        parameters = [getattr(self, name) for name in self._flat_weights_names]
        if input.dtype != parameters[0].dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"fastdl.{self._op}: argument 'input': expected the dtype of the parameters, {parameters[0].dtype}, "
                f"got {input.dtype}"
            )
        return parameters

    def _config(self) -> Config:
        return Config(
            self._op,
            self.mode.lower(),
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            2 if self.bidirectional else 1,
            self.bias,
            self.dropout if self.training else 0.0,
            tuple(self._flat_weights_names),
        )

    # --- torch's own bookkeeping of a list of parameters and of weak references to them ---------------------------
    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get("_flat_weights_names", ())
        if name in names:
            self._flat_weights[names.index(name)] = value
        super().__setattr__(name, value)

    def _refer(self) -> None:
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in self._flat_weights]

    def _attributes(self) -> dict[str, Any]:
        state = super()._attributes()
        del state["_flat_weight_refs"]
        return state

    def __copy__(self) -> Any:
        twin = super().__copy__()
        twin._refer()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = super().__deepcopy__(memo)
        twin._refer()
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._refer()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._flat_weight_refs = []
        super()._apply(fn, recurse)
        self._init_flat_weights()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._flat_weights = replica._flat_weights[:]
        replica._flat_weights_names = replica._flat_weights_names[:]
        return replica


def _permuted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


class LSTM(_Recurrent):
    """`torch.nn.LSTM` on fastdl: every option, batched, unbatched and packed input."""

    stock_class = stock.LSTM
    _op = "lstm"
    check_forward_args = stock.LSTM.check_forward_args
    get_expected_cell_size = stock.LSTM.get_expected_cell_size
    permute_hidden = stock.LSTM.permute_hidden


class GRU(_Recurrent):
    """`torch.nn.GRU` on fastdl: every option, batched, unbatched and packed input."""

    stock_class = stock.GRU
    _op = "gru"


class RNN(_Recurrent):
    """`torch.nn.RNN` on fastdl, tanh or ReLU: every option, batched, unbatched and packed input."""

    stock_class = stock.RNN
    _op = "rnn"


# --- cells --------------------------------------------------------------------------------------------------------
class _Cell(_ScriptedAsStock):
    """What the cells share; mixed in before a stock cell."""

    _op: ClassVar[str]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """input [B, I] or [I], states [B, H] or [H] -> the states one step on, as in torch.

        Raises ValueError for arguments of other rank, TypeError for what is no tensor, and for an LSTMCell's hx that is
        no pair; RuntimeError for shapes and dtypes that do not fit, those of the parameters included.
        """
        op, mode = self._op, self._mode()
        if (proxy := _proxy(input, hx)) is not None:
            return traced_call(self, proxy, input, hx)
        if hx is not None and not is_compiling() and not torch.is_grad_enabled():
            pair = hx if mode == "lstm" else (hx, None)
            if type(pair) in (tuple, list) and len(pair) == 2:
                out = plain_cell(mode, self.hidden_size, input, pair[0], pair[1], self._parameters)
                if out is not None:
                    return out
        _require_tensor(op, "input", input)
        ndim = input.dim()
        if ndim not in (1, 2):
            raise ValueError(f"fastdl.{op}: argument 'input': expected 1-D or 2-D, got shape {list(input.shape)}")
        cx = None
        if hx is not None:
            if mode == "lstm":
                hx, cx = _pair(op, hx)
            else:
                _require_tensor(op, "hx", hx)
            for name, x in (("hx", hx), ("cx", cx)):
                if x is not None and x.dim() not in (1, 2):
                    raise ValueError(f"fastdl.{op}: argument '{name}': expected 1-D or 2-D, got shape {list(x.shape)}")
                if x is not None:
                    _require_dims(op, name, x, ndim, f"a {ndim}-D input")
        if ndim == 1:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
            cx = None if cx is None else cx.unsqueeze(0)
        names = _CELL_NAMES if self.bias else _CELL_NAMES[:2]
        parameters = [getattr(self, name) for name in names]
        config = Config(op, mode, self.input_size, self.hidden_size, bias=self.bias, names=names)
        h, c = cell(input, hx, cx, parameters, config)
        if ndim == 1:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return h if c is None else (h, c)

    def _mode(self) -> str:
        return self._op.removesuffix("_cell")


_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTMCell(_Cell, stock.LSTMCell):
    """`torch.nn.LSTMCell` on fastdl."""

    stock_class = stock.LSTMCell
    _op = "lstm_cell"


class GRUCell(_Cell, stock.GRUCell):
    """`torch.nn.GRUCell` on fastdl."""

    stock_class = stock.GRUCell
    _op = "gru_cell"


class RNNCell(_Cell, stock.RNNCell):
    """`torch.nn.RNNCell` on fastdl, tanh or ReLU."""

    stock_class = stock.RNNCell
    _op = "rnn_cell"

    def _mode(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(
                f"fastdl.rnn_cell: attribute 'nonlinearity': expected 'tanh' or 'relu', got {self.nonlinearity!r}"
            )
        return f"rnn_{self.nonlinearity}"
