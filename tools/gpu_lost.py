"""What a process does whose GPU is lost to an error of a kernel, for the parts of tools/gpu_check."""

from __future__ import annotations

import os
import sys

LOST = 87  # exit status: nothing can run on the GPU in this process any more


def gpu_is_lost() -> bool:
    """Whether an error of a kernel, as those of memory are, has ended this process's use of the GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def leave_if_lost() -> None:
    """Ends the process at once, with status LOST: what torch would clean up waits for the GPU."""
    if gpu_is_lost():
        os._exit(LOST)
