"""The door: what a request may ask for, one function per concern, for the server, for `LLM` and for the engine itself.

Every refusal is a RequestError that names field, value and remedy. Values arrive from strangers: an integer may be a
boolean, a float, negative or have five thousand digits, and a float may be NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ..scheduler.params import Repetition, SamplingParams, Slo, Speculative
from .config import EngineConfig
from .errors import RequestError, TooLongError
from .messages import AddRequest, EngineReady

MAX_N = 10_000  # samples of one prompt that an engine can be set to take: what repeated-sampling studies draw
MAX_LOGPROBS = 20  # rivals per token, as OpenAI's; a step's logits are sorted for them
MAX_LOGPROB_TOKEN_IDS = 512  # two spellings of each of the 255 choices that a question of /v1/decisions may have
MAX_PATTERN_SIZE = 128  # of repetitions: every drawn token is compared once for each size
MAX_PATTERN_COUNT = 1_000_000
MAX_STOP_STRINGS = 4  # as OpenAI's
MAX_STOP_CHARS = 4096  # each is matched character by character, and up to so many are held back from a stream
MAX_STOP_TOKEN_IDS = 128  # compared on the device at every step
MAX_BAD_WORDS = 128  # as vLLM's
MAX_BAD_SPELLINGS = 2 * MAX_BAD_WORDS  # of them, in tokens; each is compared with the end of the output at every step
MAX_BAD_WORD_TOKENS = 64
MAX_THINKING_TAG_TOKENS = 32  # a tag of bytes has a dozen
MAX_LOGIT_BIAS = 1024  # entries; a row of the device's table
LOGIT_BIAS_RANGE = 100.0  # as OpenAI's; exp(100) already decides every draw
MAX_REPETITION_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01  # a logit is divided by it; smaller ones overflow half precision
MAX_SALT_BYTES = 128
MAX_TENANT_BYTES = 64
MAX_WEIGHT = 1e6  # of a tenant: shares beyond that starve everybody else
# Promises, in seconds. Below the least no engine could keep one; above the most it is a mistake in the unit.
SLO_BOUNDS = {"ttft": (0.001, 3600.0), "itl": (0.001, 60.0), "deadline": (0.001, 86400.0)}
TIMEOUT_BOUNDS = (0.001, 86400.0)
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine at hand can do.

    vocab_size     the logits' width, not the tokenizer's length: the bound of every token id
    max_model_len  prompt and output together, in tokens
    max_logprobs   rivals per token at most; -1 = no bound but the vocabulary, and whole-vocabulary requests are allowed
    max_n          samples of one prompt
    policy         the scheduling policy: only "priority" knows priorities
    tenants        the names that requests may give; empty = any
    draft_methods  of speculation, that requests may ask for
    draft_depth    tokens guessed one after another at most; 0 = the engine does not speculate
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int = MAX_LOGPROBS
    max_n: int = EngineConfig().max_n
    policy: str = EngineConfig().scheduling_policy
    tenants: frozenset[str] = frozenset()
    draft_methods: tuple[str, ...] = ("none",)
    draft_depth: int = 0


def limits_of(ready: EngineReady) -> Limits:
    """What this engine said of itself. One that speculates at all can look up n-grams: that needs no model."""
    method = ready.speculative_method
    return Limits(
        vocab_size=ready.vocab_size,
        max_model_len=ready.max_model_len,
        max_logprobs=ready.max_logprobs,
        max_n=ready.max_n,
        policy=ready.scheduling_policy,
        tenants=frozenset(ready.tenants),
        draft_methods=("none",) if method == "none" else tuple(dict.fromkeys(("none", "ngram", method))),
        draft_depth=ready.num_speculative_tokens,
    )


def valid_token_ids(ids: Iterable[object], vocab_size: int, param: str) -> None:
    """Every id is a whole number in [0, vocab_size). Raises RequestError for the first that is not."""
    for i, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param}[{i}] = {shown(token_id)} is not a token id of this model; "
                f"ids are whole numbers from 0 to {vocab_size - 1}",
                param,
            )


def check_length(num_prompt: int, max_tokens: int, max_model_len: int, param: str = "prompt") -> None:
    """Prompt and output fit the context, and there is a prompt.

    The opening of the message is matched literally by client libraries, which shorten the conversation and try again.
    """
    if num_prompt < 1:
        raise RequestError(f"{param} has no tokens; send at least one", param)
    if num_prompt + max_tokens > max_model_len:
        raise TooLongError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt + max_tokens} tokens ({num_prompt} in the {param}, {max_tokens} for the completion). "
            f"Please reduce the length of the {param} or max_tokens.",
            param,
        )


def check_stop(stop: Sequence[object]) -> None:
    """Stop strings: few, none empty, none longer than a marker ever is."""
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are taken", "stop")
    for text in stop:
        if not isinstance(text, str):
            raise RequestError(f"stop must hold strings, not {shown(text)}", "stop")
        if not text:
            raise RequestError("stop cannot contain an empty string; remove it", "stop")
        if len(text) > MAX_STOP_CHARS:
            raise RequestError(
                f"stop has a string of {len(text)} characters; at most {MAX_STOP_CHARS} are taken", "stop"
            )


def clamp_logit_bias(bias: Mapping[int, float]) -> dict[int, float]:
    """Values moved into [-100, 100], as OpenAI's API does; NaN and whatever is no number stay, for `check_params`."""
    return {
        token_id: min(max(value, -LOGIT_BIAS_RANGE), LOGIT_BIAS_RANGE) if _is_number(value) else value
        for token_id, value in bias.items()
    }


