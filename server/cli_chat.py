"""`quire chat`: a conversation in the terminal, or one answer to what is piped in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import err, option, out

if TYPE_CHECKING:
    import httpx

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."

Message = dict[str, str]
Body = dict[str, Any]  # of a request, without its messages


def chat(
    base_url: Annotated[str, option("Server", "Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, option("Server", "Served name; nothing = the first that the server has.")] = None,
    api_key: Annotated[
        str | None,
        option(
            "Server", "Key, if the server wants one.", envvar=["QUIRE_API_KEY", "OPENAI_API_KEY"], show_default=False
        ),
    ] = None,
    system_prompt: Annotated[str, option("Conversation", "Said to the model before everything else.")] = "",
    max_tokens: Annotated[
        int | None, option("Conversation", "Length limit of an answer; nothing = the rest of the context.", min=1)
    ] = None,
    temperature: Annotated[
        float | None, option("Conversation", "0 = greedy; nothing = the model's own default.", min=0)
    ] = None,
) -> None:
    """Talk to a running server. With piped input: answer it once, to standard output, and exit."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    options: Body = {"max_tokens": max_tokens, "temperature": temperature}
    body: Body = {name: value for name, value in options.items() if value is not None}
    base_url = base_url.rstrip("/").removesuffix("/v1")
    start: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        with httpx.Client(base_url=base_url, headers=headers, timeout=httpx.Timeout(10, read=600)) as client:
            body["model"] = model or first_model(client)
            if is_interactive():
                _converse(client, body, start)
            else:
                _say(client, body, [*start, {"role": "user", "content": sys.stdin.read()}])
    except httpx.ConnectError:
        _fail(f"No server answers at {base_url}. Start one in another terminal:  quire serve")
    except (httpx.HTTPError, ChatError) as error:
        _fail(str(error) or type(error).__name__)


def is_interactive() -> bool:
    return sys.stdin.isatty()


class ChatError(Exception):
    """The server refused or broke off; the message is its own."""


def first_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    if response.status_code != 200:
        raise ChatError(_message(response))
    return str(response.json()["data"][0]["id"])


def stream_answer(client: httpx.Client, body: Body, messages: list[Message]) -> Iterator[str]:
    """Pieces of the assistant's answer as they come. Raises ChatError with the server's own words."""
    import json

    request = {**body, "messages": messages, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.status_code != 200:
            response.read()
            raise ChatError(_message(response))
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ChatError(str(event["error"].get("message")))
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    yield text


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def _say(client: httpx.Client, body: Body, messages: list[Message]) -> str:
    """Print an answer as it is written and return it; Ctrl-C ends it early, and the server is told by the hang-up."""
    pieces: list[str] = []
    try:
        for piece in stream_answer(client, body, messages):
            pieces.append(piece)
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    return "".join(pieces)


def _converse(client: httpx.Client, body: Body, start: list[Message]) -> None:
    import readline  # noqa: F401  line editing and history in input()

    out.print(f"[bold]{body['model']}[/] at {client.base_url}. {HELP}", style="dim")
    messages = list(start)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            out.print(HELP, style="dim")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _say(client, body, messages)})
            except ChatError as error:
                messages.pop()
                err.print(str(error), style="red", markup=False)


def _message(response: httpx.Response) -> str:
    try:
        return f"HTTP {response.status_code}: {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:300]}"


def _fail(text: str) -> None:
    err.print("[bold red]quire chat:[/] ", end="")
    err.print(text, markup=False)
    raise typer.Exit(1)
