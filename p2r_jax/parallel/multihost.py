"""Several processes: what each must do so that all see the same values."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_host(tree: Any) -> Any:
    """Whole arrays as NumPy on every process, whatever their sharding."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def is_main() -> bool:
    """The one process that writes files people read."""
    return jax.process_index() == 0
