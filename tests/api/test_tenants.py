"""Named keys over HTTP: scopes, quotas, shares, and whose requests are whose."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.server.attempts import FREE
from quire.server.auth import POLICIES

COMPLETION = "/v1/completions"
STEP_COST = [16, 0.01, 0.016, 0.0, 0.0]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


def write(path: Path, **entries: dict[str, Any]) -> Path:
    """A keys file: name -> fields."""
    listed = [
        {"name": name, "sha256": hashlib.sha256(f"key-of-{name}".encode()).hexdigest(), **fields}
        for name, fields in entries.items()
    ]
    new = path.with_suffix(".new")
    new.write_text(json.dumps(listed))
    os.replace(new, path)
    return path


@pytest.fixture
def tenants(serve, tmp_path):
    """`async with tenants(alice={...}, bob={...}) as client:`; `client.keys_file` is the file."""
    path = tmp_path / "keys.json"

    def start(settings: dict[str, Any] | None = None, **entries: dict[str, Any]):
        return serve(api_keys_file=write(path, **entries), **(settings or {}))

    start.path = path
    return start


def complete(http: httpx.AsyncClient, who: str, **body: Any) -> asyncio.Future[httpx.Response]:
    return asyncio.ensure_future(http.post(COMPLETION, json={"prompt": "x", **body}, headers=bearer(who)))


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def stop_clock(http: httpx.AsyncClient) -> None:
    """No allowance comes back while the test runs, however slow the machine."""
    door = http.app.state.door  # type: ignore[attr-defined]
    now = time.monotonic()
    door.quotas._clock = door._attempts._clock = lambda: now


# whose request it is


async def test_a_names_request_has_its_tenant_weight_and_class(tenants, fake):
    fake.facts = {"scheduling_policy": "priority"}
    async with tenants(alice={"weight": 3, "priority": "interactive"}, bob={}, carol={"priority": "batch"}) as http:
        for name in ("alice", "bob", "carol"):
            assert (await complete(http, name)).status_code == 200
    assert [(r.tenant, r.weight, r.priority) for r in fake.added] == [
        ("alice", 3.0, -6),
        ("bob", 1.0, 0),
        ("carol", 1.0, 6),
    ]


async def test_a_class_is_the_most_urgent_that_a_request_may_be(tenants, fake):
    fake.facts = {"scheduling_policy": "priority"}
    async with tenants(alice={"priority": "batch"}) as http:
        refused = await complete(http, "alice", priority=5)
        assert code(refused) == (403, "priority_not_allowed")
        assert refused.json()["error"]["param"] == "priority"
        assert (await complete(http, "alice", priority=7)).status_code == 200
    assert [request.priority for request in fake.added] == [7]


async def test_a_class_means_nothing_to_other_policies(tenants, fake):
    async with tenants(alice={"priority": "batch"}) as http:
        assert (await complete(http, "alice")).status_code == 200
        assert code(await complete(http, "alice", priority=7)) == (400, "invalid_value")
    assert [request.priority for request in fake.added] == [0]


async def test_only_a_gateway_speaks_for_others(tenants, fake):
    async with tenants(alice={"weight": 2}, gate={"scopes": ["infer", "tenant"], "weight": 5}) as http:
        assert code(await complete(http, "alice", tenant="gate")) == (403, "tenant_not_allowed")
        assert code(await complete(http, "alice", tenant="made-up")) == (403, "tenant_not_allowed")
        assert (await complete(http, "alice", tenant="alice")).status_code == 200
        for tenant in ("alice", "made-up", None):
            assert (await complete(http, "gate", tenant=tenant)).status_code == 200
    own, spoken, made_up, gate = fake.added
    assert [(r.tenant, r.weight) for r in (spoken, made_up, gate)] == [("alice", 2.0), ("made-up", None), ("gate", 5.0)]
    assert own.cache_salt == spoken.cache_salt, "the cache is the tenant's"
    assert len({own.cache_salt, made_up.cache_salt, gate.cache_salt}) == 3


async def test_caches_are_a_tenants_own_and_survive_a_new_key(tenants, fake, eventually):
    async with tenants(alice={}, bob={}) as http:
        for who, salt in (("alice", None), ("bob", None), ("alice", "s"), ("bob", "s"), ("alice", None)):
            assert (await complete(http, who, cache_salt=salt)).status_code == 200
        fresh = hashlib.sha256(b"key-of-alice-2").hexdigest()
        write(tenants.path, alice={"sha256": fresh}, bob={})
        await eventually(lambda: http.app.state.door.ring.find("key-of-alice-2"), 60)
        assert (await complete(http, "alice-2")).status_code == 200
    salts = [request.cache_salt for request in fake.added]
    assert all(salts)
    assert len(set(salts[:4])) == 4
    assert salts[4] == salts[5] == salts[0]


@pytest.mark.parametrize("ids", [("a", "a"), ("a", "ab"), ("ab", "a")])
async def test_nobody_ends_the_requests_of_another(tenants, fake, eventually, ids):
    """CVE-2026-112266: the ids that callers choose are labels; the engine's are made here and told to nobody."""
    fake.gate.clear()
    async with tenants(alice={}, bob={}) as http:
        requests = [complete(http, who, request_id=label) for who, label in zip(("alice", "bob"), ids, strict=True)]
        await eventually(lambda: len(fake.added) == 2)
        by_tenant = {request.tenant: request.request_id for request in fake.added}
        assert len(set(by_tenant.values())) == 2
        requests[0].cancel()
        await eventually(lambda: fake.aborted)
        fake.gate.set()
        assert (await requests[1]).json()["id"] == f"cmpl-{ids[1]}"
    assert fake.aborted == [by_tenant["alice"]]


