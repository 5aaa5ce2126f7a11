"""What tests of verifiers share."""

from __future__ import annotations

from p2r_jax.roles.answers import Query


def query(response: str) -> Query:
    return Query("What is it?", "red mug", response)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "p2r_jax.roles.verifiers"]
