"""The markup of the model at hand, found out once when the server starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...engine.chat import ChatTemplate
from ...engine.tokenizer import Tokenizer
from .syntaxes import SYNTAXES, Syntax, Tags, syntax_of, tags_of


@dataclass(frozen=True, slots=True)
class Markup:
    """How the model marks its thinking and spells calls; None where it does not, or nobody knows how.

    special_ids  those of the marks that are special tokens, which have no text for anybody but the parser
    end_ids      the tokens that end thinking
    start_ids    those that begin it
    """

    tags: Tags | None = None
    syntax: Syntax | None = None
    special_ids: dict[str, int] = field(default_factory=dict)
    start_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()


def markup_of(tool_parser: str, reasoning_parser: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> Markup:
    """By the options of those names. A template that reads no tools is told of them in the form of `hermes`."""
    if tool_parser == "auto" and template is not None and not template.reads_tools:
        syntax: Syntax | None = SYNTAXES["hermes"]
    else:
        syntax = syntax_of(tool_parser, template.tool_source if template else None)
    tags = tags_of(reasoning_parser, template.source if template else None)
    marks = {*(syntax.marks if syntax else ()), *((tags.start, tags.end) if tags else ())}
    special = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.special_ids}
    return Markup(
        tags=tags,
        syntax=syntax,
        special_ids={mark: special[mark] for mark in marks & special.keys()},
        start_ids=tuple(tokenizer.encode(tags.start, add_special_tokens=False)) if tags else (),
        end_ids=tuple(tokenizer.encode(tags.end, add_special_tokens=False)) if tags else (),
    )
