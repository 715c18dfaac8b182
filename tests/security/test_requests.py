"""What a body may hold that it should not: every field that counts or names tokens, every text, every size.

Each test ends with `victim`: the server, its engine and two streams beside the attack are as they were.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import string
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from security.house import House, check_refusal, check_tells_nothing

from quire.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
BODIES = {COMPLETIONS: CompletionBody, CHAT: ChatBody, "/tokenize": TokenizeBody, "/detokenize": DetokenizeBody}
VOCAB = 300  # the logits' width; the tokenizer knows 258 of them


def send(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    return client.post(path, json=BASE[path] | fields)


def send_text(client: httpx.Client, path: str, field: str, value: str) -> httpx.Response:
    """`value` is JSON text, which may be a number that Python would not write."""
    base = {name: v for name, v in BASE[path].items() if name != field}
    content = json.dumps(base)[:-1] + (", " if base else "") + f"{json.dumps(field)}: {value}}}"
    return client.post(path, content=content.encode(), headers={"Content-Type": "application/json"})


def fields_of(path: str, kind: str) -> list[str]:
    """Fields that take `kind`: "integer", or "ids" for lists of integers and objects keyed by them."""
    schema = BODIES[path].model_json_schema()
    found = []
    for name, field in schema["properties"].items():
        options = field.get("anyOf", [field])
        lists = [option for option in options if option.get("type") == "array"]
        if kind == "ids" and (name == "logit_bias" or any(o["items"].get("type") == "integer" for o in lists)):
            found.append(name)
        if kind == "integer" and any(option.get("type") == "integer" for option in options):
            found.append(name)
    return found


# ---------------------------------------------------------------- ids and numbers

WRONG_IDS = [
    *(str(n) for n in (-(2**63) - 1, -(2**63), -1, VOCAB, VOCAB + 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64)),
    *("1e308", "1.0", "1.5", "true", "null", '"1"', "[]", "{}", "9" * 5000, "-0.0"),
]


@pytest.mark.advisory(
    "CVE-2026-93840", "CVE-2026-93989", "CVE-2026-105922", "PYSEC-2026-2303", "CVE-2026-116173", "CVE-2026-21869"
)
def test_every_field_of_ids_is_bounded_by_the_width_of_the_logits(victim: House) -> None:
    found = {path: fields_of(path, "ids") for path in BODIES}
    assert {"stop_token_ids", "allowed_token_ids", "logit_bias"} <= set(found[COMPLETIONS]) & set(found[CHAT])
    found[COMPLETIONS].append("prompt")
    with victim.client() as client:
        for path, fields in found.items():
            for field, value in itertools.product(fields, WRONG_IDS):
                shapes = [f"[{value}]", f"[1, {value}]"]
                if field == "prompt":
                    shapes += [f"[[{value}]]", f"[[1], [1, {value}]]"]
                if field == "logit_bias":
                    shapes = [f"{{{json.dumps(value)}: 1}}", f'{{"1": 1, {json.dumps(value)}: -100}}']
                for shape in shapes:
                    if value == '"1"' and field == "prompt":
                        continue  # a list of texts is a prompt
                    if field == "logit_bias" and value == '"1"':
                        continue
                    check_refusal(send_text(client, path, field, shape), (path, field, value[:30]))
        # The widest that are right, beyond the tokenizer's own end too.
        for path, fields in found.items():
            for field, token_id in itertools.product(fields, (0, 257, 258, VOCAB - 1)):
                value: Any = {str(token_id): 1.0} if field == "logit_bias" else [token_id]
                assert send(client, path, **{field: value}).status_code == 200, (path, field, token_id)


WRONG_COUNTS = [
    *(str(n) for n in (-(2**63) - 1, -(2**63), -(2**31), -2, -1, 0, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)),
    *("1e308", "1.5", "-1.5", "true", "false", '"1"', '""', "[]", "[1]", "{}", "9" * 5000, "NaN", "Infinity"),
]


@pytest.mark.advisory("CVE-2026-21869", "CVE-2026-9540", "CVE-2025-48942", "CVE-2025-48943")
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_count_is_bounded(victim: House, path: str) -> None:
    """Some of these are right for some fields; none is an error of the server's."""
    fields = fields_of(path, "integer")
    assert {"n", "max_tokens", "min_tokens", "top_k", "seed", "prompt_logprobs"} <= set(fields)
    with victim.client() as client:
        for field, value in itertools.product(fields, WRONG_COUNTS):
            response = send_text(client, path, field, value)
            if response.status_code != 200:
                check_refusal(response, (field, value[:30]))


