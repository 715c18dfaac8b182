"""Conversations made from the library itself: a request built from a docstring, answered by the function's code."""

import ast
import random
import re
import textwrap
from collections.abc import Iterator

from .corpus import Module

MAX_CODE_CHARS = 1_400  # about 350 tokens: short answers, which end by themselves
MIN_REQUEST_CHARS, MAX_REQUEST_CHARS = 8, 160
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You write Python.", "You are a programmer. Answer with code only.")


def first_sentence(docstring: str) -> str:
    """The docstring's first sentence without its full stop, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z\])'`])\.(?:\s|$)|:$", paragraph)[0].rstrip(".: ")


def words_of(name: str) -> str:
    """`_read_chunk` and `ReadChunk` as prose: 'read chunk'."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.strip("_")).replace("_", " ").lower()


def lower_first(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def functions_of(module: Module) -> Iterator[tuple[ast.FunctionDef, list[str]]]:
    """Each function, method and coroutine of the module, with its dedented source lines."""
    try:
        tree = ast.parse(module.text)
    except SyntaxError:  # fixtures for older grammars
        return
    lines = module.text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, lines[node.lineno - 1 : node.end_lineno]


def documented(function: ast.FunctionDef) -> bool:
    return ast.get_docstring(function) is not None and len(function.body) > 1


def request_for(function: ast.FunctionDef, sentence: str, rng: random.Random) -> str:
    """One of several ways in which a person asks for a function that does `sentence`."""
    signature = f"{function.name}({ast.unparse(function.args)})"
    return rng.choices(
        (
            sentence,
            sentence + ".",
            f"Write a Python function that does this: {lower_first(sentence)}.",
            f"Write a Python function `{signature}`. {sentence}.",
            f"{signature}: {lower_first(sentence)}",
            f"Write a function named {function.name}: {lower_first(sentence)}",
        ),
        weights=(4, 1, 1, 1, 1, 1),  # the bare sentence most: it is the shortest thing a person types
    )[0]


def render(messages: list[tuple[str, str]]) -> str:
    """ChatML, exactly as the tokenizer's chat template writes it."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def conversation(function: ast.FunctionDef, lines: list[str], rng: random.Random) -> str | None:
    """One exchange about `function`, or None when it is too long or has nothing to ask about."""
    if documented(function):
        sentence = first_sentence(ast.get_docstring(function))
        if rng.random() < 0.7:
            offset = function.lineno - 1
            doc = function.body[0]
            if doc.lineno - 1 - offset == 0:  # `def f(): "doc"` on one line
                return None
            lines = lines[: doc.lineno - 1 - offset] + lines[doc.end_lineno - offset :]
    elif not function.name.startswith("_") and not function.name.startswith("test") and len(function.body) > 1:
        sentence = words_of(function.name).capitalize()
    else:
        return None
    code = textwrap.dedent("\n".join(lines)).strip("\n")
    if not MIN_REQUEST_CHARS <= len(sentence) <= MAX_REQUEST_CHARS or len(code) > MAX_CODE_CHARS:
        return None
    messages = [("user", request_for(function, sentence, rng)), ("assistant", code)]
    if rng.random() < 0.1:
        messages.insert(0, ("system", rng.choice(SYSTEM_PROMPTS)))
    return render(messages)


def conversations(library: list[Module], tests: list[Module], seed: int = 0) -> list[str]:
    """Shuffled exchanges: three, asked differently, per documented function; one per other library function."""
    rng = random.Random(seed)
    found = [
        text
        for module in library + tests
        for function, lines in functions_of(module)
        for _ in range(3 if documented(function) else 0 if module.is_test else 1)
        if (text := conversation(function, lines, rng))
    ]
    rng.shuffle(found)
    return found