# what a key opens


async def test_scopes(tenants):
    scopes = {"infers": ["infer"], "scrapes": ["metrics"], "rules": ["admin"]}
    async with tenants(**{name: {"scopes": listed} for name, listed in scopes.items()}) as http:
        for path, policy in POLICIES.items():
            method = "POST" if policy.has_body else "GET"
            url = path.replace("{model:path}", "tiny").replace("{file}", "style.css")
            for name, listed in scopes.items():
                response = await http.request(method, url, headers=bearer(name), json={} if policy.has_body else None)
                if policy.scope is None or policy.scope in listed:
                    assert response.status_code not in (401, 403), (path, name)
                else:
                    assert code(response) == (403, "missing_scope"), (path, name)
                    assert policy.scope in response.json()["error"]["message"]
            assert (await http.request(method, url)).status_code in ((200,) if policy.scope is None else (401,))


async def test_metrics_stay_open_until_a_key_is_there_for_them(tenants, eventually):
    async with tenants(alice={}) as http:
        assert (await http.get("/metrics")).status_code == 200
        write(tenants.path, alice={}, prometheus={"scopes": ["metrics"]})
        await eventually(lambda: http.app.state.door.ring.guards("metrics"), 60)
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics", headers=bearer("alice"))).status_code == 403
        assert (await http.get("/metrics", headers=bearer("prometheus"))).status_code == 200


@pytest.mark.parametrize("path", [path for path, policy in POLICIES.items() if policy.probe])
async def test_probes_touch_no_account(tenants, path):
    """Another thread may answer them."""
    async with tenants(alice={"rpm": 5, "scopes": ["infer", "metrics"]}) as http:
        response = await http.get(path, headers=bearer("alice"))
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]
        assert http.app.state.door.quotas._accounts == {}


async def test_an_expired_key_is_told_so(tenants):
    expired, later = {"expires": "2020-01-01T00:00:00Z"}, {"expires": "2999-01-01T00:00:00Z"}
    async with tenants(alice=expired, bob=later) as http:
        response = await complete(http, "alice")
        assert code(response) == (401, "expired_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert (await complete(http, "bob")).status_code == 200


@pytest.mark.parametrize("headers", [{"x-api-key": "key-of-alice"}, {"X-Api-Key": " key-of-alice "}])
async def test_a_key_may_come_as_anthropics_clients_send_it(tenants, headers):
    async with tenants(alice={}) as http:
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.get("/v1/models", headers={"x-api-key": "wrong"})).status_code == 401
        both = {**headers, "Authorization": "Bearer wrong"}
        assert (await http.get("/v1/models", headers=both)).status_code == 401, "one is looked at, not any that fits"


async def test_both_kinds_of_keys_open(tenants):
    async with tenants({"api_key": ("plain",)}, alice={}) as http:
        assert (await complete(http, "alice")).status_code == 200
        assert (await http.get("/v1/models", headers={"Authorization": "Bearer plain"})).status_code == 200


