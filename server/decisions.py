"""Questions with a fixed set of answers, asked so that the next token is the answer.

input ─▶ conversation ─template─▶ tokens up to the question, the same for all ─┬─▶ question 1, its options lettered
                                                                               └─▶ question 2 …
One token is drawn for each question, and its log-probabilities at the letters are the answer: nothing is parsed. The
common beginning is computed once, by the prefix cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from ..engine.chat import require_chat_template
from ..engine.errors import RequestError
from ..engine.outputs import SampleOutput, TextOptions
from ..engine.tokenizer import Tokenizer
from ..engine.validation import check_length, check_params
from ..scheduler.params import SamplingParams
from . import errors
from .cost import Asked, Encoded
from .decision_input import messages_of, text_of
from .generate import GenerateRequest, Prompt
from .inputs import Order, TextSide, json_bytes, num_bytes
from .protocol import DecisionBody, QuestionBody

MAX_OPTIONS = 255  # as OpenAI's
# Marks where the question is in the rendered conversation.
MARK = "\ue000question\ue000"
YES, NO = "Yes", "No"
CLOSING = "Answer with the letter of one option and nothing else."


@dataclass(frozen=True, slots=True)
class Option:
    """value: as the answer names it."""

    value: str | bool
    shown: str


def decision_size(body: DecisionBody) -> Asked:
    """What `body` asks for, as far as its fields tell. The input counts for each question, as in `usage`."""
    count, shared = len(body.questions), json_bytes(body.input)
    return Asked(
        prompts=count,
        samples=count,
        prompt_bytes=count * shared + sum(_question_bytes(question) for question in body.questions),
        shared_bytes=shared,
        max_tokens=1,
        logprobs=True,
    )


def _question_bytes(question: QuestionBody) -> int:
    options = json_bytes(question.choices) + json_bytes(question.levels)
    return json_bytes(question.instructions) + options + len(CLOSING)


def options_of(question: QuestionBody, where: str) -> list[Option]:
    """The answers that a question leaves, in their order. Raises 400 for fewer than two, too many, or equal ones."""
    if question.type == "predicate":
        return [Option(True, YES), Option(False, NO)]
    field, given = ("choices", question.choices) if question.type == "choice" else ("levels", question.levels)
    if given is None or not 2 <= len(given) <= MAX_OPTIONS:
        where, count = f"{where}.{field}", 0 if given is None else len(given)
        raise errors.invalid(f"`{where}` must hold 2 to {MAX_OPTIONS} options, got {count}.", where)
    options = [_option(item, f"{where}.{field}[{i}]") for i, item in enumerate(given)]
    if len({(type(option.value), option.value) for option in options}) < len(options):
        raise errors.invalid(f"`{where}.{field}` names one option twice.", f"{where}.{field}")
    return options


def _option(given: dict[str, Any], where: str) -> Option:
    """By the `value` of a choice or the `label` of a level. Raises 400."""
    field = "value" if given.get("label") is None else "label"
    name, description = given.get(field), given.get("description")
    if not isinstance(name, str | bool) or name == "" or (field == "label" and isinstance(name, bool)):
        raise errors.invalid(
            f"`{where}` needs a name that is not empty: a choice a `value`, text or a boolean, a level a `label`; got "
            f"{errors.shown(name)}.",
            where,
        )
    if description is not None and not isinstance(description, str):
        where = f"{where}.description"
        raise errors.invalid(f"`{where}` must be text; got {errors.shown(description)}.", where)
    text = name if isinstance(name, str) else str(name).lower()
    return Option(name, f"{text}: {description}" if description else text)


def decision_request(body: DecisionBody, text: TextSide, order: Order) -> GenerateRequest:
    """One prompt for each question. Raises ApiError or RequestError for whatever cannot be served as asked."""
    before, after = _around(body, text)
    tokenizer, room = text.tokenizer, text.ready.max_model_len
    tokenizer.check_bytes(before, room, "input")
    beginning = tokenizer.encode(before, add_special_tokens=False)
    prompts = []
    encoded = Encoded(num_bytes(before), len(beginning))
    for i, question in enumerate(body.questions):
        where = f"questions[{i}]"
        options = options_of(question, where)
        labels = labels_of(tokenizer)[: len(options)]
        if len(labels) < len(options):
            raise errors.invalid(
                f"`{where}` has {len(options)} options; this model's tokenizer has letters for {len(labels)}.",
                where,
            )
        asked = _asked(question, where, options, [label for label, _ in labels]) + after
        tokenizer.check_bytes(asked, room, where)
        ending = tokenizer.encode(asked, add_special_tokens=False)
        encoded = Encoded(encoded.num_bytes + num_bytes(asked), encoded.num_tokens + len(ending))
        ids = beginning + ending
        check_length(len(ids), 1, room, "input")
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=0,
            logprob_token_ids=tuple(token for _, tokens in labels for token in tokens),
        )
        check_params(params, text.limits)
        prompts.append(Prompt(ids, params))
    return GenerateRequest(
        prompts=prompts,
        text_options=TextOptions(),
        arrival=order.arrival,
        priority=order.priority,
        cache_salt=order.cache_salt,
        tenant=order.tenant,
        weight=order.weight,
        slo=order.slo,
        timeout=order.timeout,
        encoded=encoded,
    )


def _around(body: DecisionBody, text: TextSide) -> tuple[str, str]:
    """The conversation before and after the place of the question."""
    template = require_chat_template(text.template)
    messages = messages_of(body.input)
    if messages[-1]["role"] == "user":
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{MARK}"}
    else:
        messages.append({"role": "user", "content": MARK})
    # An answer that begins with thinking would not be the next token.
    variables = {"enable_thinking": False} if "enable_thinking" in template.variables else {}
    rendered = template.render(messages, add_generation_prompt=True, variables=variables)
    before, mark, after = rendered.partition(MARK)
    if not mark or MARK in after:
        raise RequestError("this model's chat template does not write the last message as it is", "input")
    return before, after


def _asked(question: QuestionBody, where: str, options: Sequence[Option], labels: Sequence[str]) -> str:
    instructions = text_of(question.instructions, f"{where}.instructions")
    opening = f"Is this true? {instructions}" if question.type == "predicate" else instructions
    listed = "\n".join(f"{label}. {option.shown}" for label, option in zip(labels, options, strict=True))
    return f"{opening}\n\n{listed}\n\n{CLOSING}"


@lru_cache(maxsize=4)
def labels_of(tokenizer: Tokenizer) -> list[tuple[str, tuple[int, ...]]]:
    """Names of options, and for each the tokens that say it alone: at most MAX_OPTIONS.

    A model may say it with or without a space before; both count. Capitals first, then pairs of them, where the
    tokenizer has such tokens.
    """
    found = []
    for label in _candidates():
        spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (label, " " + label)]
        tokens = tuple(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1))
        if tokens:
            found.append((label, tokens))
        if len(found) == MAX_OPTIONS:
            break
    return found


def _candidates() -> Iterator[str]:
    yield from ascii_uppercase
    yield from ("".join(pair) for pair in product(ascii_uppercase, repeat=2))
    yield from ascii_lowercase
    yield from digits


def answer_of(question: QuestionBody, output: SampleOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer to one question from the log-probabilities of its options."""
    options = options_of(question, "questions")
    labels = labels_of(tokenizer)[: len(options)]
    named = dict(output.logprobs[0].top) if output.logprobs else {}
    likely = [sum(math.exp(named[token]) for token in tokens) for _, tokens in labels]
    total = sum(likely)
    head = {"type": question.type, "name": question.name}
    if not total > 0:
        return {**head, "type": "refusal"}  # it would say none of them
    shares = [mass / total for mass in likely]
    best = max(range(len(options)), key=shares.__getitem__)
    if question.type == "predicate":
        return {**head, "probability": shares[0]}
    if question.type == "choice":
        each = [{"value": option.value, "probability": share} for option, share in zip(options, shares, strict=True)]
        return {**head, "choice": options[best].value, "confidence": shares[best], "probabilities": each}
    each = [
        {"value": level, "label": option.value, "probability": share}
        for level, (option, share) in enumerate(zip(options, shares, strict=True))
    ]
    score = sum(level * share for level, share in enumerate(shares))
    return {**head, "score": score, "confidence": shares[best], "probabilities": each}
