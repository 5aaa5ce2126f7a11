"""Examples: what a row is, where rows come from, and how they reach the devices."""

from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import load_source

__all__ = ["Row", "RowError", "load_source"]
