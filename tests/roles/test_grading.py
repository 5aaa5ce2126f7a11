"""Grading shared among processes: the same grades for all of them, each worked out once."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r_jax.roles import answers as rules
from p2r_jax.roles import grading
from p2r_jax.roles.answers import Answer, grade
from p2r_jax.roles.grading import Grader


class Script:
    """Judges by the response alone: r(ight), w(rong), anything else is a failure."""

    def __init__(self, collective=False):
        self.collective = collective
        self.calls = []

    def __call__(self, queries):
        self.calls.append([query.response for query in queries])
        return [{"r": True, "w": False}.get(query.response[:1]) for query in queries]


class Processes:
    """Several processes, one thread each; `gather` is a barrier, as it is between real ones."""

    def __init__(self, count):
        self.count = count
        self.local = threading.local()
        self.barrier = threading.Barrier(count, timeout=20)
        self.sent = [None] * count
        self.exchanges = 0

    def gather(self, values):
        self.sent[self.local.index] = np.array(values)
        self.barrier.wait()
        assert len({(sent.shape, sent.dtype) for sent in self.sent}) == 1, "shapes must agree"
        together = np.stack(self.sent)
        if self.barrier.wait() == 0:
            self.exchanges += 1
        return together

    def run(self, make):
        """make(index) -> what that process does; returns what each returned."""
        results, errors = [None] * self.count, []

        def process(index):
            self.local.index = index
            try:
                results[index] = make(index)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: self.count)
            patch.setattr(jax, "process_index", lambda: self.local.index)
            patch.setattr(grading, "gather", self.gather)
            threads = [threading.Thread(target=process, args=(i,)) for i in range(self.count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.fixture(autouse=True)
def _numbers_in_threads(monkeypatch):
    """math-verify insists on the main thread, and here a process is a thread."""

    def equal(response, truth, *, require_tag=False):
        numbers_graded.append(response)
        return None if truth == "?" else float(response == truth)

    numbers_graded.clear()
    monkeypatch.setattr(rules, "number_reward", equal)


numbers_graded: list[str] = []

ANSWERS = st.lists(
    st.one_of(
        st.builds(Answer, st.sampled_from("ABC"), st.sampled_from("AB"), st.just("mca")),
        st.builds(Answer, st.sampled_from("123"), st.sampled_from("12?"), st.just("na")),
        st.builds(
            Answer,
            st.sampled_from(["r", "w", "x", "r2", "<answer>r</answer>", "<answer>x</answer>"]),
            st.just("truth"),
            st.just("free_form"),
            question=st.sampled_from(["", "which?"]),
            require_tag=st.booleans(),
        ),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.integers(1, 5), st.booleans())
def test_the_number_of_processes_changes_no_grade(answers, count, collective):
    alone = Script(collective)
    expected = grade(answers, alone)
    verifiers = [Script(collective) for _ in range(count)]
    graders = [Grader(verifier) for verifier in verifiers]
    results = Processes(count).run(lambda i: graders[i].grade(answers))
    assert results == [expected] * count

    asked = [verifier.calls for verifier in verifiers]
    if collective:
        assert asked == [alone.calls] * count
    else:
        # Each query went to exactly one of the processes, in one call.
        assert all(len(calls) <= 1 for calls in asked)
        together = sorted(r for calls in asked for call in calls for r in call)
        assert together == sorted(r for call in alone.calls for r in call)
    queries = sum(map(len, alone.calls))
    failed = sum(r[:1] == "x" for call in alone.calls for r in call)
    assert [g.counts() for g in graders] == [{"asked": queries, "failed": failed}] * count


@pytest.mark.parametrize("collective", [False, True])
def test_work_is_shared_evenly_and_exchanged_once(collective):
    """Seven free-form answers and five numbers on three processes."""
    answers = [Answer(f"r{i}", "truth", "free_form") for i in range(7)]
    answers += [Answer(str(i), str(i), "na") for i in range(5)]
    verifiers = [Script(collective) for _ in range(3)]
    processes = Processes(3)
    results = processes.run(lambda i: Grader(verifiers[i]).grade(answers))
    assert results == [[1.0] * 12] * 3
    assert processes.exchanges == 1
    assert sorted(numbers_graded) == ["0", "1", "2", "3", "4"]
    if collective:
        assert all(v.calls == [[f"r{i}" for i in range(7)]] for v in verifiers)
    else:
        assert [v.calls[0] for v in verifiers] == [["r0", "r3", "r6"], ["r1", "r4"], ["r2", "r5"]]


def test_more_processes_than_answers_leave_some_idle():
    verifiers = [Script() for _ in range(4)]
    answers = [Answer("w", "truth", "free_form")]
    assert Processes(4).run(lambda i: Grader(verifiers[i]).grade(answers)) == [[0.0]] * 4
    assert [v.calls for v in verifiers] == [[["w"]], [], [], []]


def test_nothing_to_grade_needs_no_exchange():
    processes = Processes(2)
    assert processes.run(lambda i: Grader().grade([])) == [[], []]
    assert processes.exchanges == 0


def test_equal_answers_are_worked_out_once():
    """Also those whose queries alone are equal: the verifier might judge them differently."""
    verifiers = [Script() for _ in range(2)]
    texts = ["<think>1</think><answer>r</answer>", "<answer>r</answer>", "r"]
    answers = [Answer(text, "truth", "free_form") for text in texts]
    answers += [Answer("7", "7", "na")] * 6
    results = Processes(2).run(lambda i: Grader(verifiers[i]).grade(answers))
    assert results == [[1.0] * 9] * 2
    assert [v.calls for v in verifiers] == [[["r"]], []]
    assert numbers_graded == ["7"]


def test_one_process_exchanges_nothing(monkeypatch):
    def refuse(values):
        raise AssertionError("gather")

    monkeypatch.setattr(grading, "gather", refuse)
    for collective in (False, True):
        verifier = Script(collective)
        answers = [Answer("r", "t", "free_form"), Answer("A", "A", "mca")]
        assert Grader(verifier).grade(answers) == [1.0, 1.0]
        assert verifier.calls == [["r"]]


def test_failures_are_counted_until_the_counts_are_read():
    grader = Grader(Script())
    grader.grade([Answer("x", "t", "free_form"), Answer("r", "t", "free_form")])
    grader.grade([Answer("x", "t", "free_form"), Answer("3", "?", "na")])
    assert (grader.asked, grader.failed) == (3, 2)
    assert grader.counts() == {"asked": 3, "failed": 2}
    assert (grader.asked, grader.failed) == (0, 0)
    assert grader.counts() == {"asked": 0, "failed": 0}


def test_every_process_refuses_what_none_could_grade():
    """A process that went on alone would wait for the others forever."""
    refusals = []

    def process(index):
        # The only free-form answer is not this process's turn.
        answers = [Answer("A", "A", "mca"), Answer("x", "t", "free_form")]
        with pytest.raises(ValueError, match="free_form"):
            Grader().grade(answers)
        refusals.append(index)

    Processes(2).run(process)
    assert sorted(refusals) == [0, 1]


def test_the_verifier_may_be_replaced():
    grader = Grader()
    grader.verifier = Script()
    assert grader.grade([Answer("r", "t", "free_form")]) == [1.0]
