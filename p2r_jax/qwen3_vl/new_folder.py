"""A checkpoint folder that is there whole or not at all, whatever is killed when."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from p2r_jax.parallel.multihost import any_process, is_main, on_main

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
    path = Path(path).resolve()  # A link stays, and what it points to is replaced.
    temporary, old = (path.parent / f".{path.name}.{end}" for end in ("partial", "old"))

    def begin() -> None:
        if old.exists() and not path.exists():
            os.replace(old, path)  # Killed between two renames.
        if path.exists() and not (overwrite and path.is_dir()):
            raise FileExistsError(f"{path} exists: choose another folder or delete it first")
        found = sorted(Path(files_from).iterdir()) if files_from is not None else []
        for left in (temporary, old):
            if left.exists():
                shutil.rmtree(left)
        temporary.mkdir(parents=True)
        for file in found:
            if file.name in CARRIED_FILES:
                shutil.copyfile(file, temporary / file.name)

    def finish() -> None:
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    on_main(begin)
    try:
        if any_process(not temporary.is_dir()):
            raise OSError(f"not every process sees {path.parent}: it must be a disk that all share")
        yield temporary
        on_main(finish)
    except BaseException:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