@pytest.mark.advisory("CVE-2024-8939", "CVE-2024-11040", "CVE-2026-34756")
def test_samples_beyond_the_bound_cost_nothing(victim: House) -> None:
    before = victim.rss()
    with victim.client() as client:
        for path, field in itertools.product((COMPLETIONS, CHAT), ("n", "best_of")):
            for value in ("129", str(2**31), str(2**63), "1e308", "9" * 5000, "-1", "0"):
                check_refusal(send_text(client, path, field, value), (path, field, value[:20]))
        check_refusal(send(client, COMPLETIONS, prompt=["x"] * 1024, n=128))
    assert victim.rss() - before < 32 << 20


@pytest.mark.advisory("CVE-2026-114051")
def test_fields_that_contradict_each_other(victim: House) -> None:
    with victim.client() as client:
        for path in (COMPLETIONS, CHAT):
            for fields in (
                {"min_tokens": 2, "max_tokens": 1},
                {"min_tokens": 10**9, "max_tokens": None},
                {"min_tokens": 511, "max_tokens": None},
                {"n": 2, "temperature": 0},
                {"n": 2, "best_of": 1},
                {"stream_options": {"include_usage": True}},
                {"stream": True, "prompt_logprobs": 1},
                {"slo": {"deadline_ms": -1}},
                {"timeout": 0},
            ):
                check_refusal(send(client, path, **fields), (path, fields))


@pytest.mark.advisory("CVE-2026-116180", "CVE-2026-44223", "CVE-2026-105922")
def test_the_dearest_requests_that_are_right(victim: House) -> None:
    dear = {
        "max_tokens": 8,
        "n": 8,
        "presence_penalty": 2,
        "frequency_penalty": -2,
        "repetition_penalty": 100,
        "logit_bias": {str(i): 100 for i in range(VOCAB)},
        "allowed_token_ids": list(range(VOCAB)),
        "bad_words": ["abc"] * 64,
        "stop_token_ids": list(range(128)),
        "min_tokens": 8,
        "stop": ["\x00", "é" * 4096, "a", "b" * 4096],
        "top_k": 2**31 - 1,
    }
    with victim.client() as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        for seed, answer in enumerate(pool.map(lambda seed: send(client, COMPLETIONS, **dear, seed=seed), range(4))):
            assert answer.status_code == 200, (seed, answer.text)
            assert len(answer.json()["choices"]) == 8
        prompt = [(7 * i) % VOCAB for i in range(500)]
        for _ in range(2):  # the second time out of the prefix cache
            answer = send(client, COMPLETIONS, prompt=prompt, prompt_logprobs=20, logprobs=20, echo=True)
            assert answer.status_code == 200
            assert len(answer.json()["choices"][0]["prompt_logprobs"]) == 500


# ---------------------------------------------------------------- texts


@pytest.mark.advisory("CVE-2024-8768")
def test_prompts_of_nothing(victim: House) -> None:
    with victim.client() as client:
        for prompt in ("", [], [[]], [""], ["a", ""], [[1], []], None, {}, 0, False, [None], [[None]], [[[1]]], [{}]):
            check_refusal(send(client, COMPLETIONS, prompt=prompt), prompt)
        check_refusal(client.post(COMPLETIONS, json={}))
        for messages in ([], None, "", {}, [None], [[]], [{}], [{"role": "user"}], [{"role": "user", "content": 1}]):
            check_refusal(send(client, CHAT, messages=messages), messages)
        for prompt in (" ", "\n\t ", "\u200b", "\x00"):  # these are texts
            assert send(client, COMPLETIONS, prompt=prompt).status_code == 200


