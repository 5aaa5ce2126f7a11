"""The licence of a file, as far as what lies beside it tells.

Looked for, nearest first: `FILE.license` (REUSE), then in every folder from the file's own up to
one above the folder that was searched: copyright, debian/copyright, LICENSE, COPYING, package.json,
README; last the copyright file of an unpacked Debian package (share/doc/PACKAGE/copyright).  A
statement is quoted, never interpreted.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import re
from pathlib import Path

_LENGTH = 240  # of a quoted statement, characters
_FILES = (
    "copyright",
    "debian/copyright",
    "license",
    "licence",
    "copying",
    "package.json",
    "readme",
)


@dataclasses.dataclass(frozen=True)
class Licence:
    """What was found.

    Attributes:
      statement: a quotation, or "unknown".
      source: the file that says so; None if unknown.
    """

    statement: str = "unknown"
    source: Path | None = None


def find_licence(path: Path, folder: Path) -> Licence:
    """The licence of `path`, a file somewhere below `folder`."""
    own = path.with_name(path.name + ".license")
    if own.is_file():
        return Licence(_quote(own.read_text("utf-8", errors="replace")), own)
    resolved, top = path.resolve(), folder.resolve().parent
    for place in resolved.parents:
        for source in _licence_files(place):
            statement = _statement(source, resolved)
            if statement:
                return Licence(statement, source)
        if place == top or place == place.parent:
            break
    for place in resolved.parents:
        packages = _packages(place / "doc") if place.name == "share" else ()
        if len(packages) == 1:  # more: an installed system, where any of them could be the one
            statement = _statement(packages[0], resolved)
            if statement:
                return Licence(statement, packages[0])
    return Licence()


def forget() -> None:
    """Drops what was read: folders may have changed."""
    for cached in (_licence_files, _packages, _text):
        cached.cache_clear()


def dep5_statement(text: str, path: Path) -> str | None:
    """Licence and copyright of `path` in a machine-readable debian/copyright file.

    The last stanza that matches counts.  Patterns name files of the source package, `path` is an
    installed file, so a pattern that ends in the file's name matches too.
    """
    best = None
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            key.lower(): value
            for key, value in re.findall(r"^(\S+):[ \t]*((?:.*\n?)(?:^[ \t].*\n?)*)", stanza, re.M)
        }
        for pattern in fields.get("files", "").split():
            last = pattern.rsplit("/", 1)[-1]
            whole = pattern == "*" or fnmatch.fnmatch(path.as_posix(), f"*/{pattern}")
            if whole or (last.strip("*?.") and last == path.name):
                licence = fields.get("license", "").splitlines()
                owner = " ".join(fields.get("copyright", "").split())
                best = f"{licence[0].strip() if licence else 'unknown'}; copyright {owner}"
    return _quote(best) if best else None


@functools.lru_cache(maxsize=1024)
def _licence_files(place: Path) -> tuple[Path, ...]:
    """Files of a folder that may state a licence, the most telling first."""
    try:
        names = {entry.name.lower(): entry for entry in sorted(place.iterdir())}
    except OSError:
        return ()
    if (place / "debian" / "copyright").is_file():
        names["debian/copyright"] = place / "debian" / "copyright"
    found = []
    for wanted in _FILES:
        for name, entry in names.items():
            if (name == wanted or name.split(".")[0] == wanted) and entry.is_file():
                found.append(entry)
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _packages(doc: Path) -> tuple[Path, ...]:
    return tuple(sorted(doc.glob("*/copyright")))


def _statement(source: Path, path: Path) -> str | None:
    text = _text(source)
    name = source.name.lower()
    if name == "copyright" and re.search(r"^Files:", text, re.M):
        return dep5_statement(text, path)
    if name == "package.json":
        try:
            licence = json.loads(text)["license"]
        except (ValueError, KeyError, TypeError):
            return None
        return _quote(str(licence))
    if name.startswith("readme"):
        lines = [
            line for line in text.splitlines() if re.search(r"licen[cs]e|copyright", line, re.I)
        ]
        return _quote(" ".join(lines)) or None
    return _quote(text) or None


@functools.lru_cache(maxsize=64)
def _text(source: Path) -> str:
    return source.read_text("utf-8", errors="replace").replace("\r\n", "\n")


def _quote(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"
