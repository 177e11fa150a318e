"""The shape lists of `shapes/`: one loader for tests and benchmarks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_UNSAID = {"batch": 1, "layers": 1, "directions": 1, "proj": 0}  # what a name leaves out
_UNSAID |= {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class Shape:
    """One layer of one model: where it comes from, and the sizes an operation needs (`dims`, by field name)."""

    model: str
    layer: str
    families: tuple[str, ...]
    tags: tuple[str, ...]
    dims: dict[str, int] = field(hash=False)

    def sizes(self, *names: str) -> tuple[int, ...]:
        """The named sizes: `M, N, K = shape.sizes("M", "N", "K")`."""
        return tuple(self.dims[name] for name in names)

    @property
    def name(self) -> str:
        """Unique within a family: "Llama-3-8B mlp up 512x14336x4096"."""
        sizes = "x".join(str(value) for key, value in self.dims.items() if _UNSAID.get(key) != value)
        return " ".join(part for part in (self.model, self.layer, sizes) if part)


def _gemm_dims(row: dict[str, Any], M: int) -> dict[str, int]:
    return {"batch": row.get("batch", 1), "M": M, "N": row.get("N", M), "K": row.get("K", M)}


def _gemm(row: dict[str, Any]) -> list[Shape]:
    tags = tuple(row.get("tags", ())) + (("transpose_b",) if row.get("transpose_b") else ())
    values = row["M"] if isinstance(row["M"], list) else [row["M"]]
    head = (row["model"], row["layer"], tuple(row["families"]))
    dims = [_gemm_dims(row, M) for M in values]
    return [Shape(*head, tags + _size_tags(d), d) for d in dims]


def _size_tags(dims: dict[str, int]) -> tuple[str, ...]:
    """What figures select rows by, follows from the sizes: see shapes/gemm.toml."""
    M, wide = dims["M"], min(dims["N"], dims["K"]) >= 256
    return tuple(
        tag for tag, fits in (("wide", wide), ("M>=512", wide and M >= 512), ("M=128", wide and M == 128)) if fits
    )


def _attention(row: dict[str, Any]) -> list[Shape]:
    head = (row["model"], row["layer"], tuple(row["families"]), tuple(row.get("tags", ())))
    shapes = []
    for L in row["Lk"] if isinstance(row["Lk"], list) else [row["Lk"]]:
        for D in row["D"] if isinstance(row["D"], list) else [row["D"]]:
            sizes = {"B": row.get("B", 1), "H": row["H"], "Hkv": row.get("Hkv", row["H"]), "Lq": row.get("Lq", L)}
            shapes.append(Shape(*head, sizes | {"Lk": L, "D": D}))
    return shapes


def _rnn(row: dict[str, Any]) -> list[Shape]:
    head = (row["model"], row["layer"], tuple(row["families"]), tuple(row.get("tags", ())))
    options = {name: row.get(name, default) for name, default in (("proj", 0), ("layers", 1), ("directions", 1))}
    shapes = []
    for T in row["T"] if isinstance(row["T"], list) else [row["T"]]:
        for width in row["I"] if isinstance(row["I"], list) else [row["I"]]:
            sizes = {"T": T, "B": row["B"], "I": width, "H": row.get("H", width)}
            shapes.append(Shape(*head, sizes | options))
    return shapes


def _conv(row: dict[str, Any]) -> list[Shape]:
    head = (row["model"], row["layer"], tuple(row["families"]), tuple(row.get("tags", ())))
    sizes = {f"in{i}": n for i, n in enumerate(row["size"])} | {"K": row["K"]}
    sizes |= {f"k{i}": n for i, n in enumerate(row["kernel"])}
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    sizes |= {name: row.get(name, default) for name, default in options.items()}
    batches = row["N"] if isinstance(row["N"], list) else [row["N"]]
    return [Shape(*head, {"N": N, "C": row["C"]} | sizes) for N in batches]


_EXPAND = {"gemm": _gemm, "attention": _attention, "rnn": _rnn, "conv": _conv}


@cache
def _load(operation: str) -> tuple[Shape, ...]:
    if operation not in _EXPAND:
        raise ValueError(f"shapes: operation: expected one of {sorted(_EXPAND)}, got {operation!r}")
    text = files("fastdl.bench").joinpath("shapes", f"{operation}.toml").read_text(encoding="utf-8")
    return tuple(shape for row in tomllib.loads(text)[operation] for shape in _EXPAND[operation](row))


def load(operation: str, family: str = "", tag: str = "") -> list[Shape]:
    """Shapes of an operation ("gemm", "conv", ...) in file order, all or those of one family and with one tag.

    Raises ValueError for an operation without shapes.
    """
    return [
        shape
        for shape in _load(operation)
        if (not family or family in shape.families) and (not tag or tag in shape.tags)
    ]
