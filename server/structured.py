"""What a request says of the form of its text, in any of the spellings that clients use, as one grammar.

response_format                                    OpenAI's: text, json_object, json_schema; structural_tag as elsewhere
structured_outputs                                 vLLM's: json, json_object, regex, choice, grammar, structural_tag
guided_json, guided_regex, guided_choice, ...      vLLM's before that
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..scheduler.params import Grammar
from . import errors

GUIDED = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
_CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
# Where another engine lets a request choose among its own implementations. There is one here.
_NO_EFFECT = ("disable_fallback", "disable_additional_properties", "backend")


def grammar_of(response_format: Any, structured_outputs: Any, guided: dict[str, Any]) -> tuple[Grammar, str] | None:
    """The grammar, and the field that asks for it; None where the text may be anything.

    guided: the fields of `GUIDED` that the request has. Raises 400 for what is no constraint, and for two of them.
    """
    found = [
        one
        for one in (_response_format(response_format), _structured(structured_outputs), _guided(guided))
        if one is not None
    ]
    if len(found) > 1:
        names = " and ".join(f"`{field}`" for _, field in found)
        raise errors.invalid(f"{names} both constrain the text; send one of them.", found[1][1])
    return found[0] if found else None


def _response_format(given: Any) -> tuple[Grammar, str] | None:
    if given is None:
        return None
    field = "response_format"
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind="json_object"), field
    if kind == "json_schema":
        described = given.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if schema is None:
            raise errors.invalid(
                "`response_format`: the 'json_schema' field must be provided, with a `schema` in it.",
                "response_format.json_schema",
            )
        return _json(schema, {}, f"{field}.json_schema.schema"), field
    if kind == "structural_tag":
        return _structural_tag(given, field), field
    raise errors.invalid(
        f"`response_format.type` must be text, json_object, json_schema or structural_tag; got {errors.shown(kind)}.",
        "response_format.type",
    )


def _guided(given: dict[str, Any]) -> tuple[Grammar, str] | None:
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if not given:
        return None
    found = _structured(
        {GUIDED[name]: value for name, value in given.items()}, spelled={v: k for k, v in GUIDED.items()}
    )
    return found and (found[0], next(name for name in given if GUIDED[name] in _CONSTRAINTS))


def _structured(given: Any, spelled: dict[str, str] | None = None) -> tuple[Grammar, str] | None:
    """spelled: the caller's names of the keys, where they are not keys of structured_outputs."""
    if given is None:
        return None

    def name(key: str) -> str:
        return spelled[key] if spelled else f"structured_outputs.{key}"

    if not isinstance(given, dict):
        raise errors.invalid("`structured_outputs` must be an object.", "structured_outputs")
    unknown = next((key for key in given if key not in (*_CONSTRAINTS, *_OPTIONS, *_NO_EFFECT)), None)
    if unknown is not None:
        param = f"structured_outputs.{errors.shown(unknown)}"
        raise errors.invalid(f"`{param}` is unknown; one of {', '.join(_CONSTRAINTS)} is expected.", param)
    asked = [key for key in _CONSTRAINTS if given.get(key) is not None and given[key] is not False]
    if len(asked) != 1:
        what = " and ".join(f"`{name(key)}`" for key in asked) or "nothing"
        raise errors.invalid(
            f"Exactly one constraint is needed, of {', '.join(_CONSTRAINTS)}; {what} was given.", "structured_outputs"
        )
    (key,) = asked
    value, param = given[key], name(key)
    if key == "json_object":
        if value is not True:
            raise errors.invalid(f"`{param}` must be true or false; got {errors.shown(value)}.", param)
        grammar = _json({"type": "object"}, given, param)
    elif key == "json":
        grammar = _json(value, given, param)
    elif key == "structural_tag":
        grammar = _structural_tag(value, param)
    elif key == "choice":
        if not isinstance(value, list) or not _are_texts(value):
            raise errors.invalid(f"`{param}` must be a list of texts, none of them empty.", param)
        grammar = Grammar(kind="choice", source=_written(value, param))
    else:
        if not isinstance(value, str) or not value:
            raise errors.invalid(f"`{param}` must be text, and not empty.", param)
        grammar = Grammar(kind="lark" if key == "grammar" else key, source=value)
    return grammar, param


def _json(schema: Any, options: dict[str, Any], param: str) -> Grammar:
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeEncodeError):
            raise errors.invalid(f"`{param}` is text, but not valid JSON.", param) from None
    if not isinstance(schema, dict):
        raise errors.invalid(f"`{param}` must be a JSON Schema object; got {errors.shown(schema)}.", param)
    pattern = options.get("whitespace_pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise errors.invalid("`whitespace_pattern` must be text.", "structured_outputs.whitespace_pattern")
    if options.get("disable_any_whitespace"):
        pattern = ""
    if pattern is not None:
        schema = {**schema, "x-guidance": {"whitespace_pattern": pattern}}
    return Grammar(kind="json_schema", source=_written(schema, param))


def _structural_tag(given: Any, param: str) -> Grammar:
    """As an object or as its JSON: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}."""
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except msgspec.DecodeError:
            raise errors.invalid(f"`{param}` is text, but not valid JSON.", param) from None
    fields: dict[str, Any] = given if isinstance(given, dict) else {}
    tags, triggers = fields.get("structures"), fields.get("triggers")
    if not isinstance(triggers, list) or not isinstance(tags, list) or not _are_texts(triggers) or not _are_tags(tags):
        raise errors.invalid(
            f"`{param}` must hold `triggers`, a list of texts, and `structures`, a list of objects with the texts "
            "`begin` and `end` and the object `schema`.",
            param,
        )
    for tag in tags:
        if not any(tag["begin"].startswith(trigger) for trigger in triggers):
            raise errors.invalid(f"`{param}`: {errors.shown(tag['begin'])} begins with none of the triggers.", param)
    kept = {"structures": [{key: tag[key] for key in ("begin", "schema", "end")} for tag in tags], "triggers": triggers}
    return Grammar(kind="structural_tag", source=_written(kept, param))


def _written(value: Any, param: str) -> str:
    """As JSON. Raises 400 for what is nested so deeply that only the decoder, higher up in the stack, could bear it."""
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise errors.invalid(f"`{param}` is nested too deeply.", param) from None


def _are_texts(given: list[Any]) -> bool:
    return bool(given) and all(isinstance(text, str) and text for text in given)


def _are_tags(given: list[Any]) -> bool:
    return bool(given) and all(
        isinstance(tag, dict)
        and isinstance(tag.get("begin"), str)
        and bool(tag["begin"])
        and isinstance(tag.get("end"), str)
        and isinstance(tag.get("schema"), dict)
        for tag in given
    )
