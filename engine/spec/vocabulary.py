"""Whether two models mean the same by a token id: without that, one cannot guess for the other."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from ..errors import EngineStartError


def check_same_tokenizer(target: Path, draft: Path) -> None:
    """Raises EngineStartError for folders whose tokenizers differ, with the first token that does."""
    files = [folder / "tokenizer.json" for folder in (target, draft)]
    for path in files:
        if not path.is_file():
            raise EngineStartError(f"{path} is missing; a draft model needs the tokenizer of its target")
    if files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = (_pieces(path) for path in files)
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise EngineStartError(
                f"the draft model {draft} has another tokenizer than {target}: token {token} is "
                f"{_shown(theirs, token)} there and {_shown(ours, token)} here; give a draft model of the same family"
            )


def _pieces(path: Path) -> dict[int, str]:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise EngineStartError(f"{path} is not a tokenizer this version can read: {error}") from None
    return {token: piece for piece, token in tokenizer.get_vocab(with_added_tokens=True).items()}


def _shown(pieces: dict[int, str], token: int) -> str:
    return repr(pieces[token]) if token in pieces else "none"
