"""A bucket on this machine, for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2r_jax.paths import as_path
from tests.gcs_server import running


@pytest.fixture(scope="package")
def server():
    """One for all: gcsfs keeps its connections."""
    with running() as server:
        server.buckets |= {"bucket": {}, "private": {}}
        server.forbidden.add("private")
        yield server


@pytest.fixture
def folder(server, request) -> Path:
    """Of the test's own, with nothing in it."""
    return as_path(f"gs://bucket/{request.node.name}")
