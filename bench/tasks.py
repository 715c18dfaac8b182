"""Coding tasks whose answers a program can judge: functions of the bundled model's held-out library modules.

    held-out module ──▶ prompt: the text up to the function's body ──model──▶ completion ──▶ body ──▶ module ──▶ verdict

Two verdicts: does the function parse, and does the module with this body in it give what the examples say?
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from ..models.corpus import Module, split_library
from .sandbox import passes

_SSL = ">>> o = SSLObject.__new__(SSLObject)\n>>> o._sslobj = type('Fake', (), {NAME: WHAT})()\n"
_POP = ">>> p = POP3.__new__(POP3)\n>>> p._shortcmd = p._longcmd = str\n"
_TRACE = "Trace((5, 7, (('a.py', 3),)))"


def _ssl(name: str, call: str) -> str:
    """A property or method of SSLObject hands on what the inner object says."""
    what = "lambda self: 42" if call else "42"
    return _SSL.replace("NAME", repr(name)).replace("WHAT", what) + f">>> o.{name}{call}\n42"


# Function of a held-out module -> examples of what it does, as the library itself answers them. From functions that
# follow the pattern of their neighbours, which a small model can see, to ones that need an idea.
EXAMPLES = {
    ("abc.py", "abstractmethod"): ">>> abstractmethod(lambda: 1).__isabstractmethod__\nTrue",
    ("base64.py", "b16encode"): ">>> b16encode(b'\\x0a\\xff')\nb'0AFF'",
    ("base64.py", "decodebytes"): ">>> decodebytes(b'cXVpcmU=')\nb'quire'",
    ("base64.py", "standard_b64decode"): ">>> standard_b64decode(b'cXVpcmU/Pg==')\nb'quire?>'",
    ("base64.py", "standard_b64encode"): ">>> standard_b64encode(b'quire?>')\nb'cXVpcmU/Pg=='",
    ("curses/ascii.py", "alt"): ">>> alt('a'), alt(97)\n('á', 225)",
    ("curses/ascii.py", "ctrl"): ">>> ctrl('A'), ctrl(97)\n('\\x01', 1)",
    ("curses/ascii.py", "isalnum"): ">>> [isalnum(c) for c in 'a0Z_ ']\n[True, True, True, False, False]",
    ("curses/ascii.py", "isctrl"): ">>> [isctrl(c) for c in '\\t a']\n[True, False, False]",
    ("curses/ascii.py", "isupper"): ">>> [isupper(c) for c in 'AZa@[']\n[True, True, False, False, False]",
    (
        "fractions.py",
        "Fraction.__abs__",
    ): ">>> abs(Fraction(-1, 2)), abs(Fraction(3))\n(Fraction(1, 2), Fraction(3, 1))",
    ("fractions.py", "Fraction.__neg__"): ">>> -Fraction(1, 2), -Fraction(-3)\n(Fraction(-1, 2), Fraction(3, 1))",
    ("fractions.py", "Fraction.as_integer_ratio"): ">>> Fraction(6, 4).as_integer_ratio()\n(3, 2)",
    ("fractions.py", "Fraction.denominator"): ">>> Fraction(6, 4).denominator\n2",
    ("fractions.py", "Fraction.limit_denominator"): ">>> Fraction('3.14159').limit_denominator(10)\nFraction(22, 7)",
    ("fractions.py", "Fraction.numerator"): ">>> Fraction(6, 4).numerator\n3",
    ("poplib.py", "POP3.dele"): _POP + ">>> p.dele(3)\n'DELE 3'",
    ("poplib.py", "POP3.noop"): _POP + ">>> p.noop()\n'NOOP'",
    ("poplib.py", "POP3.pass_"): _POP + ">>> p.pass_('x')\n'PASS x'",
    ("poplib.py", "POP3.retr"): _POP + ">>> p.retr(3)\n'RETR 3'",
    ("poplib.py", "POP3.rset"): _POP + ">>> p.rset()\n'RSET'",
    ("ssl.py", "SSLObject.cipher"): _ssl("cipher", "()"),
    ("ssl.py", "SSLObject.compression"): _ssl("compression", "()"),
    ("ssl.py", "SSLObject.pending"): _ssl("pending", "()"),
    ("ssl.py", "SSLObject.server_hostname"): _ssl("server_hostname", ""),
    ("ssl.py", "SSLObject.server_side"): _ssl("server_side", ""),
    ("ssl.py", "SSLObject.session_reused"): _ssl("session_reused", ""),
    ("ssl.py", "SSLObject.shared_ciphers"): _ssl("shared_ciphers", "()"),
    ("ssl.py", "SSLObject.version"): _ssl("version", "()"),
    ("tracemalloc.py", "Frame.__hash__"): ">>> hash(Frame(('a.py', 3))) == hash(Frame(('a.py', 3)))\nTrue",
    ("tracemalloc.py", "Frame.lineno"): ">>> Frame(('a.py', 3)).lineno\n3",
    ("tracemalloc.py", "Trace.size"): f">>> {_TRACE}.size\n7",
    ("tracemalloc.py", "Traceback.__contains__"): ">>> Frame(('a', 3)) in Traceback((('a', 3), ('b', 4)))\nTrue",
    ("tracemalloc.py", "Traceback.__len__"): ">>> len(Traceback((('a', 3), ('b', 4))))\n2",
    ("tracemalloc.py", "Traceback.total_nframe"): ">>> Traceback((), 9).total_nframe\n9",
    ("urllib/parse.py", "_NetlocResultMixinBase.password"): ">>> urlsplit('http://u:p@h').password\n'p'",
    ("urllib/parse.py", "unquote_plus"): ">>> unquote_plus('%7e/abc+def')\n'~/abc def'",
    ("xml/sax/saxutils.py", "escape"): ">>> escape('<a&b>')\n'&lt;a&amp;b&gt;'",
    ("xml/sax/saxutils.py", "unescape"): ">>> unescape('&lt;a&amp;b&gt;')\n'<a&b>'",
}


@dataclass(frozen=True, slots=True)
class Task:
    """prompt: module text up to the body, where a completion goes on; rest: the module's text behind the body."""

    name: str
    module: str  # dotted
    prompt: str
    rest: str
    indent: int  # columns of the function's `def`
    reference: str  # the library's own body
    examples: str = ""

    def body(self, completion: str) -> str:
        """The completion up to the first line that is no longer inside the function."""
        first, *lines = completion.split("\n")
        kept = [first]
        for line in lines:
            if line.strip() and len(line) - len(line.lstrip()) <= self.indent:
                break
            kept.append(line)
        return "\n".join(kept).rstrip()

    def parses(self, body: str) -> bool:
        """Whether header and body are one function that does something."""
        start = max(m.start() for m in re.finditer(rf"^ {{{self.indent}}}(async )?def ", self.prompt, re.MULTILINE))
        try:
            tree = ast.parse(textwrap.dedent(self.prompt[start:] + body))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        statements = tree.body[0].body if len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef) else []
        return any(not _is_text(statement) for statement in statements)

    def passes(self, body: str) -> bool:
        """Whether the module with this body does what the examples say, in the sandbox."""
        return self.parses(body) and passes(self.prompt + body + "\n" + self.rest, self.module, self.examples)


