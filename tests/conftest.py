"""Every test runs on CPU with eight virtual devices, so that meshes are real.

The settings precede the first import of JAX; pytest imports this file before any test module.
"""

import importlib.metadata
import os
import sys

import hypothesis
import pytest

from tests.compilers import FOLDER

# The same examples everywhere: what passes here passes where it is merged. New ones are drawn with
# `pytest --hypothesis-profile default`. Without a deadline: a busy machine may stall in any.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

_flags = ["--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Compiles the tests' small programs several times faster. XLA refuses to start on flags that
    # it does not know, hence the versions for which this one is known.
    _flags.append("--xla_cpu_use_fusion_emitters=false")
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([*(f for f in _flags if f.split("=")[0] not in _given), _given])
os.environ["JAX_PLATFORMS"] = "cpu"
if FOLDER.is_dir():
    sys.path.append(str(FOLDER))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose time would go into optimising programs that then run for milliseconds."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def whole_compilation():
    """Undoes `quick_compilation`, which stays on until the end of the module: for tests that look
    at what the compiler makes of a program."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """Folder for compiled programs, which all workers of this session share, and the processes
    that they start."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory):
    """Folder of the tiny model's tokenizer, config and processor files; no weights."""
    from tests.tiny import write_files

    return write_files(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_files):
    """Folder of the tiny model with random weights. Do not change it."""
    from tests.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", tiny_files)
