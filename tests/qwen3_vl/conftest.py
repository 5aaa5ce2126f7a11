import pytest

from tests.qwen3_vl.reference import CONFIGS, Pair, make_pair


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("reference")
    return {name: make_pair(name, folder / name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def pair(request, pairs) -> Pair:
    return pairs[request.param]
