"""The judge of all attack tests, judged: it finds every planted leak and disturbance, and nothing where nothing is."""

from __future__ import annotations

import copy

import pytest
from security.house import House, Victims

BODY = {"prompt": "x", "max_tokens": 1}


def test_ordinary_requests_disturb_nobody(victim: House) -> None:
    for _ in range(5):
        assert victim.post(json=BODY).status_code == 200


@pytest.mark.parametrize("what", ["task", "fd", "thread", "child", "object"])
def test_a_planted_leak_is_found(victims: Victims, what: str) -> None:
    kinds = {"task": "tasks", "fd": "server fds", "thread": "server threads", "child": "children", "object": "Mailbox"}
    with pytest.raises(AssertionError, match=f"left behind.*{kinds[what]}"), victims.undisturbed(patience=1) as house:
        assert house.post(json=BODY, headers={"X-Request-Id": f"plant-{what}"}).status_code == 200


@pytest.mark.parametrize(("field", "index"), [("text", 0), ("logprobs", 1), ("usage", 1)])
def test_a_changed_stream_is_found(victims: Victims, monkeypatch: pytest.MonkeyPatch, field: str, index: int) -> None:
    changed = copy.deepcopy(victims._alone)
    changed[index][field] = changed[index][field][:-1]
    monkeypatch.setattr(victims, "_alone", changed)
    with pytest.raises(AssertionError, match=f"victim {index} got another {field}"), victims.undisturbed():
        pass


def test_a_probe_that_takes_too_long_is_found(victims: Victims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("security.house.READY_SECONDS", 0.0)
    with pytest.raises(AssertionError, match="/ready took"), victims.undisturbed():
        pass
