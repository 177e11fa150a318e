"""Prints csrc/simd/tables.h: polynomials that replace exp and divisions where a vector level looks up 32 entries.

python tools/fit_tables.py > csrc/simd/tables.h
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ENTRIES = 32
HEADER = """\
// Polynomials over 32 intervals, printed by tools/fit_tables.py: f(t) = sum_d coefficient[d][n mod 32] u^d,
// n = round(t / step), u = t - n*step; the outermost n are the ends, where f is constant.
#pragma once

// clang-format off
namespace fastdl {
namespace {
"""


@dataclass(frozen=True)
class Table:
    """f at t >= 0, or of either sign where `low`, its value at the negative end, is given."""

    name: str
    meaning: str
    f: Callable[[float], float]
    step: float
    degree: int
    high: float
    low: float | None = None
    relative: bool = False  # how the error is told

    @property
    def last(self) -> int:
        return ENTRIES - 1 if self.low is None else ENTRIES // 2 - 1


def normal_tail(t: float) -> float:
    return math.erfc(t / math.sqrt(2)) / 2


def gelu_slope_tail(t: float) -> float:
    return normal_tail(t) - t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def logistic(t: float) -> float:
    return 1 / (1 + math.exp(-t))


def tanh_ratio(t: float) -> float:
    return math.tanh(t) / t if t else 1.0


RATIO_STEP = 0.296875
RATIO_END = float(np.nextafter(np.float32(1 / ((ENTRIES - 1.5) * RATIO_STEP)), np.float32(1)))  # times t at least 1

TABLES = [
    Table("NormalTail", "Phi(-t), the normal distribution function", normal_tail, 0.21875, 4, 0),
    Table("GeluSlopeTail", "d (x Phi(x)) / dx at x = -t", gelu_slope_tail, 0.21875, 5, 0),
    Table("LogisticTail", "1 / (1 + exp(t))", lambda t: logistic(-t), 0.5625, 5, 0),
    Table("TanhRatio", "tanh(t) / t", tanh_ratio, RATIO_STEP, 5, RATIO_END, relative=True),
    Table("NarrowLogisticTail", "1 / (1 + exp(t)), for bfloat16", lambda t: logistic(-t), 0.5625, 3, 0, relative=True),
    Table("NarrowTanh", "tanh(t), for bfloat16", math.tanh, 0.45, 3, 1, -1),
]


def fit(table: Table, n: int) -> np.ndarray:
    """Coefficients on the interval around n*step: least squares at Chebyshev's nodes, which is near the minimax."""
    rest = [0.0] * table.degree
    if n == table.last:
        return np.array([table.high, *rest])
    if table.low is not None and n <= -table.last:
        return np.array([table.low, *rest])
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64) * table.step / 2
    values = np.array([table.f(n * table.step + u) for u in nodes])
    found = np.linalg.lstsq(np.vander(nodes, table.degree + 1, increasing=True), values, rcond=None)[0]
    return np.where(np.abs(found) < 1e-10 * np.abs(found).max(), 0, found)  # odd functions


def text(table: Table) -> str:
    numbers = [n if n <= table.last else n - ENTRIES for n in range(ENTRIES)]
    coefficients = np.array([fit(table, n) for n in numbers], dtype=np.float32).T
    error = 0.0
    for column, n in enumerate(numbers):
        if n == table.last or (table.low is not None and n <= -table.last):
            continue
        for u in np.linspace(-table.step / 2, table.step / 2, 200):
            wanted = table.f(n * table.step + u)
            found = sum(float(c) * u**d for d, c in enumerate(coefficients[:, column]))
            error = max(error, abs(found - wanted) / (abs(wanted) if table.relative else 1))
    lines = [
        f"\n// {table.meaning}; {'relative ' if table.relative else ''}error {error:.1e}",
        f"struct {table.name} {{",
        f"  static constexpr int degree = {table.degree}, last = {table.last};",
        f"  static constexpr bool is_signed = {str(table.low is not None).lower()};",
        f"  static constexpr float step = {table.step}f;",
        f"  alignas(64) static constexpr float coefficient[degree + 1][{ENTRIES}] = {{",
    ]
    for row in coefficients:
        entries = [f"{c:#.9g}f" if c else "0" for c in row]
        four = [", ".join(entries[i : i + 4]) for i in range(0, ENTRIES, 4)]
        lines.append("      {" + ",\n       ".join(four) + "},")
    return "\n".join([*lines, "  };", "};"])


def main() -> None:
    print(HEADER + "\n".join(text(table) for table in TABLES) + "\n\n}  // namespace\n}  // namespace fastdl")


main()
