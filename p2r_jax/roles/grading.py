"""Grading by one process or by several, which share the work and all learn every grade."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from p2r_jax.parallel.multihost import gather
from p2r_jax.roles.answers import Answer, Query, Verifier, require_verifier, settle, unit


class Grader:
    """Grades answers, by a verifier where they are free text, and counts what it could not judge.

    With several processes all of them pass the same answers and get the same grades. Each distinct
    answer is graded once, by the process its turn falls to, so that one function, connection or
    number parser does not do the work of all. Only a collective verifier is called by every
    process, about all queries: it computes on the devices of all of them.
    """

    def __init__(self, verifier: Verifier | None = None):
        self.verifier = verifier
        """May be replaced at any time; None refuses free-form answers."""
        self.asked = 0
        """Queries so far, on all processes together; equal ones in one call count once."""
        self.failed = 0
        """Those among them that could not be judged."""

    def grade(self, answers: Sequence[Answer]) -> list[float | None]:
        """1.0 or 0.0 for each answer, or None if nothing could grade it.

        Must be called from the main thread if there are numbers among the answers.

        Raises ValueError and TypeError as `answers.grade` does.
        """
        require_verifier({answer.answer_form for answer in answers}, self.verifier)
        units = [unit(answer) for answer in answers]
        distinct = list(dict.fromkeys(units))
        if jax.process_count() == 1:
            grades = settle(distinct, self.verifier)
        elif self.verifier is not None and self.verifier.collective:
            grades = self._with_collective(distinct)
        else:
            grades = _shared(distinct, self.verifier)
        by_unit = dict(zip(distinct, grades, strict=True))
        queries = [u for u in distinct if isinstance(u, Query)]
        self.asked += len(queries)
        self.failed += sum(by_unit[query] is None for query in queries)
        return [by_unit[own] for own in units]

    def counts(self) -> dict[str, int]:
        """{"asked": ..., "failed": ...} since the last call; both start again from 0."""
        counts = {"asked": self.asked, "failed": self.failed}
        self.asked = self.failed = 0
        return counts

    def _with_collective(self, units: Sequence[Answer | Query]) -> list[float | None]:
        queries = [u for u in units if isinstance(u, Query)]
        others = [u for u in units if isinstance(u, Answer)]
        grades: dict[Answer | Query, float | None] = {}
        grades |= zip(queries, settle(queries, self.verifier), strict=True)
        grades |= zip(others, _shared(others, None), strict=True)
        return [grades[u] for u in units]


def _shared(units: Sequence[Answer | Query], verifier: Verifier | None) -> list[float | None]:
    """Grades of distinct units of which number i is settled by process i % processes."""
    if not units:
        return []
    count = jax.process_count()
    own = settle(units[jax.process_index() :: count], verifier)
    # Equal shapes everywhere: the shares differ by one where the processes do not divide the units.
    sent = np.full(-(-len(units) // count), np.nan)
    sent[: len(own)] = [np.nan if grade is None else grade for grade in own]
    # [processes, units of each]; number i is in row i % processes.
    received = gather(sent).T.reshape(-1)[: len(units)]
    return [None if np.isnan(grade) else float(grade) for grade in received]
