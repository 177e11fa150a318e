"""Benchmarks: `fastdl bench`. A new operation is one module (see `gemm.py`) and its rows in `shapes/`."""
