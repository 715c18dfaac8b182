"""One event is one line, whatever it carries."""

from __future__ import annotations

import io
import json
import logging

import pytest

from quire.engine.messages import StepStats
from quire.server import logs
from quire.server.throughput import throughput_line

NASTY = "a\nINFO forged\r\x1b[31m\x00\u2028\u202eb"


def logged(formatter: logging.Formatter, message: str, *args: object, error: BaseException | None = None) -> str:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    info = (type(error), error, error.__traceback__) if error else None
    handler.emit(logging.LogRecord("quire.server", logging.INFO, __file__, 1, message, args, info))
    return out.getvalue()


@pytest.mark.parametrize("formatter", [logs.PlainFormatter(), logs.JsonFormatter()])
@pytest.mark.parametrize("text", [NASTY, "x" * 2_000_000, "\n" * 9000])
def test_strangers_text_stays_inside_its_line(formatter, text):
    line = logged(formatter, "id=%s", text)
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert len(line) < 9 * logs.LINE_CHARS


def test_json_lines_parse():
    event = json.loads(logged(logs.JsonFormatter(), "hello %s", NASTY))
    assert set(event) == {"time", "level", "logger", "message"}
    assert event["level"] == "info"
    assert event["message"].startswith("hello a\\nINFO forged")


def test_errors_show_where_but_not_what():
    try:
        raise ValueError("secret prompt")
    except ValueError as error:
        line = logged(logs.PlainFormatter(), "failed", error=error)
    assert "ValueError at test_logs.py" in line
    assert "secret" not in line


def test_throughput_line_is_about_the_interval():
    last = StepStats(prompt_tokens_total=100, generated_tokens_total=50, prefix_query_tokens_total=10)
    now = StepStats(
        running=3,
        waiting=1,
        kv_blocks_used=25,
        kv_blocks_total=100,
        prompt_tokens_total=300,
        generated_tokens_total=150,
        prefix_query_tokens_total=30,
        prefix_hit_tokens_total=10,
        preemptions_total=2,
    )
    assert throughput_line(last, now, 10.0) == (
        "prompt 20.0 tok/s, generation 10.0 tok/s, running 3, waiting 1, preemptions 2, KV cache 25.0 %, "
        "prefix hits 50.0 %"
    )


def test_throughput_line_tells_what_guessing_gives_while_there_is_any():
    last = StepStats(draft_tokens_total=100, accepted_tokens_total=50, drafted_by_position=[20, 10])
    now = StepStats(draft_tokens_total=140, accepted_tokens_total=65, drafted_by_position=[30, 12])
    assert throughput_line(last, now, 10.0).endswith("prefix hits 0.0 %, acceptance length 2.50")
    assert throughput_line(StepStats(), now, 10.0).endswith("acceptance length 3.17")
    assert throughput_line(now, now, 10.0).endswith("prefix hits 0.0 %")
