"""`quire keys NAME`: a new key, and its entry for the keys file."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from .cli_options import err

KEY_BYTES = 32  # as many random bits as its digest has


def keys(
    name: Annotated[str, typer.Argument(help="Whose key it is: the tenant that its requests are counted under.")],
) -> None:
    """Make an API key for a keys file: its entry goes to the output, the key itself to the terminal, once.

    quire keys alice >> keys.yaml. The entry holds the key's digest, which opens nothing. For fields beyond these (rpm,
    tpm, max_concurrent, weight, priority, expires, scopes) edit the file; a server that runs reads it again by itself.
    """
    from .keys import digest_of
    from .keys_file import KeysFileError, parse_keys

    key = "qk-" + secrets.token_urlsafe(KEY_BYTES)
    entry = f"- name: {name}\n  sha256: {digest_of(key).hex()}"
    try:
        parse_keys(entry, "the new entry")
    except KeysFileError as error:
        err.print(f"quire: {error}", markup=False)
        raise typer.Exit(2) from None
    err.print(f"The key of {name}, shown this once: {key}", markup=False)
    print(entry)
