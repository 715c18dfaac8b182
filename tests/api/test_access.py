"""Keys, the policy table, Host names, and what the open routes tell."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
from api.conftest import TEMPLATE
from fastapi import APIRouter

from quire.server import attempts, auth, keys
from quire.server.auth import POLICIES
from quire.server.keys import METRICS
from quire.server.routing import GuardedRoute

KEY = "canary-key-5f1d"
# Where the keys file has no key for /metrics.
OPEN = {"/health", "/ready", "/live", "/metrics", "/version", "/", "/page/{file}", "/steps"}


def routes_of(app):
    paths = {}
    for path, item in app.openapi()["paths"].items():
        paths[path] = {method.upper() for method in item}
    return paths


async def test_every_route_has_a_policy_and_every_policy_a_route(http):
    declared = {path.replace("{model:path}", "{model}") for path in POLICIES}
    assert set(routes_of(http.app)) == declared
    assert {path for path, policy in POLICIES.items() if policy.scope in (None, METRICS)} == OPEN


def test_a_route_without_a_policy_cannot_be_registered():
    router = APIRouter(route_class=GuardedRoute)
    with pytest.raises(KeyError):
        router.add_api_route("/admin", lambda: None)


async def test_without_the_key_only_the_open_routes_answer(serve):
    async with serve(api_key=(KEY, "second")) as http:
        for path, methods in routes_of(http.app).items():
            for method in methods:
                url = path.replace("{model}", "tiny").replace("{file}", "style.css")
                for header in (
                    None,
                    "",
                    "Bearer",
                    "Bearer ",
                    "Bearer wrong",
                    f"Basic {KEY}",
                    KEY,
                    f"Bearer {KEY}x",
                    "Bearer é",
                ):
                    headers = {} if header is None else {"Authorization": header.encode()}
                    response = await http.request(method, url, headers=headers, json={} if method == "POST" else None)
                    if path in OPEN:
                        assert response.status_code == 200
                    else:
                        assert response.status_code == 401, (path, header)
                        error = response.json()["error"]
                        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [KEY, "second"])
async def test_each_key_opens(serve, key):
    async with serve(api_key=(KEY, "second")) as http:
        for scheme in ("Bearer", "bearer"):
            response = await http.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
            assert response.status_code == 200


async def test_the_key_is_checked_before_the_body_is_read(serve):
    async with serve(api_key=(KEY,)) as http:
        response = await http.post("/v1/completions", content=b"{not json", headers={"content-type": "text/plain"})
        assert response.status_code == 401


async def test_prefixes_are_not_shared_between_keys(serve, fake):
    async with serve(api_key=(KEY, "second")) as http:
        for key, salt in ((KEY, None), (KEY, None), ("second", None), (KEY, "s"), ("second", "s")):
            headers = {"Authorization": f"Bearer {key}"}
            await http.post("/v1/completions", json={"prompt": "x", "cache_salt": salt}, headers=headers)
    salts = [request.cache_salt for request in fake.added]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4
    assert all(salts)


async def test_nothing_tells_the_key_or_the_prompt(serve, caplog):
    caplog.set_level("DEBUG", logger="quire")
    async with serve(api_key=(KEY,)) as http:
        headers = {"Authorization": f"Bearer {KEY}"}
        for body in (
            {"prompt": "canary-prompt"},
            {"prompt": "canary-prompt", "n": "bad"},
            {"prompt": ["canary-prompt", 1]},
        ):
            await http.post("/v1/completions?key=" + KEY, json=body, headers=headers)
        texts = [(await http.get(path, headers=headers)).text for path in ("/metrics", "/version", "/v1/models")]
    for text in (*texts, caplog.text):
        assert KEY not in text
        assert "canary-prompt" not in text


def test_keys_are_compared_in_constant_time_only():
    """No `==`, `in` or `!=` touches a key or a digest (CVE-2025-59425); only compare_digest does."""
    trees = {module: ast.walk(ast.parse(inspect.getsource(module))) for module in (auth, keys, attempts)}
    compared = {ast.unparse(node) for nodes in trees.values() for node in nodes if isinstance(node, ast.Compare)}
    assert compared == {
        "scheme.lower() == 'bearer'",
        "key is None",
        "wait > 0",
        "policy.scope is None",
        "policy.scope not in key.scopes",
        "scope == METRICS",
        "METRICS in key.scopes",
        "self._clock() >= key.expires",
        "caller is None",
        "name in caller.opened",  # the name of a key
        "(caller := self._caller(address)) is not None",
        "len(caller.opened) > KEYS_PER_ADDRESS",
        "len(self._callers) > ADDRESSES",
    }
    find = ast.parse(textwrap.dedent(inspect.getsource(keys.KeyRing.find)))
    calls = {ast.unparse(node) for node in ast.walk(find) if isinstance(node, ast.Call)}
    assert "hmac.compare_digest(digest, known)" in calls


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "a/b?", "", "127.0.0.1@evil"]
)
async def test_bound_to_loopback_other_host_names_are_refused(http, host):
    response = await http.get("/health", headers={"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"])
async def test_loopback_names_are_accepted(http, host):
    assert (await http.get("/health", headers={"Host": host})).status_code == 200


async def test_bound_elsewhere_any_host_or_the_listed_ones(serve):
    async with serve(host="0.0.0.0") as http:
        assert (await http.get("/health", headers={"Host": "any.example"})).status_code == 200
    async with serve(host="0.0.0.0", allowed_hosts=("Api.example",)) as http:
        assert (await http.get("/health", headers={"Host": "api.example:443"})).status_code == 200
        assert (await http.get("/health", headers={"Host": "any.example"})).status_code == 403


async def test_models_and_version(serve):
    async with serve(served_model_name=("gpt-x", "alias/with-slash")) as http:
        models = (await http.get("/v1/models")).json()
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["gpt-x", "alias/with-slash"]
        assert models["data"][0]["max_model_len"] == 512
        assert (await http.get("/v1/models/alias/with-slash")).json()["id"] == "alias/with-slash"
        for name, status in (("gpt-x", 200), ("alias/with-slash", 200), ("tiny", 404), (None, 200)):
            response = await http.post("/v1/completions", json={"prompt": "x", "model": name})
            assert response.status_code == status
        version = (await http.get("/version")).json()
        assert version["kernels"] == {"attention": "reference"}
        assert "/" not in str(version).replace("alias/", "")


async def test_tokenize_and_detokenize(http):
    answer = (await http.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True})).json()
    assert answer == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [72, 0xC3, 0xA9],
        "token_strs": ["H", "\ufffd", "\ufffd"],
    }
    chat = (await http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})).json()
    assert bytes(chat["tokens"]) == b"<user>Hi\n<assistant>"
    assert (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": "Hé"}
    for body in ({}, {"prompt": "x", "messages": []}, {"prompt": 1}, {"prompt": "x", "model": "nope"}):
        assert (await http.post("/tokenize", json=body)).status_code in (400, 404)


async def test_the_tokenizer_is_described_where_the_server_was_told_to(serve):
    async with serve() as http:
        refused = await http.get("/tokenizer_info")
    assert refused.status_code == 404
    assert "`--tokenizer-info`" in refused.json()["error"]["message"]
    async with serve(tokenizer_info=True, api_key=("secret",)) as guarded:
        assert (await guarded.get("/tokenizer_info")).status_code == 401
        shown = await guarded.get("/tokenizer_info", headers={"Authorization": "Bearer secret"})
        assert shown.json() == {"eos_token": "<eos>", "chat_template": TEMPLATE}
