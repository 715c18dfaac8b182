"""`python -m quire.deploy.ray model=bundled replicas=2 port=8000`: a fleet on this machine, until told to stop.

What is wrong with a setting is one line and exit code 2, before anything runs. A cluster that runs already has
`serve deploy` for the same application.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from .settings import SettingsError, read

PORT = 8000


def main(words: list[str]) -> None:
    given = dict(_pair(word) for word in words)
    port = _port(given.pop("port", str(PORT)))
    try:
        _, _, server = read(given)
    except SettingsError as error:
        _refuse(str(error))
    try:
        with socket.create_server((server.host, port)):
            pass
    except OSError as error:
        why = os.strerror(error.errno)
        _refuse(f"port is {port}: nothing can listen there on {server.host} ({why}); choose another")
    try:
        from ray import serve
    except ImportError:
        _refuse("Ray is not installed: pip install 'quire[ray]'")
    from .app import build

    serve.start(http_options={"host": server.host, "port": port})
    serve.run(build(given), name="quire", route_prefix="/", blocking=True)


def _pair(word: str) -> tuple[str, str]:
    name, sign, value = word.partition("=")
    if not sign:
        _refuse(f"{word!r} is no setting: write name=value, such as replicas=2")
    return name.lstrip("-"), value


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        _refuse(f"port is {text!r}: give a number from 1 to 65535")
    return int(text)


def _refuse(why: str) -> NoReturn:
    print(f"quire: {why}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
