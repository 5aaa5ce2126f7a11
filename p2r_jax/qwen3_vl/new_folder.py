"""A checkpoint folder that is there whole or not at all, whatever is killed when.

In a bucket, where nothing can be renamed, it is whole when it has a config.json, which comes last
and without which nobody takes it for a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from p2r_jax.parallel.multihost import any_process, is_main, on_main
from p2r_jax.paths import as_path, copy_file, is_remote, move_folder, remove_folder

LAST = "config.json"
"""What a folder has when it is whole."""

CARRIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What a checkpoint folder holds besides weights and config.json."""


@contextlib.contextmanager
def new_folder(
    path: str | Path, files_from: str | Path | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """A folder beside `path` to write to, for all processes, that becomes `path` at the end.

    files_from: a folder whose CARRIED_FILES are copied, before anything else. overwrite: replace a
    folder that is there; until the new one is whole the old one stays, or can be found again by the
    next call. Raises OSError on all processes if one cannot go on.
    """
    path = as_path(path).resolve()  # A link stays, and what it points to is replaced.
    remote = is_remote(path)
    temporary, old = (path.parent / f".{path.name}.{end}" for end in ("partial", "old"))

    moving = False

    def begin() -> None:
        if old.exists() and not path.exists():
            os.replace(old, path)  # Killed between two renames.
        if remote and (temporary / LAST).is_file() and not (path / LAST).is_file():
            finish()  # Killed while it was copied to its place.
        if path.exists() and not (overwrite and path.is_dir()):
            raise FileExistsError(f"{path} exists: choose another folder or delete it first")
        found = sorted(as_path(files_from).iterdir()) if files_from is not None else []
        for left in (temporary, old):
            if left.exists():
                remove_folder(left)
        temporary.mkdir(parents=True)
        for file in found:
            if file.name in CARRIED_FILES:
                copy_file(file, temporary / file.name)

    def finish() -> None:
        nonlocal moving
        if remote:
            moving = True
            (path / LAST).unlink(missing_ok=True)
            remove_folder(path)
        elif path.exists():
            os.replace(path, old)
        try:
            move_folder(temporary, path, LAST)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        remove_folder(old, ignore_errors=True)

    on_main(begin)
    try:
        if any_process(not remote and not temporary.is_dir()):
            raise OSError(f"not every process sees {path.parent}: it must be a disk that all share")
        yield temporary
        on_main(finish)
    except BaseException:
        if is_main() and not moving:  # What may be the only whole one stays for the next call.
            remove_folder(temporary, ignore_errors=True)
        raise
