"""A model folder's chat template, run as what it is: a stranger's program.

The sandbox is Jinja's immutable one with the names that templates expect, and every render has a budget.
What holds, whatever the template says:

* no attribute that begins with an underscore, no change to the data passed in, no file, no import, no other template
  (`include`, `extends` and `import` find none);
* loops and calls end: each turn of a loop and each call is counted against MAX_CPU_SECONDS of this thread;
* memory is bounded: text made anywhere in a render (output, captured blocks, `~`, `*`, calls, filters) adds up to at
  most MAX_WORK_CHARS, and repetition, padding and powers are refused by size before they are computed.

What does not hold here: one single built-in operation on data within those sizes runs to its end (milliseconds). A
server renders in workers (`rendering.py`), where the kernel bounds that too.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError

MAX_SOURCE_CHARS = 1 << 20  # the longest published template is about 30 kB
MAX_OUTPUT_CHARS = 4 << 20  # a million tokens; more than any context here
MAX_WORK_CHARS = 64 << 20  # text copied on the way: templates pass a message through a handful of macros and filters
# A hundred messages with tools take a few milliseconds. `rendering.py` ends all at one second by the kernel's count,
# which goes by ticks and on a busy machine is up to a quarter too high.
MAX_CPU_SECONDS = 0.5
MAX_ITEMS = 500_000  # of lists and objects together with all they hold; as JSON, a full output's worth
MAX_INTEGER_BITS = 256
MAX_WIDTH = 10_000  # padding, indentation and repetition counts given as numbers

# Built in, but unbounded in time or size, or random; no chat template needs them.
REMOVED_FILTERS = ("urlize", "wordwrap", "random", "pprint", "xmlattr")
WIDE_FIELD = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{[^{]")
REMOVED_METHODS = frozenset({"expandtabs", "translate", "format_map", "maketrans"})


class Complaint(TemplateError):
    """The template's own words about a conversation, by `raise_exception`: it runs, and refuses this one."""


class _Budget(threading.local):
    """What the render on this thread may still use. Outside a render (compilation) nothing is counted."""

    active = False
    chars = 0
    deadline = 0.0

    def open(self) -> None:
        self.active, self.chars, self.deadline = True, 0, time.thread_time() + MAX_CPU_SECONDS

    def close(self) -> None:
        self.active = False

    def spend(self, chars: int) -> None:
        if not self.active:
            return
        self.chars += chars
        if self.chars > MAX_WORK_CHARS:
            raise SecurityError(f"the template makes more than {MAX_WORK_CHARS} characters")
        if time.thread_time() > self.deadline:
            raise SecurityError(f"the template runs for more than {MAX_CPU_SECONDS:g} seconds")


_budget = _Budget()


def _size(value: object) -> int:
    """Characters that `value` takes as text, about; a container counts with all it holds, shared parts each time."""
    if isinstance(value, str):
        return len(value)
    total = visited = 0
    pending = [value]
    while pending:
        item = pending.pop()
        visited += 1
        if visited > MAX_ITEMS:
            raise SecurityError(f"the template makes a list of more than {MAX_ITEMS} items")
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
        total += 2
    return total