def check_params(params: SamplingParams, limits: Limits) -> None:
    """Every field of `params` by type and range, and the fields against each other. Raises RequestError."""
    _check_counts(params, limits)
    _check_distribution(params)
    _check_token_lists(params, limits.vocab_size)
    _check_thinking(params, limits.vocab_size)
    _check_logprobs(params.logprobs, "logprobs", limits)
    _check_logprobs(params.prompt_logprobs, "prompt_logprobs", limits)
    if params.logprob_token_ids and params.logprobs is None:
        raise RequestError("logprob_token_ids needs logprobs; set it to 0 or more", "logprob_token_ids")
    if params.repetition is not None:
        _check_repetition(params.repetition)
    if params.grammar is not None and params.ignore_eos:
        raise RequestError("ignore_eos cannot be had with a grammar, whose text has an end; leave it out", "ignore_eos")


def check_request(request: AddRequest, limits: Limits) -> None:
    """The whole message, as the engine checks it again: whatever the API side forgot ends one request here."""
    valid_token_ids(request.prompt_ids, limits.vocab_size, "prompt")
    check_params(request.params, limits)
    check_length(len(request.prompt_ids), request.params.max_tokens, limits.max_model_len)
    check_order(request.priority, request.tenant, limits)
    if request.weight is not None:
        _number(request.weight, "weight", 0.0, MAX_WEIGHT, above_low=True)
    check_promises(request.slo, request.timeout)
    check_speculative(request.speculative, limits)
    _text(request.cache_salt, "cache_salt", MAX_SALT_BYTES)


def check_order(priority: int, tenant: str, limits: Limits) -> None:
    """Priority and tenant by type and range, and whether the engine's policy heeds them."""
    _integer(priority, "priority", INT64_MIN, INT64_MAX)
    if priority and limits.policy != "priority":
        raise RequestError(
            f"priority = {shown(priority)}, but this server schedules by {limits.policy!r}: leave it out, or start the "
            "server with --scheduling-policy priority",
            "priority",
        )
    _text(tenant, "tenant", MAX_TENANT_BYTES)
    if limits.tenants and tenant not in limits.tenants:
        raise RequestError(f"tenant {shown(tenant)} is not known here; use one that the server was given", "tenant")


