"""fastdl: PyTorch models faster on the hardware people already have.

model = fastdl.optimize(model)   # in place; train or serve as before
print(fastdl.explain(model, x))  # which layers run on which kernel, and why the others do not
"""

from __future__ import annotations

# torch comes first: it brings the process's one OpenMP runtime, and the native module then binds to that copy.
import torch

from fastdl._version import __version__

_TORCH_OLDEST = (2, 10)


def _require_torch() -> None:
    """ImportError unless this torch offers the DLPack C exchange API that the native module is built on."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < _TORCH_OLDEST or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise ImportError(
            f"fastdl {__version__} needs torch >= {'.'.join(map(str, _TORCH_OLDEST))} "
            f"(torch.Tensor.__dlpack_c_exchange_api__), found torch {torch.__version__}. "
            "Upgrade it: pip install --upgrade torch"
        )


def _require_same_build(native_version: str) -> None:
    """ImportError when the compiled module is of another version than these Python files: a stale build."""
    if native_version != __version__:
        raise ImportError(
            f"fastdl's Python files are version {__version__}, its native module is version {native_version}: "
            "the build is stale. Reinstall it: pip install --force-reinstall --no-deps fastdl "
            "(from a source checkout: pip install --force-reinstall --no-deps .)"
        )


_require_torch()

from fastdl import _C  # noqa: E402

_require_same_build(_C.__version__)

from fastdl import functional, nn  # noqa: E402
from fastdl.explain import explain  # noqa: E402
from fastdl.freeze import freeze, unfreeze  # noqa: E402
from fastdl.optimize import _integrate, optimize, restore  # noqa: E402

_integrate()

__all__ = ["__version__", "explain", "freeze", "functional", "nn", "optimize", "restore", "unfreeze"]
