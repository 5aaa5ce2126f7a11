"""How far apart two float32 computations of one value may be, whatever processor they run on.

Processors have vectors of different widths, and some round a product and a sum together (fused
multiply-add). So the same program adds up in another order on another one, and so do two programs,
or two meshes, on the same one. A gate that is what one processor showed fails on the next. Here
gates follow from the numbers that are added up:

- A float32 sum of n numbers, in any order, is the exact sum of numbers each changed by at most n
  units, relatively (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). This is
  `worst`, for a sum that stands alone.
- The single roundings have either sign, and grow as a random walk: by the square root of n, with
  next to no exception (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). This is `allowance`. It
  multiplies by the condition: by how much more the result moves than the numbers that it is made
  of. `moved` and `judged` measure that, with steps so large that rounding hides in them. It is a
  property of the function, not of the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

UNIT = 2.0**-24
"""The largest relative error of rounding one number to float32."""
ELEMENTARY = 4
"""Units that exponentials, roots and divisions on the way may cost beside the sums."""
STEP = 2.0**-10
"""Relative; rounding is a thousandth of what it does, and its square another."""


def worst(terms: int, magnitude: float = 1.0) -> float:
    """What no order of a sum exceeds. magnitude: the sum of the absolute values."""
    return terms * UNIT * magnitude


def allowance(terms: int, condition: float = 1.0) -> float:
    """What rounding may change. terms: of the longest sum; condition: see the module."""
    return (math.sqrt(terms) + ELEMENTARY) * UNIT * condition


def moved(tree: Any, seed: int = 0) -> Any:
    """Every float of the tree changed by up to STEP, relatively; divide what that does by STEP."""
    rng = np.random.default_rng(seed)

    def one(x: Any) -> Any:
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return x * (1 + STEP * rng.uniform(-1, 1, x.shape)).astype(x.dtype)

    return jax.tree.map(one, tree)


def judged(run: Callable[..., Any], *inputs: Any, terms: int) -> tuple[Any, Any]:
    """The values of `run`, and what rounding may change in any element of each of them."""
    values, others = (jax.tree.map(np.asarray, run(*x)) for x in (inputs, moved(inputs)))
    gates = jax.tree.map(
        lambda a, b: allowance(terms, float(np.abs(a - b).max()) / STEP), values, others
    )
    return values, gates


def assert_close(actual: Any, expected: Any, gates: Any) -> None:
    """Trees of arrays, and for each array its gate."""
    jax.tree.map(
        lambda a, b, gate: np.testing.assert_allclose(a, b, rtol=0, atol=gate),
        actual,
        expected,
        gates,
    )
