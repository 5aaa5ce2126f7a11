"""How a run ends before its time: because going on makes no sense, or because it is asked to."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from p2r_jax.parallel.multihost import any_process

EXIT_STOPPED = 2
"""A person must change something; starting again would end the same way."""
EXIT_RESTART = 75
"""EX_TEMPFAIL: all is saved or can be resumed; launchers start the same command again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Preemption of a machine, Ctrl-C, and Slurm's warning before a time limit."""


class RunStopped(RuntimeError):
    """Going on would make no sense: the message says what went wrong and what to change."""


class Interrupted(Exception):
    """The run was asked to end, at a moment from which a checkpoint can go on."""


class Preempted(Exception):
    """The run has saved itself and ends; the same command goes on with it."""


class StopRequests:
    """Listens for signals while a run is going on. The second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: it was not installed from Python, and Python cannot give it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise Interrupted if any process was asked to end. All of them must call it together."""
        if any_process(self.received is not None):
            raise Interrupted(self.received or "another process was asked to end")
