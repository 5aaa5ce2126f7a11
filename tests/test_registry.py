"""`tests.registry` against a registry on this machine."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from tests.registry import Unreachable, WrongContent, npm_files, npm_registry

FILES = {"models/a.json": b"{}", "models/b.json": b"[1]", "other.js": b"x"}
WANTED = {name: hashlib.sha256(FILES[name]).hexdigest() for name in list(FILES)[:2]}


def tarball() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for name, content in FILES.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Serves @scope/name 1.0.0; the list of paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status = {"/@scope/name/-/name-1.0.0.tgz": 200, "/busy/-/busy-1.0.0.tgz": 503}
            self.send_response(status.get(self.path, 404))
            self.end_headers()
            self.wfile.write(tarball())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield asked
    server.shutdown()
    server.server_close()


def test_the_named_files_are_fetched_once_and_no_others(registry):
    for _ in range(2):
        folder = npm_files("@scope/name", "1.0.0", WANTED)
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert found == {name: FILES[name] for name in WANTED}
    assert registry == ["/@scope/name/-/name-1.0.0.tgz"]


def test_a_damaged_file_is_fetched_again(registry):
    file = npm_files("@scope/name", "1.0.0", WANTED) / "models/b.json"
    file.write_bytes(b"[")
    npm_files("@scope/name", "1.0.0", WANTED)
    assert file.read_bytes() == FILES["models/b.json"]
    assert len(registry) == 2


@pytest.mark.parametrize(
    "package, wanted, message",
    [
        ("@scope/name", {"other.js": "0" * 64}, "other.js has SHA-256 2d711642"),
        ("@scope/name", WANTED | {"none.js": "0" * 64}, "has no none.js"),
        ("@scope/none", WANTED, "404"),
    ],
)
def test_anything_but_the_right_content_is_a_failure(registry, package, wanted, message):
    with pytest.raises(WrongContent, match=message):
        npm_files(package, "1.0.0", wanted)


def test_a_registry_that_does_not_serve_is_unreachable(registry, monkeypatch):
    with pytest.raises(Unreachable, match="503"):
        npm_files("busy", "1.0.0", WANTED)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match="refused"):
        npm_files("@scope/name", "1.0.0", WANTED)


def test_the_variable_precedes_the_users_file_and_that_the_public_registry(monkeypatch, tmp_path):
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY", "NPM_CONFIG_USERCONFIG"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "npmrc"
    monkeypatch.setenv("npm_config_userconfig", str(file))
    assert npm_registry() == "https://registry.npmjs.org"
    file.write_text("//host/:key=value\n@scope:registry=https://no\nregistry = https://file/npm/\n")
    assert npm_registry() == "https://file/npm"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://variable/")
    assert npm_registry() == "https://variable"
