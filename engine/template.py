"""A model folder's chat template, run as what it is: a stranger's program.

The sandbox is Jinja's immutable one with the names that templates expect, and every render has a budget.
What holds, whatever the template says:

* no attribute that begins with an underscore, no change to the data passed in, no file, no import, no other template
  (`include`, `extends` and `import` find none);
* loops and calls end: each turn of a loop and each call is counted against MAX_CPU_SECONDS of this thread;
* memory is bounded: text made anywhere in a render (output, captured blocks, `~`, `*`, calls, filters) adds up to at
  most MAX_WORK_CHARS, and repetition, padding and powers are refused by size before they are computed.

What does not hold: one single built-in operation on data within those sizes runs to its end (milliseconds).
"""

from __future__ import annotations

import functools
import json
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
MAX_CPU_SECONDS = 2.0  # a hundred messages with tools take a few milliseconds
MAX_INTEGER_BITS = 256
MAX_WIDTH = 10_000  # padding, indentation and repetition counts given as numbers

# Built in, but unbounded in time or size, or random; no chat template needs them.
REMOVED_FILTERS = ("urlize", "wordwrap", "random", "pprint", "xmlattr")
REMOVED_METHODS = frozenset({"expandtabs", "translate", "format_map", "maketrans"})


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


def _size(value: object, depth: int = 0) -> int:
    """Characters that `value` takes as text, about; containers count with what they hold."""
    if isinstance(value, str):
        return len(value)
    if depth > 32 or not isinstance(value, Mapping | list | tuple):
        return 8
    items = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return 2 + sum(2 + _size(item, depth + 1) for item in items)


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
        separator, items = (subject, args[:1]) if isinstance(subject, str) else ("".join(map(str, args[:1])), (subject,))
        count = len(items[0]) if items and isinstance(items[0], list | tuple | str | Mapping) else 0
        _budget.spend(count * len(separator) + _size(items))
    elif name == "format" and isinstance(subject, str):
        _check_format(subject, subject.count("{") + subject.count("%"), values)


def _check_format(template: str, fields: int, values: object) -> None:
    digits = "".join(char if char.isdigit() else " " for char in template).split()
    if any(len(run) > len(str(MAX_WIDTH)) - 1 for run in digits):
        raise SecurityError("a format with a width or index beyond four digits")
    if isinstance(values, tuple) and any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values):
        fields *= 2 if "*" not in template and template.count("{") == fields else MAX_WORK_CHARS
    _budget.spend(fields * _size(values))


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
        """Parse, then put a `turn` at the head of every loop's body and send every `~` through `concat`."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            constant = sum(len(text.data) for text in loop.find_all(jinja2.nodes.TemplateData))
            turn = _call("turn", [jinja2.nodes.Const(constant)])
            loop.body.insert(0, jinja2.nodes.ExprStmt(turn))
        _replace_concats(tree)
        tree.set_environment(self)
        return tree

    def turn(self, chars: int) -> str:
        _budget.spend(chars)
        return ""

    def concat_values(self, *values: object) -> str:
        text = "".join(map(str, values))
        _budget.spend(len(text))
        return text

    def _finalize(self, value: object) -> object:
        _budget.spend(_size(value))
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        name, subject = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        _check_arguments(name, subject, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _budget.spend(len(result) if isinstance(result, str) else 1)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, left.count("%"), right if isinstance(right, tuple) else (right,))
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

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)


def _call(method: str, args: list[Any]) -> Any:
    """A call of the environment's own method, by a node that no template variable can shadow."""
    return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(method), args, [], None, None)


def _replace_concats(node: jinja2.nodes.Node) -> None:
    for name, value in node.iter_fields():
        if isinstance(value, list):
            for i, child in enumerate(value):
                if isinstance(child, jinja2.nodes.Node):
                    _replace_concats(child)
                    if isinstance(child, jinja2.nodes.Concat):
                        value[i] = _call("concat_values", child.nodes).set_lineno(child.lineno)
        elif isinstance(value, jinja2.nodes.Node):
            _replace_concats(value)
            if isinstance(value, jinja2.nodes.Concat):
                setattr(node, name, _call("concat_values", value.nodes).set_lineno(value.lineno))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its arguments checked and its text counted; Jinja may pass its context or itself first."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        subject, rest = args[leading], args[leading + 1 :]
        _check_arguments(name, subject, rest, kwargs)
        result = function(*args, **kwargs)
        _budget.spend(len(result) if isinstance(result, str) else 1)
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
    raise TemplateError(message)


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
