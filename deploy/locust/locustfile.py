"""People who chat, for Locust: each asks, reads the answer as it streams, thinks a while, and asks again.

    locust -f locustfile.py --headless --users 64 --spawn-rate 8 --run-time 2m --host http://localhost:8000

Beside Locust's own line for the whole request there are lines of type LLM: the time to the first token, and the mean
gap between the tokens after it. Their "size in bytes" is the answer's tokens, as Locust has no column for those.
An answer that breaks the protocol of streams is a failure: an error event, no finish reason, no [DONE].

    LLM_MODEL         served name; nothing = the first at /v1/models
    LLM_API_KEY       key, if the server wants one
    LLM_MAX_TOKENS    of an answer, 64
    LLM_THINK         mean seconds between an answer and the next question, 1
    LLM_TURNS         questions of a conversation, which carries all that was said before, 3
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from locust import HttpUser, task
from locust.exception import StopUser

MODEL = os.environ.get("LLM_MODEL")
API_KEY = os.environ.get("LLM_API_KEY")
MAX_TOKENS = int(os.environ.get("LLM_MAX_TOKENS", "64"))
THINK = float(os.environ.get("LLM_THINK", "1"))
TURNS = int(os.environ.get("LLM_TURNS", "3"))

PATH = "/v1/chat/completions"
QUESTIONS = (
    "Return the largest of two numbers",
    "Read a file and count its lines",
    "Check whether a path is absolute",
    "Join a list of words with commas",
    "Parse a date and say which day of the week it was",
)


class Reader(HttpUser):
    """One person at a time: the next request leaves when the last answer was read."""

    def wait_time(self) -> float:
        return random.expovariate(1 / THINK) if THINK > 0 else 0.0

    def on_start(self) -> None:
        self.headers = {"Authorization": f"Bearer {API_KEY}"} if API_KEY else {}
        self.said: list[dict[str, str]] = []
        if MODEL is not None:
            self.model = MODEL
            return
        with self.client.get("/v1/models", headers=self.headers, catch_response=True) as response:
            try:
                self.model = response.json()["data"][0]["id"]
            except (ValueError, LookupError, TypeError):
                response.failure(f"/v1/models names no model: set LLM_MODEL (HTTP {response.status_code})")
                raise StopUser from None

    @task
    def ask(self) -> None:
        if len(self.said) >= 2 * TURNS:
            self.said = []
        self.said.append({"role": "user", "content": random.choice(QUESTIONS)})
        answer = self.stream()
        if answer is None:
            self.said = []  # a conversation without an answer is none
        else:
            self.said.append({"role": "assistant", "content": answer})

    def stream(self) -> str | None:
        """The answer's text, None if it failed; what was seen on the way goes to Locust's statistics."""
        body = {
            "model": self.model,
            "messages": self.said,
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent = time.perf_counter()
        with self.client.post(PATH, json=body, headers=self.headers, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}")
                return None
            seen = Seen()
            for line in response.iter_lines():
                if line.startswith(b"data: "):  # else an empty line, or a comment that keeps the connection open
                    seen.take(line.removeprefix(b"data: "))
            if (trouble := seen.trouble()) is not None:
                response.failure(trouble)
                return None
            response.request_meta["response_time"] = 1000 * (seen.last - sent)
            response.success()
        self.tell("time to first token", seen.first - sent, seen.tokens)
        if seen.tokens > 1:
            self.tell("time per further token", (seen.last - seen.first) / (seen.tokens - 1), seen.tokens)
        return "".join(seen.text)

    def tell(self, name: str, seconds: float, tokens: int) -> None:
        self.environment.events.request.fire(
            request_type="LLM",
            name=name,
            response_time=1000 * seconds,
            response_length=tokens,
            exception=None,
            context={},
        )


class Seen:
    """What came of one stream: its text, its tokens, when they came, and how it ended."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.first = self.last = time.perf_counter()
        self.tokens = 0
        self.finished = self.done = False
        self.error: str | None = None

    def take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event: dict[str, Any] = json.loads(data)
        if event.get("error"):
            self.error = str(event["error"].get("code") or event["error"].get("message"))
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            piece = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
            self.last = time.perf_counter()
            if piece and not self.text:
                self.first = self.last
            if piece:
                self.text.append(piece)
            self.finished = self.finished or choice.get("finish_reason") is not None

    def trouble(self) -> str | None:
        if self.error is not None:
            return f"the stream ended with an error: {self.error}"
        if not self.finished:
            return "the stream ended without a finish reason"
        return None if self.done else "the stream ended without [DONE]"