@pytest.mark.advisory("CVE-2025-46560", "CVE-2025-49847", "CVE-2025-52566")
def test_long_texts_are_measured_before_they_are_read(victim: House) -> None:
    long = 1 << 20
    texts = ["a" * long, " " * long, "\x00" * long, "é" * (long // 2), "🙂" * (long // 4), "a " * (long // 2)]
    with victim.client() as client:
        for text in texts:
            check_refusal(send(client, COMPLETIONS, prompt=text), text[:3])
            check_refusal(send(client, CHAT, messages=[{"role": "user", "content": text}]), text[:3])
            check_refusal(send(client, "/tokenize", prompt=text), text[:3])
        check_refusal(send(client, COMPLETIONS, prompt=[1] * 400_000))
        check_refusal(send(client, CHAT, messages=[{"role": "user", "content": "x"}] * 20_000))
        check_refusal(
            send(client, CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 30_000}])
        )


@pytest.mark.advisory("CVE-2025-48887", "GHSA-j828-28rj-hfhp")
def test_stops_are_few_and_short(victim: House) -> None:
    with victim.client() as client:
        for path in (COMPLETIONS, CHAT):
            for stop in ("", [""], ["a", ""], ["a"] * 5, ["a"] * 100_000, "x" * 4097, "x" * 2**20, [1], [None], 7, {}):
                check_refusal(send(client, path, stop=stop), (path, str(stop)[:20]))
        for stop in ("(a+)+$", ["(" * 4096], ["a" * 4095 + "b"] * 4, "\ufeff", "\x00"):
            assert send(client, COMPLETIONS, stop=stop, max_tokens=20, ignore_eos=True).status_code == 200
        for words in ([""], [" "], ["x"] * 200, ["x" * 10_000], "x", [1], [[1]]):
            check_refusal(send(client, COMPLETIONS, bad_words=words), str(words)[:20])


def test_bytes_that_are_no_text(victim: House) -> None:
    bodies = [
        *(
            b'{"prompt": "' + bad + b'"}'
            for bad in (b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\xe2\x82")
        ),
        *(b'{"prompt": "%s"}' % bad for bad in (rb"\ud800", rb"\udfff\ud800", rb"\u12", b"\x00", b"\x1f", b"\n")),
        *(
            b"",
            b" ",
            b"{",
            b"}",
            b"[]",
            b"null",
            b"1",
            b'"x"',
            b"{}x",
            b"\xef\xbb\xbf{}",
            b'{"prompt" "x"}',
            b"{'a': 1}",
        ),
        *(b"[" * n for n in (1000, 500_000)),
        *(b'{"prompt": ' + b'{"a":' * n for n in (1000, 300_000)),
        b'{"prompt": "x", "n": NaN}',
        b'{"prompt": "x", "temperature": -Infinity}',
        '{"prompt": "x"}'.encode("utf-16"),
    ]
    with victim.client(**{"Content-Type": "application/json"}) as client:
        for path, body in itertools.product(BASE, bodies):
            check_refusal(client.post(path, content=body), (path, body[:40]))
        # An escape for a character that is one
        assert (
            client.post(COMPLETIONS, content=rb'{"prompt": "\ud83d\ude00\u0000", "max_tokens": 1}').status_code == 200
        )


@pytest.mark.advisory("CVE-2026-105756")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(salt=st.text(max_size=200), tenant=st.text(max_size=80))
def test_any_salt_is_taken_or_refused(house: House, salt: str, tenant: str) -> None:
    response = house.post(json=BASE[COMPLETIONS] | {"cache_salt": salt, "tenant": tenant})
    if response.status_code != 200:
        check_refusal(response, (salt, tenant))


# ---------------------------------------------------------------- fields that nobody may set, and none reads

INTERNAL = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "169.254.169.254", "remote_block_ids": [0]},
    "prompt_embeds": "AAAA",
    "mm_processor_kwargs": {"num_crops": 10**9},
    "logits_processors": ["os.system"],
    "vllm_xargs": {"x": 1},
    "stop_regex": "(a+)+$",
    "chat_template": "{{ 1 }}",
    "modalities": ["image"],
    "audio": {"voice": "x"},
}


