"""The published benchmarks and the training set: which files they come in, and their rows.

A benchmark turns the records of its files into `Row` values whose image is what the file holds
(encoded bytes, or a path), or into a `RowError` that says why there is none.  `Row.question` and
`Row.options` are separate; `Row.meta["asked"]` has both as the authors of P2R put them to a model,
to the letter.
"""

from __future__ import annotations

import binascii
import dataclasses
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from p2r_jax.data import sources
from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import SourceError
from p2r_jax.data.tables import Record, Table


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Files with questions.

    Attributes:
      name: what users call it, and its folder once prepared.
      split: name of its only split.
      find: the table of a source folder or file; raises SourceError if there is none.
      row: a record as a row; raises RowError. The path is that of the table.
      about: one line for people.
      rotated: whether rows with an equal image and question ask it in several orders of options.
    """

    name: str
    split: str
    find: Callable[[Path], Table]
    row: Callable[[Record, Path, int], Row]
    about: str
    rotated: bool = False

    def rows(self, source: Path) -> tuple[int | None, Iterator[tuple[str, Row | RowError]]]:
        """Number of records (None: unknown), and for each where it is and its row."""
        table = self.find(source)
        return table.count(), self._rows(table)

    def _rows(self, table: Table) -> Iterator[tuple[str, Row | RowError]]:
        for path, number, record in table:
            where = f"{path.name}:{number}"
            if isinstance(record, str):
                yield where, RowError(where, "(line)", record)
                continue
            row: Row | RowError
            try:
                row = self.row(record, path, number)
            except RowError as error:
                row = error
            except (TypeError, ValueError, AttributeError, KeyError, LookupError) as error:
                # A field of a type nobody expected. One such row is a bad row, not the end.
                row = RowError(where, "(record)", f"{type(error).__name__}: {error}")
            yield where, row


def find_files(
    source: Path,
    name: str,
    folders: Sequence[str],
    wanted: Callable[[str], bool],
    suffixes: Sequence[str] = (".parquet",),
) -> list[Path]:
    """The files of a benchmark: `source` itself, or in it, or in one of `folders` in it.

    wanted: whether a file's path below `source`, in lower case, belongs to the benchmark. The
    first suffix that any wanted file has is taken; a benchmark is not read twice. SourceError names
    what was looked for.
    """
    if source.is_file():
        if source.suffix not in suffixes:
            raise SourceError(f"{source}: {name} is read from files that end in {list(suffixes)}")
        return [source]
    if not source.is_dir():
        raise SourceError(f"no such file or folder: {source}")
    for folder in [*(source / f for f in folders), source]:
        for suffix in suffixes:
            found = sorted(folder.rglob(f"*{suffix}")) if folder.is_dir() else []
            # Hidden folders hold the caches of download tools.
            parts = ((p, p.relative_to(source)) for p in found)
            found = [
                p
                for p, r in parts
                if wanted(r.as_posix().lower()) and not any(x.startswith(".") for x in r.parts)
            ]
            if found:
                return found
    raise SourceError(
        f"{source} has no file of {name}: looked for {' or '.join(suffixes)} files in it"
        + (f" and in {', '.join(folders)}" if folders else "")
    )


def choice_row(
    id: str,
    question: str,
    asked: str,
    options: Sequence[str],
    answer: Any,
    **fields: Any,
) -> Row:
    """A row whose answer is the letter of an option.

    Two options of a published question may be equal, or one empty. `Row` cannot hold those apart
    by their text, but the question counts: then its options stay in the question, as with sets that
    never separate them.

    Raises RowError: an answer that is no letter, or the letter of no option.
    """
    letter = str(answer or "").strip().upper()
    if options and letter not in string.ascii_uppercase[: len(options)]:
        last = string.ascii_uppercase[len(options) - 1]
        raise RowError(id, "answer", f"is {answer!r}, and the options are A-{last}")
    meta = {"asked": asked, **fields.pop("meta", {})}
    apart = [option.strip() for option in options]
    if "" in apart or len(set(apart)) < len(apart):
        question, apart = asked, []
    return Row(id, question.strip(), letter, "mca", tuple(apart), meta=meta, **fields)


def needed(record: Mapping[str, Any], name: str, id: str) -> Any:
    """A field that every record has; raises RowError."""
    if record.get(name) is None:
        raise RowError(id, name, "is missing")
    return record[name]


def from_base64(text: str | bytes, id: str) -> bytes:
    """Decodes base64, with or without line breaks and a `data:` prefix; raises RowError."""
    if not isinstance(text, (str, bytes)):
        raise RowError(id, "image", f"must be base64 text, is {type(text).__name__}")
    if isinstance(text, bytes):
        # Bytes are either base64 or the image itself; no image format begins like the former.
        if not re.fullmatch(rb"[A-Za-z0-9+/=\s]+", text[:64]):
            return text
        text = text.decode("ascii", "replace")
    if text[:5] == "data:":
        text = text.partition(",")[2]
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        pass
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:
        raise RowError(id, "image", f"is not base64: {text[:40]!r} ({error})") from None


def image_of(value: Any, id: str, folders: Sequence[Path]) -> bytes | Path:
    """What a record holds as image: bytes, base64, a path in one of `folders`, or Hugging Face's
    {"bytes", "path"}, either of which may be None. Raises RowError."""
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is None:
            raise RowError(id, "image", "has neither bytes nor a path (bytes: None)")
        value = data if data is not None else path
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RowError(id, "image", f"must be a path or bytes, is {type(value).__name__}")
    # Base64 has no dot; and no path is as long as an image.
    if "." not in value[:4096] and len(value) > 255:
        return from_base64(value, id)
    for folder in folders:
        if (folder / value).is_file():
            return folder / value
    raise RowError(id, "image", f"file not found: {value} (in {folders[0]})")


# --- HR-Bench -----------------------------------------------------------------------------------


def _hrbench(size: str) -> Benchmark:
    def find(source: Path) -> Table:
        wanted = lambda path: size in path.rpartition("/")[2]
        files = find_files(source, f"hrbench_{size}", ["HR-Bench"], wanted, (".parquet", ".tsv"))
        return Table(files, "image")

    return Benchmark(
        f"hrbench_{size}", "test", find, hrbench_row, f"HR-Bench {size.upper()}", rotated=True
    )


def hrbench_row(record: Record, path: Path, number: int) -> Row:
    """A question in one of four orders of its options."""
    id = str(needed(record, "index", f"{path.name}:{number}"))
    question = str(needed(record, "question", id))
    given = [letter for letter in "ABCD" if str(record.get(letter, "")).strip()]
    if given != list("ABCD"[: len(given)]) or len(given) < 2:
        missing = next(letter for letter in "ABCD" if letter not in given)
        raise RowError(id, "options", f"option {missing} is missing, there are {given}")
    options = [str(record[letter]) for letter in given]
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(given, options, strict=True))
    return choice_row(
        id,
        question,
        f"{question}\nOptions:\n{lines}" if options else question,
        options,
        record.get("answer"),
        category=str(record.get("category", "")),
        image_source=from_base64(needed(record, "image", id), id),
        meta={"index": id, "cycle_category": str(record.get("cycle_category", ""))},
    )


# --- MME-RealWorld ------------------------------------------------------------------------------

_LETTERED = re.compile(r"\s*\(?([A-Z])[).:]\s*(.*)", re.DOTALL)


def lettered_options(lines: Sequence[str]) -> list[str]:
    """The texts of options written "(A) ...", "(B) ...", in this order; [] if they are not so.

    >>> lettered_options(["(A) red", "(B) blue"])
    ['red', 'blue']
    """
    matches = [_LETTERED.fullmatch(line) for line in lines]
    texts = [match[2].strip() for match in matches if match]
    letters = "".join(match[1] for match in matches if match)
    in_order = len(texts) == len(lines) and string.ascii_uppercase.startswith(letters)
    return texts if in_order else []


def _mme_realworld(lite: bool) -> Benchmark:
    name = "mme_realworld_lite" if lite else "mme_realworld"
    title = "MME-RealWorld-Lite" if lite else "MME-RealWorld"

    def find(source: Path) -> Table:
        wanted = lambda path: lite or "lite" not in path
        return Table(find_files(source, name, [title, title.lower()], wanted), "bytes")

    return Benchmark(name, "train", find, mme_realworld_row, title)


def mme_realworld_row(record: Record, path: Path, number: int) -> Row:
    """A question with up to five options, the last of them "not in the image"."""
    id = str(needed(record, "index", f"{path.name}:{number}"))
    question = str(needed(record, "question", id))
    lines = [str(line) for line in needed(record, "multi-choice options", id)]
    if len(lines) < 2:
        raise RowError(id, "options", f"there are {len(lines)}, at least 2 are needed")
    options = lettered_options(lines)
    asked = f"{question}\nOptions:\n" + "\n".join(lines)
    return choice_row(
        id,
        question if options else asked,
        asked,
        options,
        record.get("answer"),
        category=str(record.get("category", "")),
        image_source=from_base64(needed(record, "bytes", id), id),
        meta={"index": id, "l2-category": str(record.get("l2-category", ""))},
    )


# --- P2R-10k ------------------------------------------------------------------------------------


def _find_p2r_10k(source: Path) -> Table:
    def wanted(path: str) -> bool:
        return not re.search(r"(^|[/_-])(val|validation|test)[/_.-]", path)

    return Table(find_files(source, "p2r_10k", ["P2R-10k"], wanted), "images")


def p2r_10k_row(record: Record, path: Path, number: int) -> Row:
    """A row of verl's layout; the question holds its options. Ids are file and row number: the
    sets that were joined number their rows each from 0."""
    id = f"{path.stem}:{number}"
    images = needed(record, "images", id)
    if not images:
        raise RowError(id, "images", "is empty")
    info = record.get("extra_info") or {}
    answer = needed(needed(record, "reward_model", id), "ground_truth", id)
    form = info.get("answer_form") or "free_form"
    question = _user_text(needed(record, "prompt", id))
    return Row(
        id,
        question,
        str(answer).strip(),
        form,
        category=str(record.get("data_source", "")),
        image_source=image_of(images[0], id, [path.parent, path.parent.parent]),
        meta={"asked": question, "index": info.get("index")},
    )


def _user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first user message without image marks."""
    for message in messages:
        if message.get("role") == "user":
            content = message.get("content")
            if not isinstance(content, str):  # parts, of which the first text is the question
                content = next(part["text"] for part in content or () if part.get("text"))
            return re.sub(r"<image>\s*", "", content).strip()
    return ""


# --- plain files --------------------------------------------------------------------------------


def plain(name: str) -> Benchmark:
    """Rows of a .jsonl or .parquet file as `p2r_jax.data.sources` describes them."""

    def find(source: Path) -> Table:
        files = find_files(source, name, [], lambda path: True, (".jsonl", ".parquet"))
        return Table(files, "image")

    return Benchmark(name, "train", find, _plain_row, "rows of a plain file")


def _plain_row(record: Record, path: Path, number: int) -> Row:
    return sources.file_row(record, f"{path.name}:{number}", path.parent)


# --- all ----------------------------------------------------------------------------------------


def benchmarks() -> dict[str, Benchmark]:
    """All that have a name of their own."""
    from p2r_jax.data.vstar import VSTAR

    p2r_10k = Benchmark("p2r_10k", "train", _find_p2r_10k, p2r_10k_row, "training set of P2R")
    known = [VSTAR, _hrbench("4k"), _hrbench("8k"), _mme_realworld(False), _mme_realworld(True)]
    return {benchmark.name: benchmark for benchmark in [*known, p2r_10k]}