def example_tasks() -> list[Task]:
    """Those of `EXAMPLES` that this interpreter's library has, and holds out."""
    modules = {module.path: module for module in split_library().held_out}
    functions = {path: dict(_functions(ast.parse(module.text))) for path, module in modules.items()}
    return [
        _task(modules[path], functions[path][name], examples)
        for (path, name), examples in EXAMPLES.items()
        if name in functions.get(path, {})
    ]


def parse_tasks(count: int, seed: int) -> list[Task]:
    """`count` documented functions of the held-out modules, drawn by the seed."""
    tasks = [
        _task(module, function, "")
        for module in split_library().held_out
        for _, function in _functions(ast.parse(module.text))
        if ast.get_docstring(function) and len(function.body) > 1
    ]
    return random.Random(seed).sample(tasks, min(count, len(tasks)))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name with its classes in front, function), the first of each name; functions inside functions are left out."""
    seen = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and node.name not in seen:
            seen.add(node.name)
            yield prefix + node.name, node


def _task(module: Module, function: ast.FunctionDef, examples: str) -> Task:
    lines = module.text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = module.text.encode()  # the columns of `ast` count bytes
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        cut = starts[(first.end_lineno or first.lineno) - 1] + (first.end_col_offset or 0)
    else:
        cut = starts[first.lineno - 1] + first.col_offset
    end = starts[function.end_lineno or len(lines)]
    head = data[:cut].decode().rstrip()
    reference = data[len(head.encode()) : end].decode()
    if reference.lstrip(" ").startswith("\n"):
        # The tokenizer makes one token of a line's end and the next line's indentation: a prompt never cuts it in two.
        head, reference = head + "\n" + " " * function.body[-1].col_offset, reference.lstrip()
    dotted = module.path.removesuffix(".py").replace("/", ".")
    return Task(function.name, dotted, head, data[end:].decode(), function.col_offset, reference.rstrip(), examples)
