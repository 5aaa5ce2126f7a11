"""How many programs XLA has compiled, and for how long: shapes that leak show here."""

from __future__ import annotations

import dataclasses

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Compilations:
    """Counts from its creation on, in this process. A program read from JAX's compilation cache
    counts too: it was needed."""

    count: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == _EVENT:
            self.count += 1
            self.seconds += duration_secs

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)