def check_promises(slo: Slo, timeout: float | None) -> None:
    """Every promise is absent or a number in its range; messages speak of milliseconds, as requests do."""
    for name, (low, high) in SLO_BOUNDS.items():
        value = getattr(slo, name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            given = shown(value * 1000 if _is_number(value) else value)
            param = f"slo.{name}_ms"
            raise RequestError(f"{param} must be in [{low * 1e3:g}, {high * 1e3:g}], got {given}", param)
    if timeout is not None:
        _number(timeout, "timeout", *TIMEOUT_BOUNDS)


def check_speculative(wish: Speculative, limits: Limits) -> None:
    """Method and length are the engine's, or less; a wish for nothing and for something at once is refused."""
    start = "" if limits.draft_depth else " (this server does not speculate unless started with --speculative-method)"
    method, num_tokens = wish.method, wish.num_tokens
    if method is not None and method not in limits.draft_methods:
        raise RequestError(
            f"speculative.method must be one of {', '.join(limits.draft_methods)}{start}, got {shown(method)}",
            "speculative.method",
        )
    if num_tokens is not None:
        rule = f"must be a whole number from 0 to {limits.draft_depth}{start}"
        _integer(num_tokens, "speculative.num_tokens", 0, limits.draft_depth, rule)
    if method == "none" and num_tokens:
        raise RequestError(
            f"speculative.num_tokens is {num_tokens}, but speculative.method is 'none': leave one of them out",
            "speculative.num_tokens",
        )


def shown(value: object) -> str:
    """A stranger's value in a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    if not isinstance(value, bool | int | float | str | None):
        return f"a {type(value).__name__}"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_counts(params: SamplingParams, limits: Limits) -> None:
    max_tokens = _integer(params.max_tokens, "max_tokens", 0, None, "must be at least 0")
    min_tokens = _integer(params.min_tokens, "min_tokens", 0, None, "must be at least 0")
    if max_tokens > limits.max_model_len:
        raise TooLongError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
            f"{shown(max_tokens)} tokens for the completion alone. Please reduce max_tokens.",
            "max_tokens",
        )
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens = {max_tokens}, got {shown(min_tokens)}",
            "min_tokens",
        )
    n = _integer(params.n, "n", 1, limits.max_n)
    _integer(params.seed, "seed", INT64_MIN, INT64_MAX, "must be a 64-bit whole number")
    if not isinstance(params.ignore_eos, bool):
        raise RequestError(f"ignore_eos must be true or false, got {shown(params.ignore_eos)}", "ignore_eos")
    if n > 1 and params.temperature == 0:
        raise RequestError(
            f"n must be 1 when using greedy sampling, got {n}: all samples would be equal; "
            "set a temperature above 0 or n to 1",
            "n",
        )


def _check_distribution(params: SamplingParams) -> None:
    _number(params.temperature, "temperature", 0.0, 2.0)
    _number(params.top_p, "top_p", 0.0, 1.0, above_low=True)
    _number(params.min_p, "min_p", 0.0, 1.0)
    _integer(params.top_k, "top_k", -1, INT32_MAX, "must be 0 or -1 (off) or a count of tokens")
    _number(params.presence_penalty, "presence_penalty", -2.0, 2.0)
    _number(params.frequency_penalty, "frequency_penalty", -2.0, 2.0)
    _number(params.repetition_penalty, "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)


def _check_token_lists(params: SamplingParams, vocab_size: int) -> None:
    _few(params.stop_token_ids, "stop_token_ids", MAX_STOP_TOKEN_IDS)
    valid_token_ids(params.stop_token_ids, vocab_size, "stop_token_ids")

    _few(params.logprob_token_ids, "logprob_token_ids", MAX_LOGPROB_TOKEN_IDS)
    valid_token_ids(params.logprob_token_ids, vocab_size, "logprob_token_ids")

    _few(params.logit_bias, "logit_bias", MAX_LOGIT_BIAS)
    valid_token_ids(params.logit_bias, vocab_size, "logit_bias")
    for token_id, value in params.logit_bias.items():
        _number(value, "logit_bias", -LOGIT_BIAS_RANGE, LOGIT_BIAS_RANGE, label=f"logit_bias[{token_id}]")

    if params.allowed_token_ids is not None:
        _few(params.allowed_token_ids, "allowed_token_ids", vocab_size)
        valid_token_ids(params.allowed_token_ids, vocab_size, "allowed_token_ids")
        if not params.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty; leave it out to allow all", "allowed_token_ids")

    _few(params.bad_words, "bad_words", MAX_BAD_SPELLINGS)
    for i, word in enumerate(params.bad_words):
        if not word:
            raise RequestError(f"bad_words[{i}] is empty; remove it", "bad_words")
        _few(word, f"bad_words[{i}]", MAX_BAD_WORD_TOKENS)
        valid_token_ids(word, vocab_size, "bad_words")


def _check_thinking(params: SamplingParams, vocab_size: int) -> None:
    thinking = params.thinking
    if thinking is None:
        return
    for ids in (thinking.start_ids, thinking.end_ids):
        if not 0 < len(ids) <= MAX_THINKING_TAG_TOKENS:
            raise RequestError("the tags of thinking have no tokens, or too many", "thinking_token_budget")
        valid_token_ids(ids, vocab_size, "thinking_token_budget")
    if thinking.budget is not None:
        _integer(thinking.budget, "thinking_token_budget", 0, INT64_MAX, "must be at least 0")


def _check_logprobs(value: object, param: str, limits: Limits) -> None:
    if value is None:
        return
    if type(value) is not int or value < -1:
        raise RequestError(f"{param} must be a positive value or -1, got {shown(value)}", param)
    bound = limits.vocab_size if limits.max_logprobs == -1 else min(limits.max_logprobs, limits.vocab_size)
    if (limits.vocab_size if value == -1 else value) > bound:
        raise RequestError(f"{param} = {shown(value)} is more than this server gives; at most {bound}", param)


def _check_repetition(wish: Repetition) -> None:
    where = "repetition_detection"
    largest = _integer(wish.max_pattern_size, f"{where}.max_pattern_size", 1, MAX_PATTERN_SIZE)
    _integer(wish.min_pattern_size, f"{where}.min_pattern_size", 1, largest)
    _integer(wish.min_count, f"{where}.min_count", 2, MAX_PATTERN_COUNT)


def _text(value: object, param: str, most_bytes: int) -> None:
    """Text that UTF-8 can express: half of a surrogate pair cannot be sent."""
    try:
        fits = isinstance(value, str) and len(value.encode()) <= most_bytes
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise RequestError(f"{param} must be text of at most {most_bytes} bytes, got {shown(value)}", param)


def _few(values: object, param: str, most: int) -> None:
    if not isinstance(values, Collection) or isinstance(values, str | bytes):
        raise RequestError(f"{param} must be a list, got {shown(values)}", param)
    if len(values) > most:
        raise RequestError(f"{param} has {len(values)} entries; at most {most} are taken", param)


def _integer(value: object, param: str, low: int, high: int | None, rule: str | None = None) -> int:
    """A whole number; a boolean or 1.0 is none."""
    if type(value) is not int or value < low or (high is not None and value > high):
        rule = rule or f"must be a whole number from {low} to {high}"
        raise RequestError(f"{param} {rule}, got {shown(value)}", param)
    return value


def _number(
    value: object, param: str, low: float, high: float, *, above_low: bool = False, label: str | None = None
) -> None:
    """A finite number in [low, high], or (low, high] where `above_low`. NaN fails every comparison, so it is out."""
    if not _is_number(value) or not (low < value if above_low else low <= value) or value > high:
        bracket = "(" if above_low else "["
        raise RequestError(f"{label or param} must be in {bracket}{low:g}, {high:g}], got {shown(value)}", param)


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) is int or type(value) is float
