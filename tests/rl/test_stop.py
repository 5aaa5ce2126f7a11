"""Requests to end: signals are heard while a run goes on, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from p2r_jax.rl import stop
from p2r_jax.rl.stop import SIGNALS, Interrupted, StopRequests

NAMES = [number.name for number in SIGNALS]


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def _as_before():
    """Whatever a test does, the next one gets the handlers that this one got."""
    before = handlers()
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


class TestARequest:
    def test_signals_are_those_of_preemption_ctrl_c_and_slurm(self):
        assert set(NAMES) == {"SIGTERM", "SIGINT", "SIGUSR1"}

    def test_nothing_happens_without_one(self):
        with StopRequests() as stops:
            stops.check()

    @pytest.mark.parametrize("name", NAMES)
    def test_is_raised_where_it_is_asked_for(self, name):
        """Not where the signal came: the update that runs then is finished."""
        with StopRequests() as stops:
            send(signal.Signals[name])
            reached = True
            with pytest.raises(Interrupted, match=f"^{name}$"):
                stops.check()
        assert reached

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
    def test_may_be_repeated(self, name):
        """Slurm sends its warning and then SIGTERM; some launchers send SIGTERM twice."""
        with StopRequests() as stops:
            send(signal.SIGTERM)
            send(signal.Signals[name])
            with pytest.raises(Interrupted):
                stops.check()

    def test_a_second_ctrl_c_ends_at_once(self):
        with StopRequests() as stops:
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            assert stops.received == "SIGINT"

    def test_of_another_process_counts(self, monkeypatch):
        monkeypatch.setattr(stop, "any_process", lambda flag: True)
        with pytest.raises(Interrupted, match="another process was asked to end"):
            StopRequests().check()


class TestHandlers:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_come_back_after_the_run(self, number):
        mine = lambda *_: None
        for own in SIGNALS:
            signal.signal(own, mine)
        with StopRequests():
            assert mine not in handlers()
            send(number)
        assert handlers() == [mine] * len(SIGNALS)

    def test_come_back_after_a_run_that_failed(self):
        before = handlers()

        def failing():
            with StopRequests():
                send(signal.SIGINT)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            failing()
        assert handlers() == before

    def test_a_process_that_is_not_training_ends_as_always(self):
        """SIGTERM before and after a run kills, as it does any program."""
        code = (
            "import os, signal\n"
            "from p2r_jax.rl.stop import StopRequests\n"
            "with StopRequests() as stops: os.kill(os.getpid(), signal.SIGTERM)\n"
            "print(stops.received, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\n"
            "print('still here', flush=True)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.returncode) == ("SIGTERM\n", -signal.SIGTERM), done.stderr
