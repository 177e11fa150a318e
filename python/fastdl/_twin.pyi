"""Stubs of the host twin of the CUDA kernels: `fastdl._cuda` for CPU tensors, for tests alone; never in wheels."""

from torch import Tensor

from fastdl._cuda import *  # noqa: F403

def set_seed(seed: int) -> None:
    """The order in which the threads of a block run: 0 one after the other, else random from this seed."""

def take_counts() -> tuple[int, int]:
    """(bank conflicts of ldmatrix, warp instructions) since the last call."""

def fault_names() -> list[str]:
    """Kernels that reverse 64 numbers, each with a bug that can be planted."""

def run_fault(name: str, planted: bool, in_: Tensor, out: Tensor) -> None:
    """out[64] = in_[64] reversed, by the kernel of this name, with its bug or without."""

def try_launch(x: int, y: int, z: int, threads: int, shared_bytes: int) -> None:
    """Launches a kernel that does nothing. RuntimeError where no GPU takes such a launch."""
