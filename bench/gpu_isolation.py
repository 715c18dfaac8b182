"""Runs a section of the GPU check in processes of its own: a kernel that faults or hangs costs one row, not the run.

A CUDA fault leaves a process without a GPU, so a worker that meets one says so and ends; the next goes on after it.

    run_section ── section, context, done ──▶ work: items, each begun, run, reported ──▶ JSON lines ──▶ rows
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from .gpu_rows import Item, Row

MARK = "@gpu-check "  # before every message; whatever else a worker prints is not ours
# Loading torch, starting CUDA and compiling the kernels of one item take seconds; this long, it hangs.
ITEM_SECONDS = 90.0
# After these errors the device answers nothing any more.
FAULT = 3
FATAL = ("illegal memory access", "device-side assert", "misaligned address", "launch failure", "illegal instruction")


def is_fatal(text: str) -> bool:
    """Whether an error of this text has taken the device with it."""
    return any(words in text for words in FATAL)


@dataclass(slots=True)
class _Progress:
    """What the workers of a section have told so far."""

    section: str
    keys: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    current: str | None = None
    rows: list[Row] = field(default_factory=list)

    def take(self, message: dict[str, Any]) -> None:
        if "keys" in message:
            self.keys = message["keys"]
        elif "begin" in message:
            self.current = message["begin"]
        elif "rows" in message:
            self.rows += [Row(**row) for row in message["rows"]]
            self.close()

    def close(self) -> None:
        if self.current is not None:
            self.done.append(self.current)
        self.current = None

    def left(self) -> list[str]:
        return [key for key in self.keys if key not in self.done]


def run_section(
    command: Sequence[str], section: str, context: dict[str, Any], seconds: float, item_seconds: float = ITEM_SECONDS
) -> list[Row]:
    """Rows of all items of a section; `command` runs `work` on them, again and again until it is through.

    What was not reached within `seconds` becomes a "skipped" row, what crashed or hung a "failed" one.
    """
    deadline = time.monotonic() + seconds
    progress = _Progress(section)
    while (reason := _one_worker(command, context, progress, deadline, item_seconds)) is not None:
        if time.monotonic() >= deadline:
            note = f"the section's {seconds:.0f} s were over"
            progress.rows += [Row(section, key, "skipped", note=note) for key in progress.left() or ["everything"]]
            break
        progress.rows.append(Row(section, progress.current or "between items", "failed", note=reason))
        if progress.current is None:  # it would end there again
            break
        progress.close()
    return progress.rows


def run_shards(command: Sequence[str], section: str, context: dict[str, Any], seconds: float, shards: int) -> list[Row]:
    """As `run_section`, with the items dealt out to several processes at once; rows in order of their names."""
    contexts = [context | {"shard": [index, shards]} for index in range(shards)]
    with ThreadPoolExecutor(shards) as pool:
        parts = pool.map(lambda each: run_section(command, section, each, seconds), contexts)
        return sorted((row for part in parts for row in part), key=lambda row: row.name)


def shard_of(items: Sequence[Item], context: dict[str, Any]) -> list[Item]:
    """The worker's part of the items: all of them, unless `run_shards` says otherwise."""
    index, shards = context.get("shard", (0, 1))
    return list(items[index::shards])


def _one_worker(
    command: Sequence[str], context: dict[str, Any], progress: _Progress, deadline: float, item_seconds: float
) -> str | None:
    """Let one worker go on from `progress`. None: it came to the end; else why it did not."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    last_words: list[str] = []
    try:
        if process.stdin is not None:
            process.stdin.write(json.dumps({"section": progress.section, "context": context, "done": progress.done}))
            process.stdin.close()
        silent_since = time.monotonic()
        while True:
            patience = min(silent_since + item_seconds, deadline) - time.monotonic()
            try:
                text = lines.get(timeout=max(0.0, patience))
            except queue.Empty:
                return f"no end after {time.monotonic() - silent_since:.0f} s"
            if text is None:
                return f"the process ended with {process.wait()}: {' | '.join(last_words[-3:])}"
            if not text.startswith(MARK):
                last_words += [text.strip()[-300:]] if text.strip() else []
                continue
            silent_since = time.monotonic()
            message = json.loads(text.removeprefix(MARK))
            if "end" in message:
                return None
            progress.take(message)
    except BrokenPipeError:
        return f"the process ended with {process.wait()} before it was told what to do"
    finally:
        process.kill()
        process.wait()


def _read_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    if process.stdout is not None:
        for text in process.stdout:
            lines.put(text)
    lines.put(None)


def work(make_items: Callable[[str, dict[str, Any]], Iterable[Item]]) -> int:
    """The worker: read what to do from standard input, do it, report each item as it is done.

    An item that raises becomes a "failed" row; one that takes the device with it ends the process.
    """
    order = json.load(sys.stdin)
    done = set(order["done"])
    items = list(make_items(order["section"], order["context"]))
    _say({"keys": [item.key for item in items]})
    for item in items:
        if item.key in done:
            continue
        _say({"begin": item.key})
        try:
            rows = item.run()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            if is_fatal(text):
                print(text, flush=True)
                os._exit(FAULT)  # to free what is on the device would raise again
            rows = [Row(order["section"], item.key, "failed", note=text)]
        _say({"rows": [asdict(row) for row in rows]})
    _say({"end": True})
    return 0


def _say(message: dict[str, Any]) -> None:
    print("\n" + MARK + json.dumps(message), flush=True)
