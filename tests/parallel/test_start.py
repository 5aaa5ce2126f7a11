"""When a process looks for others: what the environment of each kind of cluster shows."""

from __future__ import annotations

import jax
import pytest

from p2r_jax.config import DistributedConfig
from p2r_jax.parallel import multihost

VARIABLES = (
    "TPU_ML_PLATFORM",
    "JAX_PLATFORMS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "MEGASCALE_NUM_SLICES",
)


@pytest.fixture
def joined(monkeypatch):
    """Arguments of `jax.distributed.initialize`, call by call."""
    calls = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append(args))
    return calls


@pytest.mark.parametrize(
    "environment, looks",
    [
        ({}, False),
        ({"TPU_ML_PLATFORM": "JAX"}, True),  # a TPU VM: JAX sets it where it finds chips
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),  # GKE
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_what_the_environment_shows(monkeypatch, joined, environment, looks):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    multihost.start(DistributedConfig())
    assert joined == ([(None, None, None)] if looks else [])


def test_off_is_off_and_on_is_on(monkeypatch, joined):
    multihost.start(DistributedConfig(enabled="on"))
    monkeypatch.setenv("SLURM_NTASKS", "4")
    multihost.start(DistributedConfig(enabled="off"))
    assert joined == [(None, None, None)]


def test_settings_go_before_the_environment(joined):
    multihost.start(DistributedConfig(coordinator="a:1", processes=2, process=1))
    assert joined == [("a:1", 2, 1)]
