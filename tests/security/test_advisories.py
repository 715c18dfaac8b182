"""SECURITY.md's table says what the tests are, and every advisory that could happen here has one."""

from __future__ import annotations

import pytest
from security import advisories


def test_the_table_is_the_one_that_the_tests_give() -> None:
    assert advisories.PAGE.read_text(encoding="utf-8") == advisories.page(), (
        "SECURITY.md is stale: python tests/security/advisories.py --write"
    )


def test_every_advisory_has_a_test_or_a_reason() -> None:
    marked = set().union(*advisories.all_tests().values())
    for row in advisories.known():
        for one in row["ids"]:
            assert one in marked or row.get("tests") or row.get("not_here"), one


def test_tests_that_are_named_exist_and_marks_are_known() -> None:
    tests = advisories.all_tests()
    ids = [one for row in advisories.known() for one in row["ids"]]
    assert len(ids) == len(set(ids))
    for row in advisories.known():
        for name in row.get("tests", []):
            assert name in tests, name
    for name, marked in tests.items():
        assert marked <= set(ids), name


def test_a_test_that_goes_makes_the_table_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = advisories.all_tests()
    gone = next(name for name, marked in tests.items() if marked)
    monkeypatch.setattr(advisories, "all_tests", lambda: {name: ids for name, ids in tests.items() if name != gone})
    assert advisories.page() != advisories.PAGE.read_text(encoding="utf-8")
