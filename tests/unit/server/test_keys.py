"""The ring of keys, and the file that fills it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.server.keys import ADMIN, INFER, METRICS, SCOPES, TENANT, Key, KeyRing, digest_of
from quire.server.keys_file import KeysFileError, follow, load_keys, parse_keys, stamp_of

A, B = (hashlib.sha256(text).hexdigest() for text in (b"a-key", b"b-key"))
FULL = f"""\
# who may come in
- name: alice
  sha256: {A}
  weight: 2
  rpm: 60
  tpm: 1000
  max_concurrent: 3
  priority: interactive
  expires: 2027-01-01T01:00:00+01:00
  scopes: [infer, metrics, admin, tenant]
- name: bob.b-2_x
  sha256: [{B.upper()}, {"f" * 64}]
"""


def named(name: str, key: str, **fields: object) -> Key:
    return Key(name=name, digests=(digest_of(key),), named=True, scopes=frozenset({INFER}), **fields)  # type: ignore[arg-type]


# the ring


def test_each_key_is_found_and_nothing_else() -> None:
    ring = KeyRing(("plain", "second"), [named("alice", "a"), named("bob", "b")])
    for offered, name in (("a", "alice"), ("b", "bob"), ("plain", hashlib.sha256(b"plain").hexdigest()[:12])):
        key = ring.find(offered)
        assert key is not None
        assert key.name == name
    for wrong in ("", " ", "A", "a ", "plai", "plainn", "é", "\udc80", "\0", A, hashlib.sha256(b"plain").hexdigest()):
        assert ring.find(wrong) is None
    assert KeyRing(()).find("") is None


def test_every_digest_is_compared_wherever_the_match_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append(b)) or real(a, b))
    ring = KeyRing(("first", "middle", "last"))
    for offered in ("first", "last", "wrong"):
        compared.clear()
        ring.find(offered)
        assert len(compared) == 3


def test_a_key_expires_while_the_server_runs() -> None:
    now = [100.0]
    ring = KeyRing((), [named("alice", "a", expires=200.0)], lambda: now[0])
    key = ring.find("a")
    assert key is not None
    assert not ring.expired(key)
    now[0] = 200.0
    assert ring.expired(key)
    assert ring.find("a") is key, "it is told that it has expired, not that it is wrong"


def test_what_is_guarded() -> None:
    nothing, plain = KeyRing(()), KeyRing(("k",))
    scraper = Key(name="prometheus", digests=(b"x",), scopes=frozenset({METRICS}))
    filed = KeyRing((), [named("alice", "a"), scraper])
    assert [ring.guards(INFER) for ring in (nothing, plain, filed)] == [False, True, True]
    assert [ring.guards(ADMIN) for ring in (nothing, plain, filed)] == [False, True, True]
    assert [ring.guards(METRICS) for ring in (nothing, plain, filed)] == [False, False, True]


def test_a_plain_key_infers_and_no_more() -> None:
    key = KeyRing(("k",)).find("k")
    assert key is not None
    assert key.scopes == {INFER}


def test_new_keys_take_the_place_of_those_of_the_file_only() -> None:
    ring = KeyRing(("plain",), [named("alice", "a")])
    ring.replace([named("bob", "b")])
    assert ring.find("a") is None
    assert ring.find("b") is not None
    assert ring.find("plain") is not None
    assert set(ring.named) == {"bob"}
    assert len(ring.names) == 2


def test_salts_differ_by_tenant_and_by_what_the_client_adds() -> None:
    ring = KeyRing(("k",))
    pairs = [("a", ""), ("b", ""), ("a", "x"), ("b", "x"), ("", "x"), ("ax", ""), ('a","', ""), ("a", '","')]
    assert len({ring.cache_salt(*pair) for pair in pairs}) == len(pairs)
    assert ring.cache_salt("a", "x") == ring.cache_salt("a", "x")
    assert ring.cache_salt("", "") == "", "an open server shares its cache"
    assert KeyRing(("k",)).cache_salt("a", "") != ring.cache_salt("a", ""), "nobody can compute one"


# the file


def test_every_field_is_read() -> None:
    alice, bob = parse_keys(FULL, "keys.yaml")
    assert alice == Key(
        name="alice",
        digests=(bytes.fromhex(A),),
        named=True,
        scopes=SCOPES,
        weight=2.0,
        rpm=60,
        tpm=1000,
        max_concurrent=3,
        priority=-6,
        expires=1798761600.0,
    )
    assert bob.digests == (bytes.fromhex(B), b"\xff" * 32)
    assert (bob.weight, bob.rpm, bob.tpm, bob.max_concurrent, bob.priority) == (1.0, None, None, None, 0)
    assert bob.scopes == {INFER}
    assert TENANT not in bob.scopes


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_is_read_as_well(indent: int | str | None) -> None:
    entries = [{"name": "alice", "sha256": [A], "expires": "2027-01-01T00:00:00Z", "rpm": None}]
    (key,) = parse_keys(json.dumps(entries, indent=indent), "keys.json")
    assert (key.name, key.expires) == ("alice", 1798761600.0)


ALICE = f"- name: alice\n  sha256: {A}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("[]", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("keys: 3", "line 1: expected `array`"),
        ("\n- 3", "line 2: expected `object`"),
        ("- name: alice", "line 1: object missing required field `sha256`"),
        (ALICE + "  rmp: 3\n", "line 1: object contains unknown field `rmp`"),
        (ALICE + "  rpm: 0\n", "line 3: `rpm`: expected `int` >= 1"),
        (ALICE + "  rpm: 1.5\n", "line 3: `rpm`: expected `int"),
        (ALICE + "  rpm: true\n", "line 3: `rpm`: expected `int"),
        (ALICE + '  rpm: "60"\n', "line 3: `rpm`: expected `int"),
        (ALICE + "  tpm: -5\n", "line 3: `tpm`"),
        (ALICE + "  max_concurrent: 0\n", "line 3: `max_concurrent`"),
        (ALICE + "  weight: 0\n", "line 3: `weight`"),
        (ALICE + "  weight: .nan\n", "line 3: `weight`"),
        (ALICE + "  weight: .inf\n", "line 3: `weight`"),
        (ALICE + "  weight: 1000001\n", "line 3: `weight`"),
        (ALICE + "  priority: urgent\n", "line 3: `priority`"),
        (ALICE + "  priority: 3\n", "line 3: `priority`"),
        (ALICE + "  scopes: []\n", "line 3: `scopes`"),
        (ALICE + "  scopes: [infer, root]\n", "line 3: `scopes`"),
        (ALICE + "  scopes: infer\n", "line 3: `scopes`"),
        (ALICE + "  expires: 2027-01-01\n", "line 3: `expires`"),
        (ALICE + "  expires: 2027-01-01T00:00:00\n", "line 3: `expires`"),
        (ALICE + "  expires: soon\n", "line 3: `expires`"),
        (ALICE + "  name: bob\n", "line 1: a field is there twice"),
        (ALICE + f"- name: bob\n  sha256: {A.upper()}\n", "line 4: `sha256`: another entry has the same digest"),
        (ALICE + f"- name: alice\n  sha256: {B}\n", "line 3: `name`: `alice` has an entry already"),
        (f"- name: other\n  sha256: {A}", "line 1: `name`: `other` is kept"),
        (f"- name: 0123456789ab\n  sha256: {A}", "line 1: `name`: `0123456789ab` is kept"),
        (f"- name: 'a b'\n  sha256: {A}", "line 1: `name`"),
        (f"- name: {'x' * 65}\n  sha256: {A}", "line 1: `name`"),
        (f"- name: 7\n  sha256: {A}", "line 1: `name`"),
        ("- name: alice\n  sha256: []", "line 2: `sha256`"),
        (f"- name: alice\n  sha256: {[A] * 5}", "line 2: `sha256`"),
        ("- name: [", "line 1"),
        ("- name: a\n\tb: c", "line 2"),
        ("- &a [*a]", "line 1"),
        ("- !!python/object/apply:os.getcwd []", "line 1"),
        ("- {? [a] : b}", "line 1"),
        (ALICE + "---\n- 3", "line 3"),
        ("[" * 100_000, "neither YAML nor JSON"),
        ("\0", "neither YAML nor JSON"),
        ("".join(f"- {{name: n{i}, sha256: f{i:063x}}}\n" for i in range(1001)), "at most 1000"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, says: str) -> None:
    with pytest.raises(KeysFileError) as caught:
        parse_keys(text, "keys.yaml")
    assert str(caught.value).startswith("keys.yaml")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["- name: alice\n  sha256: sk-secret", "- {name: a, sha256: sk-secret", "sk-secret: ["]
)
def test_a_key_in_the_place_of_its_digest_is_not_repeated(text: str) -> None:
    with pytest.raises(KeysFileError) as caught:
        parse_keys(text, "keys.yaml")
    assert "sk-secret" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(KeysFileError, match="No such file"):
        load_keys(path)
    with pytest.raises(KeysFileError, match="directory"):
        load_keys(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KeysFileError, match="UTF-8"):
        load_keys(path)
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(KeysFileError, match="larger than"):
        load_keys(path)
    path.write_bytes(b"\xef\xbb\xbf" + FULL.encode())
    assert len(load_keys(path)) == 2


# reading it again


class Followed:
    """A file that is followed at a quick pace."""

    def __init__(self, path: Path, use: Callable[[list[Key]], None] | None = None) -> None:
        self.path = path
        self.used: list[list[str]] = []
        self.use = use or (lambda keys: self.used.append([key.name for key in keys]))

    async def __aenter__(self) -> Followed:
        self.task = asyncio.create_task(follow(self.path, stamp_of(self.path), self.use, interval=0.01))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()

    def put(self, text: str) -> None:
        """As editors and secret mounts do: another file in its place."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.path)

    async def until(self, names: list[list[str]]) -> None:
        async with asyncio.timeout(60):
            while self.used != names:
                await asyncio.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(ALICE)
    return path


