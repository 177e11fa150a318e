"""Modules with the constructors, parameters and state dicts of their namesakes in torch.nn."""

from fastdl.nn.attention import MultiheadAttention
from fastdl.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from fastdl.nn.linear import Linear, NonDynamicallyQuantizableLinear
from fastdl.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastdl.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "NonDynamicallyQuantizableLinear",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
