"""A server on this machine that speaks as much of Google Cloud Storage's JSON API as gcsfs,
tensorstore and orbax use, with its rules: an object appears whole, with a new generation, and
preconditions on generations hold. Nothing is kept when it stops.

    with running() as server:
        server.buckets["name"] = {}

What PyPI has (gcp-storage-emulator) gives tensorstore generations that it refuses.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ENDPOINTS = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


@dataclasses.dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.forbidden: set[str] = set()
        """Buckets that answer as if nobody had logged in."""
        self.reads: list[tuple[str, int]] = []
        """Object and bytes of each answer with content."""
        self.lose_answer_of: str | None = None
        """A request whose path ends so is carried out, but answered with an error, once."""
        self.uploads: dict[str, tuple[str, str, bytearray, int | None]] = {}
        self.generations = itertools.count(1_700_000_000_000_000)
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that ask twice at once, and hang up on the second, are no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def put(self, bucket: str, name: str, data: bytes, match: int | None = None) -> Stored:
        with self.lock:
            self.check(bucket, name, match)
            stored = self.buckets[bucket][name] = Stored(bytes(data), next(self.generations))
            return stored

    def check(self, bucket: str, name: str, match: int | None) -> None:
        """Raise Refused unless the object has that generation; 0: unless there is none."""
        found = self.objects(bucket).get(name)
        if match is not None and match != (found.generation if found else 0):
            raise Refused(412, "conditionNotMet")

    def objects(self, bucket: str) -> dict[str, Stored]:
        if bucket in self.forbidden:
            raise Refused(401, "Anonymous caller does not have storage.objects.list access")
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[bucket]


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server for this process and those that it starts."""
    server = Server()
    before = {
        name: os.environ.get(name) for name in (*ENDPOINTS, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
    }
    os.environ |= dict.fromkeys(ENDPOINTS, server.url)
    # It would ask Google over gRPC what kind of bucket it is.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # In one packet: of two, the second would wait 40 ms for the first to be acknowledged.
    wbufsize, disable_nagle_algorithm = -1, True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.route(parts, body)
        except Refused as error:
            text = {"error": {"code": error.status, "message": str(error)}}
            self.answer(json.dumps(text).encode(), error.status)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, parts: list[str], body: bytes) -> None:
        match self.command, parts:
            case _, ["upload", "storage", "v1", "b", bucket, "o"]:
                self.upload(bucket, body)
            case "GET", ["download", "storage", "v1", "b", bucket, "o", name]:
                self.content(bucket, name)
            case "GET", ["storage", "v1", "b", bucket]:
                self.server.objects(bucket)
                self.answer_json({"kind": "storage#bucket", "name": bucket})
            case "GET", ["storage", "v1", "b", bucket, "o"]:
                self.list(bucket)
            case "GET", ["storage", "v1", "b", bucket, "o", name]:
                if self.query.get("alt") == "media":
                    self.content(bucket, name)
                else:
                    self.answer_json(self.described(bucket, name, self.found(bucket, name)))
            case "DELETE", ["storage", "v1", "b", bucket, "o", name]:
                with self.server.lock:
                    self.server.check(bucket, name, self.number("ifGenerationMatch"))
                    self.found(bucket, name)
                    del self.server.buckets[bucket][name]
                self.answer(b"", 204)
            case "POST", ["storage", "v1", "b", bucket, "o", name, "compose"]:
                sources = [source["name"] for source in json.loads(body)["sourceObjects"]]
                with self.server.lock:
                    data = b"".join(self.found(bucket, source).data for source in sources)
                    self.put(bucket, name, data)
            case "POST", ["storage", "v1", "b", bucket, "o", name, "rewriteTo", "b", to, "o", new]:
                stored = self.server.put(to, new, self.found(bucket, name).data)
                self.answer_json({"done": True, "resource": self.described(to, new, stored)})
            case _:
                raise Refused(501, f"not known here: {self.command} {self.path}")

    def number(self, name: str) -> int | None:
        return int(self.query[name]) if name in self.query else None

    def found(self, bucket: str, name: str) -> Stored:
        found = self.server.objects(bucket).get(name)
        if found is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, data: bytes, match: int | None = None) -> None:
        match = self.number("ifGenerationMatch") if match is None else match
        self.answer_json(self.described(bucket, name, self.server.put(bucket, name, data, match)))

    def content(self, bucket: str, name: str) -> None:
        stored = self.found(bucket, name)
        if self.number("ifGenerationNotMatch") == stored.generation:
            self.answer(b"", 304, stored.generation)
            return
        self.server.check(bucket, name, self.number("ifGenerationMatch"))
        data, status, headers = stored.data, 200, {}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            size = len(data)
            begin = int(first) if first else max(0, size - int(last))
            end = min(int(last) + 1, size) if first and last else size
            if begin >= size:
                raise Refused(416, "The requested range cannot be satisfied.")
            data, status = data[begin:end], 206
            headers = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}
        self.server.reads.append((name, len(data)))
        self.answer(data, status, stored.generation, headers)

    def list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        with self.server.lock:
            objects = dict(self.server.objects(bucket))
        entries: dict[str, dict[str, Any] | None] = {}
        for name in sorted(name for name in objects if name.startswith(prefix)):
            inner, cut, _ = (
                name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            )
            if cut:
                entries[f"{prefix}{inner}{cut}"] = None
            else:
                entries[name] = self.described(bucket, name, objects[name])
        # Small pages, so that following them is tried.
        size = min(int(self.query.get("maxResults", 50)), 50)
        names = [name for name in entries if name > self.query.get("pageToken", "")]
        page = names[:size]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [entries[name] for name in page if entries[name]]
        answer["prefixes"] = [name for name in page if not entries[name]]
        if len(names) > size:
            answer["nextPageToken"] = page[-1]
        self.answer_json(answer)

    def upload(self, bucket: str, body: bytes) -> None:
        kind, key = self.query.get("uploadType"), self.query.get("upload_id")
        if key is not None:
            self.go_on(key, body)
        elif kind == "media":
            self.put(bucket, self.query["name"], body)
        elif kind == "multipart":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
            about, content = body.split(f"--{boundary}".encode(), 2)[1:]
            data = content.split(b"\n\n", 1)[1].rsplit(f"\n--{boundary}--".encode(), 1)[0]
            self.put(bucket, json.loads(about.split(b"\n\n", 1)[1])["name"], data)
        else:
            self.server.objects(bucket)
            name = self.query.get("name") or json.loads(body)["name"]
            key = str(next(self.server.generations))
            match = self.number("ifGenerationMatch")
            self.server.uploads[key] = (bucket, name, bytearray(), match)
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={key}"
            self.answer(b"", 200, headers={"Location": where})

    def go_on(self, key: str, body: bytes) -> None:
        """A piece of a resumable upload; the object appears with the last one."""
        if self.command == "DELETE":
            del self.server.uploads[key]
            self.answer(b"", 499)
            return
        bucket, name, data, match = self.server.uploads[key]
        data += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or int(total) > len(data):
            self.answer(b"", 308, headers={"Range": f"bytes=0-{len(data) - 1}"})
            return
        del self.server.uploads[key]
        self.put(bucket, name, bytes(data), match)

    def described(self, bucket: str, name: str, stored: Stored) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(stored.data)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        }

    def answer_json(self, value: Any) -> None:
        lost = self.server.lose_answer_of
        if lost is not None and urlsplit(self.path).path.endswith(lost):
            self.server.lose_answer_of = None
            raise Refused(503, "backendError")
        self.answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def answer(
        self,
        data: bytes,
        status: int = 200,
        generation: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Python in another process, which finds the server too."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
