"""Conversations against the well-known renderer, and templates that mean harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from quire.engine import template as template_module
from quire.engine.chat import ChatTemplate, load_chat_template, require_chat_template
from quire.engine.errors import EngineStartError, RequestError
from quire.engine.template import Template
from quire.engine.tokenizer import load_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
TALK = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  2 + 2? <é> "},
    {"role": "assistant", "content": "4 "},
]
# Tools, thinking, namespaces, loops with conditions: what published templates do.
RICH = """{%- if tools %}{{ '<tools>' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' ~ m.role) }}
    {%- endif %}
    {{- bos_token if loop.first else '' }}{{ '<' + m.role + '>' + (m.content | trim if m.content else '') }}
    {%- for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}
    {{- '|' ~ loop.index0 ~ (' last' if loop.index0 == ns.last else '') }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>
    {%- if enable_thinking is defined and not enable_thinking %}<no think>{% endif %}
{%- endif %}"""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def chat(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def reference(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        conversations=[messages], chat_template=source, bos_token="<s>", eos_token="</s>", **options
    )
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(generate: bool, tools: list[dict[str, Any]] | None) -> None:
    for messages in (HELLO, TALK):
        expected = reference(RICH, messages, add_generation_prompt=generate, tools=tools, enable_thinking=False)
        mine = chat(RICH).render(
            messages, tools=tools, add_generation_prompt=generate, variables={"enable_thinking": False}
        )
        assert mine == expected


@pytest.mark.parametrize("source", [RICH, "{% for m in messages %}[{{ m.content }}]{% endfor %}"])
def test_continues_the_final_message_as_transformers_does(source: str) -> None:
    mine = chat(source).render(TALK, add_generation_prompt=False, continue_final_message=True)
    assert mine == reference(source, TALK, continue_final_message=True)
    assert mine.rstrip().endswith("4")


def test_the_folders_template_and_tokens(byte_level_folder: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    rendered = require_chat_template(load_chat_template(tokenizer)).render(HELLO)
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(rendered, add_special_tokens=False)[0] == 1


def test_a_jinja_file_comes_before_the_settings(folder_with_template: Callable[[str | None], Path]) -> None:
    folder = folder_with_template("from settings")
    (folder / "chat_template.jinja").write_text("from file")
    template = load_chat_template(load_tokenizer(folder))
    assert require_chat_template(template).render(HELLO) == "from file"


def test_a_second_template_serves_requests_with_tools(folder_with_template: Callable[[str | None], Path]) -> None:
    folder = folder_with_template(None)
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": both}))
    template = require_chat_template(load_chat_template(load_tokenizer(folder)))
    assert (template.render(HELLO), template.render(HELLO, tools=TOOLS)) == ("plain", "with tools")


def test_no_template_is_a_clear_refusal(folder_with_template: Callable[[str | None], Path]) -> None:
    template = load_chat_template(load_tokenizer(folder_with_template(None)))
    with pytest.raises(RequestError, match="no chat template") as caught:
        require_chat_template(template)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "x" * (1 << 21)])
def test_a_template_that_cannot_be_compiled_stops_the_start(
    folder_with_template: Callable[[str | None], Path], source: str
) -> None:
    with pytest.raises(EngineStartError, match="chat template is not usable"):
        load_chat_template(load_tokenizer(folder_with_template(source)))


def test_parts_become_text_and_a_developer_speaks_as_system() -> None:
    template = chat("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "c", "name": None}]
    assert template.render(messages) == "system:a\nb;user:c;"
    knows = chat("{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{{ m.content }}{% endfor %}")
    assert knows.render(messages) == "Da\nbc"


def test_tool_calls_reach_the_template_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert 'f{"x": "é"}' in chat(RICH).render(messages)
    assert call["function"]["arguments"] == '{"x": "é"}'  # the caller's own message is left alone


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role .* not 'robot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role"),
        ([{"content": "x"}], r"messages\[0\].role"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\].text must be text"),
        ([{"role": "user", "content": ["x"]}], "text parts only"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": "x", "extra": object()}], "not a JSON value"),
        ([{"role": "user", "content": "x", 3: 4}], "keys"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "is not JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "name must be text"),
        ([{"role": "assistant", "tool_calls": "f"}], "list of objects"),
        (HELLO * 10_001, "at most 10000"),
    ],
)
def test_bad_messages_are_refused_by_name(messages: object, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        chat(RICH).render(messages)
    assert caught.value.param == "messages"


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nested"):
        chat(RICH).render([{"role": "user", "content": "x", "extra": deep}])


@pytest.mark.parametrize(
    "name", ["tokenize", "messages", "tools", "chat_template", "add_generation_prompt", "bos_token", "padding"]
)
def test_reserved_variables_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is reserved") as caught:
        chat(RICH).render(HELLO, variables={name: True})
    assert caught.value.param == "chat_template_kwargs"


def test_a_variable_that_the_template_ignores_is_a_mistake() -> None:
    with pytest.raises(RequestError, match="does not read 'enable_thoughts'; it reads enable_thinking"):
        chat(RICH).render(HELLO, variables={"enable_thoughts": False})
    with pytest.raises(RequestError, match="not a JSON value"):
        chat(RICH).render(HELLO, variables={"enable_thinking": object()})


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(RequestError, match="turns must alternate") as caught:
        chat("{{ raise_exception('turns must alternate') }}").render(HELLO)
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match="cannot both"):
        chat(RICH).render(HELLO, continue_final_message=True)
    with pytest.raises(RequestError, match="does not write the last message"):
        chat("fixed").render(HELLO, add_generation_prompt=False, continue_final_message=True)


def test_a_refusal_shows_no_addresses_and_no_flood() -> None:
    for source in ("{{ {}[raise_exception].x }}", "{{ raise_exception('x' * 100000) }}"):
        with pytest.raises(RequestError) as caught:
            chat(source).render(HELLO)
        assert "0x" not in str(caught.value)
        assert len(str(caught.value)) < 1000


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['time'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__self__.__import__('os') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ ''|attr('__class__')|attr('__mro__')|attr('__getitem__')(1) }}",
    "{{ ['__class__']|map('attr')|list }}{{ [messages]|map(attribute='__class__.__mro__')|list }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__}'.format(x=messages) }}",
    "{{ ('{0.__class__}').format_map({'0': messages}) }}",
    "{{ '%s'.__mod__ }}",
    "{{ messages.append({'role': 'system'}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__ }}",
    "{{ loop.__class__ }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{{ environment.turn.__self__ }}",
    "{{ caller.__code__ }}",
    "{{ undefined_name.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{{ config }}{{ config.items() }}",
    "{{ ().__class__ }}{{ (1).__class__.__base__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_find_nothing(source: str) -> None:
    """Either the render is refused or the forbidden thing is undefined and shows as nothing."""
    messages = [{"role": "user", "content": "hello"}]
    try:
        text = Template(source).render({"messages": messages})
    except TemplateError:
        text = ""
    assert messages == HELLO
    for leak in ("<class", "<function", "<module", "object at 0x", "root:", "builtin"):
        assert leak not in text


GREEDY = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}text{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n-1) if n else '' }}{{ f(n-1) if n else '' }}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in 'ab' recursive %}{{ loop(['a']) }}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ['x'] * 10**10 }}",
    "{{ 10**10**10 }}",
    "{% set ns = namespace(x=10**60) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x' | center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x' | indent(10**9, true) }}",
    "{{ 'x' | tojson(indent=10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 1000000000) }}",
    "{% set a = 'x' * 1000000 %}{{ a.replace('x', a) }}",
    "{% set a = 'x' * 1000000 %}{{ a | replace('x', a) }}",
    "{{ (['x' * 1000000] * 100000) | join }}",
    "{{ ','.join(['x' * 1000000] * 100000) }}",
    "{% set a = 'x' * 1000000 %}{{ a.join(a) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=['ab']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == 1 }}",
    "{% set ns = namespace(x={}) %}{% for i in range(99) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "{{ 'x' | urlize }}",
    "{{ lipsum(1000000) }}",
    "{% for i in range(1000) %}" + "x" * 5000 + "{% endfor %}",
]


@pytest.mark.parametrize("source", GREEDY)
def test_greedy_templates_end_with_a_refusal(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_CPU_SECONDS", 0.2)
    with pytest.raises(TemplateError):
        Template(source).render({"messages": HELLO})


def test_a_refused_render_leaves_the_next_one_its_whole_budget() -> None:
    template = Template("{{ 'x' * n }}")
    for _ in range(3):
        with pytest.raises(TemplateError):
            template.render({"n": 10**9})
        assert template.render({"n": 3}) == "xxx"
    fills = Template("{% for i in range(60) %}{% set a = 'x' * 1000000 %}{% endfor %}ok")
    assert [fills.render({}) for _ in range(3)] == ["ok"] * 3


def test_a_long_conversation_fits_the_budget() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(2000)]
    assert chat(RICH).render(messages).count("word") == 400_000
