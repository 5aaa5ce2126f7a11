"""Names the packages that compile for TPUs and GPUs on a machine that has neither.

Run as a script it prints pip requirements that match the installed JAX. They go into a folder of
their own, which only the tests look into: beside JAX itself they would make every program on a CPU
look for accelerators and complain that there are none.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "compilers"


def requirements() -> list[str]:
    version = importlib.metadata.version("jax")
    of_extra = [r for r in importlib.metadata.requires("jax") or [] if 'extra == "tpu"' in r]
    libtpu = [re.sub(r"\s", "", r.partition(";")[0]) for r in of_extra if r.startswith("libtpu")]
    # Of CUDA only the assembler and its library of device functions.
    cuda = [f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}"]
    return [*libtpu, *cuda, "nvidia-cuda-nvcc==13.*", "nvidia-nvvm==13.*"]


def mesh_or_skip(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `make` gives, a mesh of chips that are not there; skips the test, and says which package
    is missing, on machines for which there is no compiler. Nothing else may fail this way."""
    import pytest  # Not there yet where this file is run as a script.

    try:
        return make(*args, **kwargs)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


if __name__ == "__main__":
    print("\n".join(requirements()))
