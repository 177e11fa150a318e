"""Modules with the constructors, parameters and state dicts of their namesakes in torch.nn."""

from fastdl.nn.linear import Linear, NonDynamicallyQuantizableLinear

__all__ = ["Linear", "NonDynamicallyQuantizableLinear"]