async def test_a_change_is_read_and_no_change_is_not(path: Path) -> None:
    async with Followed(path) as file:
        await asyncio.sleep(0.1)
        assert file.used == []
        file.put(FULL)
        await file.until([["alice", "bob.b-2_x"]])
        await asyncio.sleep(0.1)
        path.write_text(ALICE)  # in place
        await file.until([["alice", "bob.b-2_x"], ["alice"]])


async def test_a_broken_file_keeps_the_keys_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Followed(path) as file:
        for broken in ("- name: [", "", ALICE + "  rpm: none\n"):
            caplog.clear()
            file.put(broken)
            async with asyncio.timeout(60):
                while "the keys stay as they were" not in caplog.text:
                    await asyncio.sleep(0.01)
        assert "line 3: `rpm`" in caplog.text
        assert len(caplog.records) == 1, "once for each state of the file"
        path.unlink()
        async with asyncio.timeout(60):
            while "No such file" not in caplog.text:
                await asyncio.sleep(0.01)
        assert file.used == []
        file.put(FULL)
        await file.until([["alice", "bob.b-2_x"]])


async def test_keys_that_cannot_be_taken_end_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    used: list[str] = []

    def use(keys: list[Key]) -> None:
        if len(keys) > 1:
            raise ZeroDivisionError("planned")
        used.append(keys[0].name)

    async with Followed(path, use) as file:
        file.put(FULL)
        async with asyncio.timeout(60):
            while "the keys were not taken: ZeroDivisionError" not in caplog.text:
                await asyncio.sleep(0.01)
        file.put(ALICE)
        async with asyncio.timeout(60):
            while not used:
                await asyncio.sleep(0.01)
    assert used == ["alice"]


async def test_a_file_that_is_being_written_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stamp differs at every look until the writer is done."""
    from quire.server import keys_file

    stamps = iter([(1,), (2,), (3,), (3,)])
    read = []
    monkeypatch.setattr(keys_file, "stamp_of", lambda path: next(stamps, (3,)))
    monkeypatch.setattr(keys_file, "load_keys", lambda path: read.append(next(stamps, None)) or [])
    task = asyncio.create_task(follow(path, (0,), lambda keys: None, interval=0.001))
    async with asyncio.timeout(60):
        while not read:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    task.cancel()
    assert read == [None], "once, after all the stamps"
