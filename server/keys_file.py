"""The keys file: a YAML or JSON list of entries, read at the start and again whenever it changes.

    - name: alice
      sha256: 2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90
      rpm: 600

A file that cannot be read names the line and the field. At the start it is an error; later it is a line in the log, and
the keys that were there stay.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import yaml

from ..engine.errors import QuireError
from ..engine.validation import MAX_WEIGHT
from . import logs
from .keys import OTHER_TENANTS, PRIORITY_CLASSES, TENANT_DIGITS, Key
from .logs import logger

MAX_KEYS = 1000  # each costs a comparison a request and a few series in /metrics
MAX_DIGESTS = 4  # of a name: the new key, the old one, and two that somebody forgot
MAX_BYTES = 1 << 20  # of the file: a thousand entries with every field take a quarter of it
LOOK_SECONDS = 1.0
_RESERVED = re.compile(rf"{OTHER_TENANTS}|[0-9a-f]{{{TENANT_DIGITS}}}")

Stamp = tuple[int, ...]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}$")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10**12)]


class KeysFileError(QuireError):
    """The keys file is not one; the message names the file, the line and the field, and no value."""


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Name
    sha256: Digest | Annotated[list[Digest], msgspec.Meta(min_length=1, max_length=MAX_DIGESTS)]
    scopes: Annotated[tuple[Literal["infer", "metrics", "admin", "tenant"], ...], msgspec.Meta(min_length=1)] = (
        "infer",
    )
    weight: Annotated[float, msgspec.Meta(gt=0, le=MAX_WEIGHT)] = 1.0
    rpm: Count | None = None
    tpm: Count | None = None
    max_concurrent: Count | None = None
    priority: Literal["interactive", "standard", "batch"] = "standard"
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None

    def key(self) -> Key:
        digests = [self.sha256] if isinstance(self.sha256, str) else self.sha256
        return Key(
            name=self.name,
            digests=tuple(bytes.fromhex(digest) for digest in digests),
            named=True,
            scopes=frozenset(self.scopes),
            weight=self.weight,
            rpm=self.rpm,
            tpm=self.tpm,
            max_concurrent=self.max_concurrent,
            priority=PRIORITY_CLASSES[self.priority],
            **({} if self.expires is None else {"expires": self.expires.timestamp()}),
        )


class _Loader(yaml.SafeLoader):
    """Leaves times as text, as JSON does; and a field that is there twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a field is there twice", node.start_mark)
        return mapping


def load_keys(path: Path) -> list[Key]:
    """Raises KeysFileError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KeysFileError(f"{path}: {error.strerror if isinstance(error, OSError) else 'it is not UTF-8'}") from None
    if len(raw) > MAX_BYTES:
        raise KeysFileError(f"{path}: it is larger than {MAX_BYTES} bytes")
    return parse_keys(text, str(path))


def parse_keys(text: str, path: str) -> list[Key]:
    """`path` is for the messages. Raises KeysFileError."""
    if text.lstrip()[:1] in ("[", "{"):
        text = text.replace("\t", " ")  # JSON may be indented with tabs, YAML may not; neither has them in a text
    node = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
        entries = msgspec.convert(content or [], list[_Entry])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise KeysFileError(f"{path}, line {mark.line + 1 if mark else 1}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if not isinstance(error, msgspec.ValidationError):
            raise KeysFileError(f"{path}: it is neither YAML nor JSON") from None
        what, _, place = str(error).partition(" - at `$")
        raise _error(path, node, place.rstrip("`"), what) from None
    if not entries:
        raise KeysFileError(f"{path}: it holds no key; `quire keys NAME` makes an entry")
    if len(entries) > MAX_KEYS:
        raise KeysFileError(f"{path}: it holds {len(entries)} keys; at most {MAX_KEYS} are taken")
    keys = [entry.key() for entry in entries]
    _check_together(path, node, keys)
    return keys


def _check_together(path: str, node: Any, keys: list[Key]) -> None:
    names: set[str] = set()
    digests: set[bytes] = set()
    for i, key in enumerate(keys):
        if _RESERVED.fullmatch(key.name):
            raise _error(path, node, f"[{i}].name", f"`{key.name}` is kept for keys without a name; choose another")
        if key.name in names:
            raise _error(path, node, f"[{i}].name", f"`{key.name}` has an entry already; one may list several digests")
        if not digests.isdisjoint(key.digests):
            raise _error(path, node, f"[{i}].sha256", "another entry has the same digest")
        names.add(key.name)
        digests.update(key.digests)


def _error(path: str, node: Any, place: str, what: str) -> KeysFileError:
    """`place` as msgspec spells it: "[2].rpm"."""
    field = ""
    for step in re.findall(r"\[(\d+)\]|\.(\w+)", place):
        index, name = step
        if index and isinstance(node, yaml.SequenceNode):
            node = node.value[int(index)]
        elif isinstance(node, yaml.MappingNode):
            field = name
            node = next((value for key, value in node.value if key.value == name), node)
    line = node.start_mark.line + 1 if node is not None else 1
    return KeysFileError(f"{path}, line {line}: {f'`{field}`: ' if field else ''}{what[:1].lower()}{what[1:]}")


async def follow(path: Path, seen: Stamp, use: Callable[[list[Key]], None], interval: float = LOOK_SECONDS) -> None:
    """Hand the keys to `use` whenever the file has changed, for as long as the server runs.

    `seen`: the file as it was when its keys were read at the start. A change counts once it has lasted for an interval:
    a file that is being written may be read as one with fewer keys.
    """
    before = seen
    while True:
        await asyncio.sleep(interval)
        stamp = await asyncio.to_thread(stamp_of, path)
        if stamp != seen and stamp == before:
            seen = stamp
            try:
                keys = await asyncio.to_thread(load_keys, path)
                use(keys)
                logger.info("keys read again: %d from %s", len(keys), path)
            except KeysFileError as error:
                logger.error("the keys stay as they were: %s", error)
            except Exception as error:  # the next change may be taken, and other chores run beside this one
                logger.error("the keys were not taken: %s", logs.where(error))
        before = stamp


def stamp_of(path: Path) -> Stamp:
    """Differs when the file does: another one in its place, another size or a later write. () = there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
