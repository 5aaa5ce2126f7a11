"""`python -m p2r_jax.study.tied PARENT COMMAND...`: COMMAND, asked to end when PARENT is gone.

A study that is killed outright cannot end its runs. On Linux the kernel then sends them SIGTERM,
upon which a training run saves itself and ends. Elsewhere they go on to their end; either way a
study that is started again waits for them (`run.Lock`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from p2r_jax.study import EXIT_RESTART

_PR_SET_PDEATHSIG = 1


def main(parent: str, *command: str) -> None:
    """Does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # It ended before the kernel was told.
            sys.exit(EXIT_RESTART)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