async def test_wrong_keys_are_counted_by_address(tenants):
    async with tenants(alice={}, bob={}) as http:
        stop_clock(http)

        async def ask(address: str, who: str) -> httpx.Response:
            transport = httpx.ASGITransport(app=http.app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get("/v1/models", headers=bearer(who))

        assert (await ask("192.0.2.1", "alice")).status_code == 200
        for _ in range(FREE):
            assert (await ask("192.0.2.1", "nobody")).status_code == 401
        response = await ask("192.0.2.1", "nobody")
        assert code(response) == (429, "too_many_attempts")
        assert 1 <= int(response.headers["retry-after"]) <= 6
        assert (await ask("192.0.2.1", "bob")).status_code == 429, "a right guess looks like a wrong one"
        assert (await ask("192.0.2.1", "alice")).status_code == 200, "neighbours behind one router are not locked out"
        assert (await ask("192.0.2.2", "bob")).status_code == 200


# the file is read again


async def test_keys_come_and_go_while_streams_run(tenants, fake, eventually):
    fake.gate.clear()
    async with tenants(alice={"weight": 1}) as http:
        ring = http.app.state.door.ring
        stream = complete(http, "alice", stream=True)
        await eventually(lambda: len(fake.added) == 1)
        assert (await complete(http, "bob")).status_code == 401
        write(tenants.path, bob={"weight": 4})
        await eventually(lambda: "bob" in ring.named, 60)
        assert code(await complete(http, "alice")) == (401, "invalid_api_key")
        fake.gate.set()
        assert (await complete(http, "bob")).status_code == 200
        assert (await stream).text.endswith("data: [DONE]\n\n"), "what was let in finishes"
        tenants.path.write_text("- name: [")
        await asyncio.sleep(0)
        assert (await complete(http, "bob")).status_code == 200
    assert fake.added[-1].weight == 4.0


async def test_a_file_that_is_broken_at_the_start_is_an_error(serve, tmp_path, caplog):
    path = tmp_path / "keys.yaml"
    path.write_text("- name: alice\n  sha256: 7\n")
    with pytest.raises(Exception, match="line 2: `sha256`"):
        async with serve(api_keys_file=path):
            pass
    assert "line 2: `sha256`" in caplog.text


# quotas


async def test_requests_a_minute(tenants, fake):
    async with tenants(alice={"rpm": 3}, bob={}) as http:
        stop_clock(http)
        for left in (2, 1, 0):
            response = await complete(http, "alice")
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
            assert re.fullmatch(r"(1m)?\d+s", response.headers["x-ratelimit-reset-requests"])
        for path, body in ((COMPLETION, {"prompt": "x"}), ("/tokenize", {"prompt": "x"}), (COMPLETION, {"n": "bad"})):
            response = await http.post(path, json=body, headers=bearer("alice"))
            assert code(response) == (429, "rate_limit_exceeded")
            assert 1 <= int(response.headers["retry-after"]) <= 22
            assert response.headers["x-should-retry"] == "true"
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await http.get("/v1/models", headers=bearer("alice"))).status_code == 200, "these are not counted"
        for _ in range(5):
            response = await complete(http, "bob")
            assert response.status_code == 200
            assert "x-ratelimit-limit-requests" not in response.headers
        metrics = (await http.get("/metrics")).text
    assert 'quire_tenant_refusals_total{model_name="tiny",reason="rate_limit_exceeded",tenant="alice"} 3.0' in metrics
    assert 'quire_tenant_requests_total{model_name="tiny",tenant="bob"} 5.0' in metrics
    assert len(fake.added) == 8


async def test_tokens_a_minute_are_corrected_by_what_was_used(tenants, fake):
    fake.answer = lambda request, index: [65] * 5 + [256]
    async with tenants(alice={"tpm": 200}) as http:
        stop_clock(http)
        refused = await complete(http, "alice", max_tokens=300)
        assert code(refused) == (429, "rate_limit_exceeded")
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
        for _ in range(8):  # charged with 101 to 125 each, of which 26 are used: 20 of the prompt, 6 drawn
            response = await complete(http, "alice", prompt="x" * 20, max_tokens=100)
            if response.status_code == 429:
                break
            assert response.headers["x-ratelimit-limit-tokens"] == "200"
        assert code(response) == (429, "rate_limit_exceeded")
        assert len(fake.added) in (3, 4)
        left = int(response.headers["x-ratelimit-remaining-tokens"])
        assert left == 200 - 26 * len(fake.added)
        assert "this request counts for" in response.text
        metrics = (await http.get("/metrics")).text
    for kind, each in (("prompt", 20), ("generation", 6), ("cached", 0)):
        count = each * len(fake.added)
        assert f'quire_tenant_tokens_total{{kind="{kind}",model_name="tiny",tenant="alice"}} {float(count)}' in metrics


