"""Stock recurrent layers and cells of every kind, small, for tests of their modules."""

import copy

import pytest
import torch
from torch import nn

import fastdl

INPUT, HIDDEN = 6, 9
LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm_proj": (nn.LSTM, {"proj_size": 4}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
CELLS = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "rnn_tanh": (nn.RNNCell, {}),
    "rnn_relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_cell = pytest.mark.parametrize("kind", CELLS)
X, CELL_X = torch.randn(5, 3, INPUT), torch.randn(3, INPUT)


def layer_of(kind, **options):
    cls, more = LAYERS[kind]
    return cls(INPUT, HIDDEN, **more, **options)


def cell_of(kind, **options):
    cls, more = CELLS[kind]
    return cls(INPUT, HIDDEN, **more, **options)


def swapped(module):
    """A fastdl copy."""
    return fastdl.optimize(copy.deepcopy(module))
