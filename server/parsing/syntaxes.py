"""How models mark their thinking and spell calls of tools: data, and how a chat template tells which it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .calls import Body, call_id, short_id
from .json_calls import SEPARATOR, bare_object, fenced, named, objects
from .python_calls import pythonic
from .xml_calls import FUNCTION, FUNCTION_END, function, tagged


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Calls as a model that keeps to its own syntax writes them; what tool_grammar.py makes grammars of.

    first call1 between call2 … last, where a call is before NAME middle ARGUMENTS after
    """

    before: str
    middle: str
    after: str
    first: str = ""
    between: str = ""
    last: str = ""
    arguments: str = "json"  # or "tags", "python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Syntax:
    """How calls look in the text of an answer.

    bodies    marks that open a call -> what reads on from there
    closes    marks that end a call, and are dropped there
    layout    marks that say nothing, and are dropped anywhere
    bare      (character, body): an answer that begins with it may be a call without any mark
    between   what may stand between one bare call and the next
    make_id   ids as the model's template takes them
    """

    name: str
    bodies: dict[str, Body]
    spelling: Spelling
    closes: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    bare: tuple[str, Body] | None = None
    between: str = ""
    make_id: Callable[[], str] = call_id

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.bodies, *self.closes, *self.layout)


@dataclass(frozen=True, slots=True)
class Tags:
    """How thinking is marked. always: it comes first even where nothing opens it."""

    name: str
    start: str
    end: str
    always: bool = False


_HERMES = Spelling(
    before='<tool_call>\n{"name": "', middle='", "arguments": ', after="}\n</tool_call>", between="\n"
)  # fmt: skip

SYNTAXES = {
    syntax.name: syntax
    for syntax in (
        Syntax(
            name="hermes",
            bodies={"<tool_call>": objects},
            closes=("</tool_call>",),
            spelling=_HERMES,
        ),
        Syntax(
            name="qwen3_coder",
            bodies={"<tool_call>": tagged, FUNCTION: function},
            closes=("</tool_call>",),
            spelling=Spelling(
                before=f"<tool_call>\n{FUNCTION}",
                middle=">\n",
                after=f"{FUNCTION_END}\n</tool_call>",
                between="\n",
                arguments="tags",
            ),
        ),
        Syntax(
            name="mistral",
            bodies={"[TOOL_CALLS]": named},
            spelling=Spelling(
                first="[TOOL_CALLS] [",
                before='{"name": "',
                middle='", "arguments": ',
                after="}",
                between=", ",
                last="]",
            ),
            make_id=short_id,
        ),
        Syntax(
            name="mistral_v11",
            bodies={"[TOOL_CALLS]": named},
            spelling=Spelling(before="[TOOL_CALLS]", middle="[ARGS]", after=""),
            make_id=short_id,
        ),
        Syntax(
            name="llama3_json",
            bodies={"<|python_tag|>": objects},
            bare=("{", bare_object),
            between=";",
            spelling=Spelling(before='{"name": "', middle='", "parameters": ', after="}", between="; "),
        ),
        Syntax(
            name="pythonic",
            bodies={"<|python_start|>": pythonic},
            layout=("<|python_end|>",),
            bare=("[", pythonic),
            spelling=Spelling(
                first="[", before="", middle="(", after=")", between=", ", last="]", arguments="python"
            ),
        ),
        Syntax(
            name="deepseek_v3",
            bodies={"<｜tool▁call▁begin｜>": fenced},
            closes=("<｜tool▁call▁end｜>",),
            layout=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            spelling=Spelling(
                first="<｜tool▁calls▁begin｜>",
                before=f"<｜tool▁call▁begin｜>function{SEPARATOR}",
                middle="\n```json\n",
                after="\n```<｜tool▁call▁end｜>",
                between="\n",
                last="<｜tool▁calls▁end｜>",
            ),
        ),
        Syntax(
            name="deepseek_v31",
            bodies={"<｜tool▁call▁begin｜>": fenced},
            closes=("<｜tool▁call▁end｜>",),
            layout=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            spelling=Spelling(
                first="<｜tool▁calls▁begin｜>",
                before="<｜tool▁call▁begin｜>",
                middle=SEPARATOR,
                after="<｜tool▁call▁end｜>",
                last="<｜tool▁calls▁end｜>",
            ),
        ),
    )
}  # fmt: skip
SYNTAX_ALIASES = {"qwen3_xml": "qwen3_coder"}

# (what its chat template holds, what it does not, the syntax); the first that fits
SIGNS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("<｜tool▁call▁begin｜>", "```json"), (), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), (), "deepseek_v31"),
    (("[TOOL_CALLS]", "[ARGS]"), (), "mistral_v11"),
    (("[TOOL_CALLS]",), (), "mistral"),
    (("<function=", "<parameter="), (), "qwen3_coder"),
    (("<tool_call>",), ("<arg_key>",), "hermes"),
    (("<|python_start|>",), (), "pythonic"),
    (("[func_name1(",), (), "pythonic"),
    (("<|python_tag|>",), (), "llama3_json"),
    (('{"name": function name, "parameters":',), (), "llama3_json"),
)

TAGS = {
    tags.name: tags
    for tags in (
        Tags("qwen3", "<think>", "</think>"),
        Tags("deepseek_r1", "<think>", "</think>", always=True),
        Tags("magistral", "[THINK]", "[/THINK]"),
        Tags("seed_oss", "<seed:think>", "</seed:think>"),
    )
}
TOOL_PARSERS = ("auto", *SYNTAXES, *SYNTAX_ALIASES, "none")
REASONING_PARSERS = ("auto", *TAGS, "none")


def syntax_of(option: str, template: str | None) -> Syntax | None:
    """By its name, or "auto": as the chat template writes calls; None where nothing is known."""
    if option != "auto":
        return SYNTAXES.get(SYNTAX_ALIASES.get(option, option))
    if template is None:
        return None
    for present, absent, name in SIGNS:
        if all(sign in template for sign in present) and not any(sign in template for sign in absent):
            return SYNTAXES[name]
    return None


def tags_of(option: str, template: str | None) -> Tags | None:
    """By its name, or "auto": those of which the chat template knows the end."""
    if option != "auto":
        return TAGS.get(option)
    return next((tags for tags in TAGS.values() if template is not None and tags.end in template), None)
