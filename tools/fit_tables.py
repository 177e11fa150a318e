"""Prints csrc/simd/tables.h: polynomials that replace exp and divisions where a vector level looks up 32 entries.

python tools/fit_tables.py > csrc/simd/tables.h
"""

import math
from collections.abc import Callable

import numpy as np

ENTRIES = 32

HEADER = """\
// Polynomials over 32 intervals, printed by tools/fit_tables.py: f(t) = sum_d coefficient[d][n] u^d,
// n = round(t / step), u = t - n*step, 0 <= t <= 31*step. The largest error is given, relative to f where its last
// entry is not zero.
#pragma once

// clang-format off
namespace fastdl {
namespace {
"""


def normal_tail(t: float) -> float:
    return math.erfc(t / math.sqrt(2)) / 2


def normal_density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


# name, what it is, f, step, degree, whether f ends in zero: the last entry is then zero, so that activations far out
# are exactly 0 or x
TABLES: list[tuple[str, str, Callable[[float], float], float, int, bool]] = [
    ("NormalTail", "Phi(-t), the normal distribution function", normal_tail, 0.21875, 4, True),
    (
        "GeluSlopeTail",
        "d (x Phi(x)) / dx at x = -t",
        lambda t: normal_tail(t) - t * normal_density(t),
        0.21875,
        5,
        True,
    ),
    ("LogisticTail", "1 / (1 + exp(t))", lambda t: 1 / (1 + math.exp(t)), 0.5625, 5, True),
    ("TanhRatio", "tanh(t) / t", lambda t: math.tanh(t) / t if t else 1.0, 0.296875, 5, False),
]


def fit(f: Callable[[float], float], step: float, degree: int, n: int) -> np.ndarray:
    """Coefficients on the interval around n*step: least squares at Chebyshev's nodes, which is near the minimax."""
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64) * step / 2
    values = np.array([f(abs(n * step + u)) if n else f(abs(u)) for u in nodes])
    if n == 0 and f(0.0) == 0.5:  # a tail goes on as 1 - f
        values = np.where(nodes < 0, 1 - values, values)
    return np.linalg.lstsq(np.vander(nodes, degree + 1, increasing=True), values, rcond=None)[0]


def table(name: str, meaning: str, f: Callable[[float], float], step: float, degree: int, ends: bool) -> str:
    columns = [fit(f, step, degree, n) for n in range(ENTRIES)]
    if ends:
        columns[-1] = np.zeros(degree + 1)
    else:  # constant, and so that t times it is not below 1
        last = np.float32(1 / ((ENTRIES - 1.5) * step))
        columns[-1] = np.array([np.nextafter(last, np.float32(2)), *[0.0] * degree])
    coefficients = np.array(columns, dtype=np.float32).T
    error = 0.0
    for n in range(ENTRIES - 1):
        for u in np.linspace(0 if n == 0 else -step / 2, step / 2, 200):
            wanted = f(n * step + u)
            found = sum(float(c) * u**d for d, c in enumerate(coefficients[:, n]))
            error = max(error, abs(found - wanted) / (1 if ends else wanted))
    lines = [f"\n// {meaning}; {error:.1e}", f"struct {name} {{", f"  static constexpr int degree = {degree};"]
    lines += [
        f"  static constexpr float step = {step}f;",
        f"  alignas(64) static constexpr float coefficient[degree + 1][{ENTRIES}] = {{",
    ]
    for row in coefficients:
        numbers = [f"{c:#.9g}f" if c else "0" for c in row]
        four = [", ".join(numbers[i : i + 4]) for i in range(0, ENTRIES, 4)]
        lines.append("      {" + ",\n       ".join(four) + "},")
    return "\n".join([*lines, "  };", "};"])


def main() -> None:
    print(HEADER + "\n".join(table(*row) for row in TABLES) + "\n\n}  // namespace\n}  // namespace fastdl")


main()