async def test_what_fails_before_it_runs_costs_no_tokens(tenants, fake):
    async with tenants(alice={"tpm": 600, "max_concurrent": 1}) as http:
        stop_clock(http)
        for body in ({"temperature": 9}, {"prompt": "x" * 600}, {"prompt": [10**6]}, {"max_tokens": -5}):
            for _ in range(4):
                response = await complete(http, "alice", **{"max_tokens": 300, **body})
                assert response.status_code == 400, body
                assert int(response.headers["x-ratelimit-remaining-tokens"]) == 600
    assert not fake.added


async def test_requests_at_once(tenants, fake, eventually):
    fake.gate.clear()
    async with tenants(alice={"max_concurrent": 2}, bob={}) as http:
        inside = [complete(http, "alice", stream=True, max_tokens=5), complete(http, "alice", n=3)]
        await eventually(lambda: len(fake.added) == 2)
        refused = await complete(http, "alice")
        assert code(refused) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        other = complete(http, "bob")
        await eventually(lambda: len(fake.added) == 3)
        inside[1].cancel()
        await eventually(lambda: fake.aborted)
        again = complete(http, "alice")
        await eventually(lambda: len(fake.added) == 4)
        fake.gate.set()
        assert [(await request).status_code for request in (inside[0], other, again)] == [200, 200, 200]
        assert not any(account.open for account in http.app.state.door.quotas._accounts.values())


async def test_a_full_house_gives_the_quota_back(tenants, fake):
    async with tenants({"max_queued_requests": 0}, alice={"tpm": 100, "max_concurrent": 1}) as http:
        stop_clock(http)
        slot = http.app.state.quire.admission.admit(4, tenant="alice")
        for _ in range(5):
            assert code(await complete(http, "alice", max_tokens=50)) == (503, "server_overloaded")
        slot.release()
        assert (await complete(http, "alice", max_tokens=50)).status_code == 200


async def test_the_queue_is_shared_by_the_weights_of_the_file(tenants, fake, eventually):
    fake.gate.clear()
    fake.facts = {"step_cost": STEP_COST}
    async with tenants({"max_queued_requests": 4}, alice={}, bob={"weight": 3}) as http:
        inside = [complete(http, "alice") for _ in range(8)]
        await eventually(lambda: len(fake.added) == 8)
        inside += [complete(http, "bob") for _ in range(6)]
        await eventually(lambda: len(fake.added) == 14)
        refused = await complete(http, "alice")
        assert code(refused) == (429, "tenant_overloaded")
        assert "its share is 2" in refused.json()["error"]["message"]
        fake.gate.set()
        assert {response.status_code for response in await asyncio.gather(*inside)} == {200}


# what is told


async def test_series_are_those_of_names_and_one_for_all_others(tenants, fake):
    entries = {"alice": {}, "gate": {"scopes": ["infer", "tenant"]}}
    async with tenants({"api_key": ("plain",)}, **entries) as http:
        assert (await complete(http, "alice")).status_code == 200
        for i in range(30):
            assert (await complete(http, "gate", tenant=f"stranger-{i}")).status_code == 200
        await http.post(COMPLETION, json={"prompt": "x"}, headers={"Authorization": "Bearer plain"})
        text = (await http.get("/metrics")).text
    assert set(re.findall(r'tenant="([^"]*)"', text)) == {"alice", "other"}
    assert 'quire_tenant_requests_total{model_name="tiny",tenant="other"} 31.0' in text


async def test_nothing_tells_a_key(tenants, caplog):
    caplog.set_level("DEBUG", logger="quire")
    async with tenants(alice={"rpm": 2}) as http:
        texts = []
        for _ in range(4):
            response = await complete(http, "alice", tenant="x")
            texts.append(response.text + str(response.headers))
        texts += [(await http.get(path, headers=bearer("alice"))).text for path in ("/metrics", "/version")]
        digest = hashlib.sha256(b"key-of-alice").hexdigest()
    for text in (*texts, caplog.text):
        assert "key-of-alice" not in text
        assert digest not in text
