"""What a run raises when it stops itself."""


class RunStopped(RuntimeError):
    """Going on would make no sense: the message says what went wrong and what to change."""