def _check_arguments(name: str, subject: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what would make far more text than it is given: wide paddings, and text put in for text many times."""
    values = (*args, *kwargs.values())
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values) and isinstance(subject, str):
        raise SecurityError(f"{name} with a number beyond {MAX_WIDTH}")
    if name == "replace" and isinstance(subject, str):
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == 2:
            _budget.spend(subject.count(texts[0]) * len(texts[1]))
    elif name == "join":
        method = isinstance(subject, str)  # of the separator; the filter's subject is the list
        separator, items = (subject, values[0] if values else "") if method else (values[0] if values else "", subject)
        count = len(items) if isinstance(items, list | tuple | str | Mapping) else 0
        _budget.spend(count * _size(separator) + _size(items))
    elif name == "format" and isinstance(subject, str):
        _check_format(subject, values)


def _check_format(template: str, values: tuple[Any, ...]) -> None:
    """Refuse wide fields, and widths that are themselves values."""
    if WIDE_FIELD.search(template):
        raise SecurityError("a text format with a width of more than four digits or one that is a value")
    _budget.spend((template.count("%") + template.count("{")) * _size(values))


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without private names, which would outlive the sandbox's attribute check."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *positional = args
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # its contents may hold it many times over

    @staticmethod
    def _check(name: object) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}: only names without a leading underscore")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; when serving it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with the budget built in: see the module's docstring for what it promises."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=self._finalize,
            optimized=False,  # folding constants would compute them while compiling, outside of any budget
        )
        for name in REMOVED_FILTERS:
            del self.filters[name]
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
            "dict": dict,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse, then put a `turn` at the head of every loop's body and count every `~` and literal."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            constant = sum(len(text.data) for text in loop.find_all(jinja2.nodes.TemplateData))
            turn = _call("turn", [jinja2.nodes.Const(constant)], loop.lineno)
            loop.body.insert(0, jinja2.nodes.ExprStmt(turn))
        _replace_values(tree)
        tree.set_environment(self)
        return tree

    # The three methods that `_parse` writes into templates; what the last two return is counted by `call`.

    def turn(self, chars: int) -> None:
        _budget.spend(chars)

    def concat_values(self, *values: object) -> str:
        return "".join(map(str, values))

    def literal(self, value: object) -> object:
        return value

    def _finalize(self, value: object) -> object:
        _budget.spend(_size(value))
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, subject = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        _check_arguments(name, subject, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _budget.spend(_size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}.get(operator, 0)
            if bits > MAX_INTEGER_BITS:
                raise SecurityError(f"a number of more than {MAX_INTEGER_BITS} bits")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            _budget.spend(max(count, 0) * _size(value))
        elif operator == "+":
            _budget.spend(sum(len(value) for value in (left, right) if isinstance(value, str | list | tuple)))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own `str.format`, which hides the text it belongs to from `call`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template = value.__self__

        @functools.wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(template, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)


def _call(method: str, args: list[Any], line: int) -> jinja2.nodes.Node:
    """A call of the environment's own method, by a node that no template variable can shadow."""
    call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(method), args, [], None, None)
    call.set_lineno(line)
    return call


def _replace_values(node: jinja2.nodes.Node) -> None:
    """Below `node`, route `~` and list, tuple and object literals through the environment's counting methods."""
    for name, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            setattr(node, name, _counted(value))
        elif isinstance(value, list):
            value[:] = [_counted(child) if isinstance(child, jinja2.nodes.Node) else child for child in value]


def _counted(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    _replace_values(node)
    if isinstance(node, jinja2.nodes.Concat):
        return _call("concat_values", node.nodes, node.lineno)
    if isinstance(node, jinja2.nodes.List | jinja2.nodes.Dict) or (
        isinstance(node, jinja2.nodes.Tuple) and node.ctx == "load"
    ):
        return _call("literal", [node], node.lineno)
    return node


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its arguments checked and its text counted; Jinja may pass its context or itself first."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        subject, rest = args[leading], args[leading + 1 :]
        _check_arguments(name, subject, rest, kwargs)
        result = function(*args, **kwargs)
        _budget.spend(_size(result))
        return result

    return bounded


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: not escaped for HTML, unlike Jinja's own."""
    if indent is not None and not 0 <= indent <= 64:
        raise SecurityError("tojson with an indent beyond 64")
    _budget.spend(_size(value))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Complaint(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:256])


class Template:
    """One compiled template. `render` is safe on several threads at once.

    variables  names the template reads from its caller: messages, bos_token, and what `chat_template_kwargs` may set
    """

    def __init__(self, source: str) -> None:
        """Raises TemplateError (a syntax error, a template too large or too deep)."""
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"a template of {len(source)} characters; at most {MAX_SOURCE_CHARS} are taken")
        environment = _Environment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree) - environment.globals.keys())
            self._template = environment.from_string(source)
        except (RecursionError, SyntaxError, MemoryError) as error:
            raise TemplateError(f"the template cannot be compiled: {type(error).__name__}") from None
        self.source = source

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateError for whatever goes wrong inside, a spent budget included."""
        pieces: list[str] = []
        chars = 0
        _budget.open()
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                chars += len(piece)
                if chars > MAX_OUTPUT_CHARS:
                    raise SecurityError(f"the conversation becomes more than {MAX_OUTPUT_CHARS} characters")
        except TemplateError:
            raise
        except Exception as error:
            # A stranger's program may fail in any way; its data stays out of the message.
            raise TemplateError(f"{type(error).__name__} in the chat template") from error
        finally:
            _budget.close()
        return "".join(pieces)