@pytest.mark.advisory(
    *("CVE-2026-94622", "CVE-2026-94624", "CVE-2026-94626", "CVE-2026-94627", "CVE-2026-105754", "PYSEC-2026-4353"),
    *("CVE-2025-62164", "CVE-2026-56340", "CVE-2026-73557", "PYSEC-2026-2303", "CVE-2026-7304", "CVE-2026-111392"),
    *("CVE-2025-61620", "CVE-2025-30202"),
)
def test_what_only_the_server_may_decide_is_refused_by_name(victim: House) -> None:
    with victim.client() as client:
        for path, (field, value) in itertools.product((COMPLETIONS, CHAT), INTERNAL.items()):
            response = send(client, path, **{field: value})
            check_refusal(response, (path, field))
            assert response.json()["error"]["param"] == field
        # What nobody knows is let through, whatever its name.
        for name in (
            "__class__",
            "__proto__",
            "self",
            "constructor",
            "model_config",
            "\x00",
            "a" * 10_000,
            "mm_hashes",
        ):
            assert send(client, COMPLETIONS, **{name: {"x": [1]}}).status_code == 200, name[:20]


@pytest.mark.advisory(
    *("CVE-2025-6242", "CVE-2026-24779", "CVE-2026-25960", "CVE-2026-34753", "CVE-2026-33626", "CVE-2026-0599"),
    *("CVE-2026-34755", "CVE-2026-105758", "CVE-2026-105760", "CVE-2025-62372", "CVE-2026-22773", "CVE-2025-46722"),
)
def test_no_url_is_ever_fetched(victim: House) -> None:
    """There is nothing to fetch with: parts other than text are refused, and the server makes no connection."""
    urls = ["http://127.0.0.1:1/x", "http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AAAA"]
    urls += [r"http://ok\@evil/", "http://[::1]/", "http://0x7f.1/", "https://user@host/", "gopher://x"]
    kinds = ("image_url", "input_audio", "video_url", "file", "image", "audio_url")
    with victim.client() as client:
        for url, kind in itertools.product(urls, kinds):
            part = {"type": kind, kind: {"url": url}}
            check_refusal(send(client, CHAT, messages=[{"role": "user", "content": [part]}]), (kind, url))
        text = [{"role": "user", "content": "![x](http://127.0.0.1:1/x.png)"}]
        assert send(client, CHAT, messages=text).status_code == 200


@pytest.mark.advisory("CVE-2025-62426")
def test_template_variables_are_the_templates_own(victim: House) -> None:
    names = ["tokenize", "messages", "tools", "chat_template", "add_generation_prompt", "padding", "max_length"]
    names += ["conversation", "return_tensors", "bos_token", "__class__", "self", "loop", "x" * 10_000, ""]
    with victim.client() as client:
        for name, path in itertools.product(names, (CHAT, "/tokenize")):
            body = {"messages": BASE[CHAT]["messages"], "chat_template_kwargs": {name: True}}
            check_refusal(client.post(path, json=body), (path, name[:20]))
        for wrong in ([], "x", 1, True):
            check_refusal(send(client, CHAT, chat_template_kwargs=wrong), wrong)
        deep: Any = "x"
        for _ in range(200):
            deep = [deep]
        check_refusal(send(client, CHAT, chat_template_kwargs={"x": deep}))
        check_refusal(send(client, CHAT, messages=[{"role": "user", "content": "x", "extra": deep}]))


