"""What several modules share: the model of a few thousand weights, and one whole training run."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def model():
    """Graph and weights. Do not change them; an update consumes what it is given."""
    from tests.small_model import make_model

    return make_model()


@pytest.fixture(scope="session")
def allowed():
    from tests.small_model import vocabulary

    return vocabulary().allowed


@pytest.fixture(scope="module")
def snapshot_log_probs(model, allowed, quick_compilation):
    """Of the batch's completions, under the model as it is."""
    from tests.rl.updates import make_batch, scores

    return scores(model, make_batch(), allowed)


@pytest.fixture(scope="module")
def first(model, allowed, snapshot_log_probs):
    """The first step of a phase: state (the gradient) and metrics."""
    from tests.rl.updates import make_batch, step

    return step(model, make_batch(reference_log_probs=snapshot_log_probs), allowed)


@pytest.fixture(scope="module")
def small_world(compiled_programs):
    """For modules that train: see `runs.small_world`."""
    from tests.rl import runs

    with runs.small_world(compiled_programs):
        yield


@pytest.fixture(scope="session")
def whole(compiled_programs, tmp_path_factory, tiny_checkpoint):
    """A run that went straight through. Do not change its folder."""
    from tests.rl import runs
    from tests.rl.tiny_run import make_config

    with runs.small_world(compiled_programs):
        return runs.Run(make_config(tmp_path_factory.mktemp("whole") / "run", tiny_checkpoint))
