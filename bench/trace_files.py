"""Recorded traffic, in the formats that it is published in: who asked when, and how much.

    Mooncake   .jsonl  timestamp [ms], input_length, output_length, hash_ids: names of the prompt's blocks of 512 tokens
    Azure      .csv    TIMESTAMP [date and time], ContextTokens, GeneratedTokens
    BurstGPT   .csv    Timestamp [s], Request tokens, Response tokens (0 = it had failed)
    our own    .jsonl  time [s], prompt_len, output_len and optionally tenant, session, priority; or in place of
                       the lengths what was really asked: prompt or messages, and max_tokens

The texts of the published ones are not public: prompts are made up, of these lengths, equal where the trace says so.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..scheduler.traces import TraceError, read_trace
from .dataset import Ask, ask_of

MOONCAKE_BLOCK = 512  # tokens

FORMS = (
    'write JSON lines {"time", "prompt_len", "output_len"} or {"time", "prompt", "max_tokens"}, or give a trace of '
    "Mooncake (.jsonl), Azure or BurstGPT (.csv)"
)


@dataclass(frozen=True, slots=True)
class Traced:
    """One request of a trace.

    time        seconds from its beginning
    prompt_len, output_len   tokens; prompt_len is 0 where `ask` says what was asked
    blocks      names of the parts of 512 tokens that the prompt is made of, as far as they are known
    session     turns of one session share their tokens as far as they go; -1 = shares with nobody
    fields      of the request's body: tenant, priority
    """

    time: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()
    session: int = -1
    fields: Mapping[str, Any] | None = None
    ask: Ask | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time, the first at 0; and how many of the file's are not among them, by why."""

    requests: list[Traced]
    left_out: dict[str, int]


def read_trace_file(path: Path) -> Trace:
    """Raises TraceError naming file, line and remedy."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"--trace {path} cannot be read: {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise TraceError(f"--trace {path} is empty: {FORMS}")
    rows = _read_json(path, lines, first) if first.lstrip().startswith("{") else _read_csv(path, lines)
    found = [row for row in rows if row.output_len > 0]
    if not found:
        raise TraceError(f"--trace {path} holds no request that was answered")
    left_out = {"without an answer in the trace": len(rows) - len(found)} if len(found) < len(rows) else {}
    found.sort(key=lambda row: row.time)
    start = found[0].time
    return Trace([_later(row, -start) for row in found], left_out)


def _later(row: Traced, seconds: float) -> Traced:
    return Traced(row.time + seconds, row.prompt_len, row.output_len, row.blocks, row.session, row.fields, row.ask)


# ---------------------------------------------------------------- JSON lines


def _read_json(path: Path, lines: list[str], first: str) -> list[Traced]:
    row = _json(first, f"--trace {path} line 1")
    if "input_length" in row:
        return [_mooncake(_json(line, where), where) for line, where in _numbered(path, lines)]
    if "prompt_len" in row:
        return [
            Traced(
                arrival.time,
                arrival.prompt_len,
                arrival.output_len,
                session=arrival.session,
                fields=_given(tenant=arrival.tenant or None, priority=arrival.priority or None),
            )
            for arrival in read_trace(path)
        ]
    return [_asked(_json(line, where), where) for line, where in _numbered(path, lines)]


def _numbered(path: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    return ((line, f"--trace {path} line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where} is not JSON ({error}): {FORMS}") from error
    if not isinstance(row, dict):
        raise TraceError(f"{where} is not an object: {FORMS}")
    return row


def _mooncake(row: dict[str, Any], where: str) -> Traced:
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise TraceError(f'{where}: "hash_ids" is {blocks!r}: give whole numbers')
    return Traced(
        _number(row, "timestamp", where) / 1000,
        _count(row, "input_length", where),
        _count(row, "output_length", where),
        tuple(blocks),
    )


def _asked(row: dict[str, Any], where: str) -> Traced:
    try:
        ask = ask_of(row, where)
    except ValueError as error:
        raise TraceError(f"{error}: {FORMS}") from error
    if ask is None or ask.output_len is None:
        raise TraceError(f'{where}: "max_tokens" is missing: {FORMS}')
    fields = _given(tenant=row.get("tenant"), priority=row.get("priority"))
    return Traced(_number(row, "time", where), 0, ask.output_len, fields=fields, ask=ask)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# ---------------------------------------------------------------- CSV


def _read_csv(path: Path, lines: list[str]) -> list[Traced]:
    table = csv.DictReader(lines)
    columns = {name.strip().lower(): name for name in table.fieldnames or ()}
    for time, prompt, output in (
        ("timestamp", "contexttokens", "generatedtokens"),
        ("timestamp", "request tokens", "response tokens"),
    ):
        if {time, prompt, output} <= columns.keys():
            names = columns[time], columns[prompt], columns[output]
            return [_cells(row, names, f"--trace {path} line {number}") for number, row in enumerate(table, 2)]
    raise TraceError(f"--trace {path} has the columns {', '.join(columns.values())}: {FORMS}")


def _cells(row: dict[str, Any], names: tuple[str, str, str], where: str) -> Traced:
    time, prompt, output = names
    return Traced(_when(row[time], time, where), _count(row, prompt, where), _count(row, output, where, least=0))


def _when(text: str, name: str, where: str) -> float:
    """Seconds, of a number of them or of a date and a time."""
    try:
        return float(text)
    except (TypeError, ValueError):
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        raise TraceError(f'{where}: "{name}" is {text!r}: give seconds, or 2023-11-16 18:17:03.97') from None


# ---------------------------------------------------------------- values


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise TraceError(f'{where}: "{name}" is {value!r}: give a number')
    return float(value)


def _count(row: Mapping[str, Any], name: str, where: str, least: int = 1) -> int:
    """A number of tokens. Cells of a table are text."""
    value = row.get(name)
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = None
    if type(count) is not int or count < least:
        raise TraceError(f'{where}: "{name}" is {value!r}: give a whole number of tokens, at least {least}')
    return count