BOMBS = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a*)*b",
    r"((a{1,1000}){1,1000}){1,1000}",
    r"(?:(?:(?:a?){100}){100}){100}",
    r"[\s\S]{0,1000000}",
    r"(" * 5000,
    r"\p{L}{1000000}",
    r"(?P<x>a)(?P=x)",
    r"",
]
# How a bomb is put into a request: one row for each field that takes what is compiled.
CARRIERS = {
    "structured_outputs": lambda bomb: {"regex": bomb},
    "guided_regex": lambda bomb: bomb,
    "guided_json": lambda bomb: {"type": "string", "pattern": bomb},
    "guided_choice": lambda bomb: [bomb] * 1000,
    "guided_grammar": lambda bomb: f"start: /{bomb}/",
    "response_format": lambda bomb: {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "pattern": bomb}},
    },
}


@pytest.mark.advisory(
    *("CVE-2026-55574", "CVE-2025-29770", "CVE-2025-48942", "CVE-2025-48943", "CVE-2025-48944", "CVE-2026-105757")
)
@pytest.mark.parametrize("field", CARRIERS)
def test_what_is_compiled_from_a_request_ends_the_request_alone(victim: House, field: str) -> None:
    """Bombs are compiled within their bounds or refused; nobody beside them waits."""
    with victim.client() as client:
        for bomb in BOMBS:
            response = send(client, CHAT, **{field: CARRIERS[field](bomb)})
            if response.status_code != 200:
                check_refusal(response, (field, bomb[:20]))


# ---------------------------------------------------------------- names: of models, of requests


@pytest.mark.advisory(
    *("CVE-2024-37032", "CVE-2024-45436", "CVE-2024-39719", "CVE-2026-103663", "CVE-2026-7302"),
    *("CVE-2025-23316", "CVE-2025-23317", "CVE-2023-31036", "CVE-2026-24208", "CVE-2026-47627"),
)
def test_a_models_name_is_no_path(victim: House) -> None:
    names = [
        "../tiny",
        "/etc/passwd",
        "tiny/../tiny",
        "..\\tiny",
        "tiny\x00",
        "tiny ",
        "TINY",
        "%2e%2e",
        "$(id)",
        "tiny;id",
    ]
    names += ["https://host/tiny", "a" * 100_000, "\u2215etc", "sha256:../../x", "", "\x1b[2J"]
    with victim.client() as client:
        for name in names:
            for path in BASE:
                check_refusal(send(client, path, model=name), (path, name[:20]))
        for name in ("../tiny", "..%2f..%2fetc%2fpasswd", "%00", "tiny%0d%0aX: y", "a" * 5000):
            response = client.get(f"/v1/models/{name}")
            assert response.status_code in (400, 404), name
            check_tells_nothing(response, name)


@pytest.mark.advisory("CVE-2026-116176", "CVE-2026-112266", "CVE-2026-92972")
def test_a_requests_id_is_a_label_and_no_handle(victim: House) -> None:
    ids = ["a", "ab", "", "*", "a b", "x" * 65, "___prefill_addr_127.0.0.1:1", "http://127.0.0.1:1", "..", "\u00e9"]
    with victim.client() as client:
        for label in ids:
            response = client.post(COMPLETIONS, json=BASE[COMPLETIONS], headers={"X-Request-Id": label.encode()})
            said = response.headers["x-request-id"]
            fine = 0 < len(label) <= 64 and set(label) <= set(string.ascii_letters + string.digits + "._-")
            assert (said == label) == fine, label
        for label in ("", "a b", "x" * 65, "a\n", "é", 7):
            check_refusal(send(client, COMPLETIONS, request_id=label), label)

        def same(i: int) -> tuple[int, str]:
            body = BASE[COMPLETIONS] | {
                "prompt": f"prompt {i % 5}",
                "temperature": 0,
                "max_tokens": 12,
                "request_id": "same",
            }
            answer = client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "same"})
            return i % 5, answer.json()["choices"][0]["text"]

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(same, range(50)))
    assert len(set(answers)) == 5  # one text for each prompt, whoever else has the name
