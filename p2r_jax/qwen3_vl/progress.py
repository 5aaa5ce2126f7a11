"""A progress bar for bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_WORTH_SHOWING = 2**28


@contextlib.contextmanager
def bytes_bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows progress towards `total` bytes; yields what to call with each number of bytes done.

    Nothing is shown of what is done at once.
    """
    if not shown or total < _WORTH_SHOWING:
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda done: bar.advance(task, done)
