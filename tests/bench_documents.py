"""A real run of the benchmarks and what is printed of one, for tests of what is made of them."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from fastdl.bench import runner
from fastdl.bench.settings import Settings


def small_document() -> dict[str, Any]:
    """The 8x8x8 rows."""
    return runner.run("gemm", Settings(seconds=0.001, shapes="8x8x8"))


def printed(function, *arguments) -> str:
    """What a function prints to the console it takes last."""
    text = io.StringIO()
    function(*arguments, Console(file=text, width=200))
    return text.getvalue()
