"""Which syntax a chat template writes, and that what it writes of calls is what the parser of that syntax reads.

The templates here are short ones in the manner of those that models of each family come with.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from unit.server.parsing.spelled import parser, read

from quire.engine.chat import ChatTemplate
from quire.server.parsing.markup import markup_of
from quire.server.parsing.syntaxes import SYNTAXES, TAGS, syntax_of, tags_of

HEAD = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
)


def template(call: str, before: str = "", after: str = "", head: str = HEAD) -> str:
    turns = TURNS.replace("{% for c in", before + "{% for c in").replace("CALL", call)
    return head + turns.replace("{% endfor %}{% endfor %}", "{% endfor %}" + after + "{% endfor %}")


TEMPLATES = {
    "hermes": template(
        "\n<tool_call>\n{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>"
    ),
    "qwen3_coder": template(
        "\n<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>"
    ),
    "mistral": template(
        "[TOOL_CALLS] [{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}]"
    ),
    "mistral_v11": template("[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"),
    "llama3_json": template(
        '{{ \'{"name": "\' + c.function.name + \'", "parameters": \' + (c.function.arguments | tojson) + "}" }}',
        head=HEAD + "Answer with <|python_tag|> or JSON.",
    ),
    "pythonic": template(
        "[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ ', ' if not loop.first }}"
        "{{ k }}={{ v | tojson }}{% endfor %})]",
        head=HEAD + "Write [func_name1(params_name1=params_value1), func_name2(params)]",
    ),
    "deepseek_v3": template(
        "<｜tool▁call▁begin｜>{{ c.type + '<｜tool▁sep｜>' + c.function.name }}\n```json\n"
        "{{ '' + c.function.arguments }}\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": template(
        "<｜tool▁call▁begin｜>{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather"}}
VALUES = {"city": 'Köln "am Rhein"', "days": 2, "parts": ["a", "b"]}


def test_every_syntax_has_a_template_here():
    assert set(TEMPLATES) == set(SYNTAXES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_writes_is_what_the_parser_reads(name):
    """Arguments may be given as text or as an object, and the template may want them as either."""
    syntax = syntax_of("auto", TEMPLATES[name])
    assert syntax is SYNTAXES[name]
    written = ChatTemplate(TEMPLATES[name], {})
    for arguments in (VALUES, json.dumps(VALUES)):
        call = {**CALL, "function": {**CALL["function"], "arguments": arguments}}
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        text = written.render(messages, tools=[{"type": "function", "function": {"name": "get_weather"}}])
        message = read(parser(syntax), [text.split("<|assistant|>")[1]])
        assert [(one.name, json.loads(one.arguments)) for one in message.calls] == [("get_weather", VALUES)]
        assert message.content == ""


def test_what_nobody_here_knows_is_nothing():
    assert syntax_of("auto", None) is None
    assert syntax_of("auto", "{{ messages }}") is None
    assert syntax_of("auto", "<tool_call>{{ name }}<arg_key>{{ key }}</arg_key>") is None
    assert syntax_of("none", TEMPLATES["hermes"]) is None
    assert syntax_of("qwen3_xml", None) is SYNTAXES["qwen3_coder"]


@pytest.mark.parametrize(
    ("option", "source", "name"),
    [
        ("auto", "{{ m.content.split('</think>')[-1] }}", "qwen3"),
        ("auto", "{{ '[THINK]' }}{{ '[/THINK]' }}", "magistral"),
        ("auto", "{{ '<seed:think>' }}{{ '</seed:think>' }}", "seed_oss"),
        ("auto", "{{ messages }}", None),
        ("auto", None, None),
        ("none", "</think>", None),
        ("deepseek_r1", None, "deepseek_r1"),
    ],
)
def test_tags_of_thinking(option, source, name):
    assert tags_of(option, source) is (TAGS[name] if name else None)


def test_a_template_that_reads_no_tools_is_answered_in_the_form_it_is_told_of():
    words = SimpleNamespace(special_ids=frozenset(), encode=lambda text, add_special_tokens: list(text.encode()))
    assert markup_of("auto", "auto", ChatTemplate("{{ messages }}", {}), words).syntax is SYNTAXES["hermes"]
    assert markup_of("none", "auto", ChatTemplate("{{ messages }}", {}), words).syntax is None
    assert markup_of("auto", "auto", ChatTemplate("{{ messages }}{{ tools }}", {}), words).syntax is None
    assert markup_of("auto", "auto", None, words).syntax is None
