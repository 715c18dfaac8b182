"""From a request's fields to token ids and sampling parameters. Runs on the text threads, never on the event loop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from jinja2.exceptions import TemplateError

from ..engine.chat import ChatTemplate, Renderer, reason, require_chat_template
from ..engine.errors import RequestError
from ..engine.grammar import Grammars
from ..engine.messages import EngineReady
from ..engine.outputs import TextOptions
from ..engine.tokenizer import Tokenizer
from ..engine.validation import (
    Limits,
    check_length,
    check_params,
    check_stop,
    clamp_logit_bias,
    valid_token_ids,
)
from ..scheduler.params import Grammar, SamplingParams, Slo, Thinking
from . import errors
from .cost import Asked, Encoded
from .generate import GenerateRequest, Prompt
from .keys import Key
from .parsing.markup import Markup
from .parsing.reading import AnswerFormat
from .protocol import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, GenerateBody, TokenizeBody
from .tools import answer_format, required_calls, thinking_of, tool_use

MAX_PROMPTS = 1024  # of one call, as elsewhere: an evaluation harness sends its whole batch in one
MAX_SAMPLES = 4096  # prompts times n of one call, where one prompt's n may not be more: their answers are kept here
# Of one field, prompts times the ids in it: each prompt carries them to the engine, which takes 0.12 to 0.17 µs and 40
# bytes for one. 4,096 ids for each of 1,024 prompts are 0.6 s and 150 MiB there; a vocabulary of 150,000 for each would
# be 18 s and 5.8 GiB, from a body of a megabyte.
MAX_REPEATED_IDS = 1 << 22


@dataclass(frozen=True, slots=True)
class TextSide:
    """What turns text into ids and back, and the bounds that hold for them."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits
    ready: EngineReady
    defaults: Mapping[str, float | int]  # the model's own sampling defaults
    markup: Markup
    grammars: Grammars
    compile: Callable[[str], Renderer] | None = None  # of templates that requests bring; None = they may not

    def template_for(self, source: str | None) -> ChatTemplate:
        """The request's own template, else the model's. Raises 400 where there is none, or none may be brought."""
        if source is None:
            return require_chat_template(self.template)
        if self.compile is None:
            raise errors.unsupported(
                "chat_template",
                "`chat_template` is not supported by this server; leave it out. (A server that trusts its callers' "
                "templates is started with --trust-request-chat-template.)",
            )
        try:
            return ChatTemplate(source, self.tokenizer.named_tokens, compile=self.compile)
        except TemplateError as error:
            raise errors.invalid(f"`chat_template` is not usable: {reason(error)}.", "chat_template") from None


@dataclass(frozen=True, slots=True)
class Order:
    """Whose request it is and what it was promised; as in `AddRequest`, and the key whose quotas it is charged to.

    label  what its caller calls it
    notes  what is known of the HTTP request, for its trace
    """

    key: Key
    label: str
    notes: dict[str, Any]
    arrival: float
    tenant: str
    weight: float | None
    priority: int
    cache_salt: str
    slo: Slo
    timeout: float | None


def completion_size(body: CompletionBody, limits: Limits) -> Asked:
    """What `body` asks for, as far as its fields tell. Raises 400 for no prompt, too many of them or of samples."""
    prompt = body.prompt
    if prompt is None or prompt == "" or prompt == []:
        raise errors.invalid("`prompt` is required and must not be empty.", "prompt")
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise errors.invalid(
            f"`prompt` holds {len(prompts)} prompts; at most {MAX_PROMPTS} are taken in one call.", "prompt"
        )
    most = max(MAX_SAMPLES, limits.max_n)
    samples = len(prompts) * body.samples
    if samples > most:
        raise errors.invalid(f"prompts times `n` is {samples}; at most {most} are taken.", "n")
    return Asked(
        prompts=len(prompts),
        samples=samples,
        prompt_ids=sum(len(item) for item in prompts if isinstance(item, list)),
        prompt_bytes=sum(num_bytes(item) for item in prompts if isinstance(item, str)),
        longest_prompt=_longest_prompt(body),
        max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else max(body.max_tokens, 0),
        logprobs=body.logprobs is not None,
        prompt_logprobs=_prompt_logprobs(body) is not None,
    )


def chat_size(body: ChatBody) -> Asked:
    """What `body` asks for, as far as its fields tell. Tools, and calls that were made, are a part of the prompt."""
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return Asked(
        samples=body.samples,
        prompt_bytes=json_bytes(body.tools) + sum(_message_bytes(message) for message in body.messages),
        longest_prompt=_longest_prompt(body),
        max_tokens=None if asked is None else max(asked, 0),
        logprobs=bool(body.logprobs),
        prompt_logprobs=body.prompt_logprobs is not None,
    )


def _longest_prompt(body: GenerateBody) -> int | None:
    """Tokens that `truncate_prompt_tokens` leaves; None = what fits, as is -1. Other values are refused later."""
    keep = body.truncate_prompt_tokens
    return None if keep is None or keep < 1 else keep


def _message_bytes(message: dict[str, Any]) -> int:
    return _content_bytes(message.get("content")) + json_bytes(message.get("tool_calls"))


def json_bytes(value: Any) -> int:
    """Of `value` as JSON, none of nothing. An estimate: what is nested too deeply is refused where it is read."""
    try:
        return len(msgspec.json.encode(value)) if value else 0
    except RecursionError:
        return 0


def _content_bytes(content: Any) -> int:
    """Of a message: text, or parts of which some have text."""
    if isinstance(content, list):
        return sum(_content_bytes(part.get("text")) for part in content if isinstance(part, dict))
    return num_bytes(content) if isinstance(content, str) else 0


def num_bytes(text: str) -> int:
    """In UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def completion_request(body: CompletionBody, text: TextSide, order: Order) -> GenerateRequest:
    """Raises ApiError or RequestError for whatever cannot be served as asked."""
    if body.max_tokens == 0 and not body.echo:
        raise errors.invalid("`max_tokens` must be at least 1; 0 is for `echo` only.", "max_tokens")
    prompts = []
    encoded = Encoded()
    sources = _sources(body.prompt)
    # By max_tokens: beside the seed all that differs between prompts, and by what is left of the context at most.
    params: dict[int, SamplingParams] = {}
    for source in sources:
        if isinstance(source, str):
            whole = _encode(source, text, body)
            encoded = Encoded(encoded.num_bytes + num_bytes(source), encoded.num_tokens + len(whole))
        else:
            whole = source
        ids = _truncated(whole, body, text, body.max_tokens or 0)
        room = max(text.ready.max_model_len - len(ids), 1)
        max_tokens = min(DEFAULT_COMPLETION_TOKENS, room) if body.max_tokens is None else body.max_tokens
        check_length(len(ids), max_tokens, text.ready.max_model_len)
        valid_token_ids(ids, text.ready.vocab_size, "prompt")
        if max_tokens not in params:
            params[max_tokens] = _params(
                body, text, max_tokens, body.num_logprobs, _prompt_logprobs(body), body.grammar
            )
            _check_repeated(params[max_tokens], len(sources))
        own = replace(params[max_tokens], seed=_seed(body))
        prompts.append(Prompt(ids, own, source if isinstance(source, str) and len(ids) == len(whole) else None))
    return _request(body, prompts, order, encoded)


def chat_request(body: ChatBody, text: TextSide, order: Order) -> GenerateRequest:
    """Raises ApiError or RequestError for whatever cannot be served as asked."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is not None and max_tokens < 1:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise errors.invalid(f"`{name}` must be at least 1, got {max_tokens}.", name)
    use = tool_use(body, text.markup)
    rendered = render_chat(body, text, use.tools if use else None)
    whole = encode_chat(rendered, body, text)
    ids = _truncated(whole, body, text, max_tokens or 0)
    unbound = max_tokens is None
    if max_tokens is None:
        room = max(text.ready.max_model_len - len(ids), 1)
        max_tokens = min(int(text.defaults.get("max_tokens", room)), room)
    format = answer_format(body, use, text.markup, rendered)
    asked = required_calls(body, use, text.markup) or body.grammar
    thinking = thinking_of(body, text.markup, opened=format.opened, awaited=asked is not None)
    params = _params(body, text, max_tokens, body.num_logprobs, body.prompt_logprobs, asked, thinking)
    check_length(len(ids), max_tokens, text.ready.max_model_len)
    encoded = Encoded(num_bytes(rendered), len(whole))
    return _request(body, [Prompt(ids, params)], order, encoded, format, unbound=unbound)


def chat_prompt(body: ChatBody, text: TextSide) -> list[int]:
    """The ids that the answer to `body` would continue."""
    use = tool_use(body, text.markup)
    return encode_chat(render_chat(body, text, use.tools if use else None), body, text)


def render_chat(body: ChatBody | TokenizeBody, text: TextSide, tools: list[dict[str, Any]] | None) -> str:
    """The conversation as the model's template writes it, with the tools that may be used."""
    continue_final = bool(body.continue_final_message)
    template = text.template_for(body.chat_template)
    return template.render(
        body.messages,
        tools=tools,
        add_generation_prompt=not continue_final if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continue_final,
        variables=_template_variables(body, template),
    )


def _template_variables(body: ChatBody | TokenizeBody, template: ChatTemplate) -> dict[str, Any]:
    """What the caller sets for the template. An effort also switches thinking, where that is all there is to switch."""
    variables = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatBody) and body.documents is not None:
        if "documents" not in template.variables:
            raise errors.unsupported(
                "documents", "This model's chat template reads no `documents`; put their text into a message."
            )
        variables["documents"] = body.documents
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        _set_effort(variables, body.reasoning_effort, template)
    return variables


def _set_effort(variables: dict[str, Any], effort: str, template: ChatTemplate) -> None:
    """As far as the template reads it. Raises 400 where it does not, unless none is what was asked for."""
    if "reasoning_effort" in template.variables and effort != "none":
        variables.setdefault("reasoning_effort", effort)
    if "enable_thinking" in template.variables:
        variables.setdefault("enable_thinking", effort != "none")
    elif "reasoning_effort" not in template.variables and effort != "none":
        raise errors.unsupported(
            "reasoning_effort", "`reasoning_effort`: this model's chat template reads none; leave it out."
        )


def encode_chat(rendered: str, body: ChatBody | TokenizeBody, text: TextSide) -> list[int]:
    """The ids of a rendered conversation."""
    text.tokenizer.check_bytes(rendered, text.ready.max_model_len, "messages")
    return text.tokenizer.encode(rendered, add_special_tokens=bool(body.add_special_tokens))


def _sources(prompt: Any) -> list[str] | list[list[int]]:
    """`prompt` as a list of texts or of id lists. Raises 400 for anything else."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            empty = next((i for i, item in enumerate(prompt) if not item), None)
            if empty is not None:
                raise errors.invalid(f"`prompt[{empty}]` is empty.", "prompt")
            return prompt
        lists = [prompt] if type(prompt[0]) is int else prompt
        if all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in lists):
            return lists
    raise errors.invalid(
        "`prompt` must be text, a list of texts, a list of token ids or a list of such lists, none of them empty.",
        "prompt",
    )


def _encode(source: str, text: TextSide, body: GenerateBody) -> list[int]:
    text.tokenizer.check_bytes(source, text.ready.max_model_len)
    ids = text.tokenizer.encode(source, add_special_tokens=body.add_special_tokens is not False)
    if not ids:
        raise errors.invalid("`prompt` has no tokens.", "prompt")
    return ids


def _prompt_logprobs(body: CompletionBody) -> int | None:
    """An echoed prompt shows log-probabilities as its continuation does; -1 is the whole vocabulary."""
    asked = [value for value in (body.prompt_logprobs, body.logprobs if body.echo else None) if value is not None]
    return None if not asked else -1 if -1 in asked else max(asked)


def _truncated(ids: list[int], body: GenerateBody, text: TextSide, max_tokens: int) -> list[int]:
    """The last `truncate_prompt_tokens` ids, or the first; -1 keeps what fits beside max_tokens."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    longest = text.ready.max_model_len - max_tokens
    if keep != -1 and not 1 <= keep <= text.ready.max_model_len:
        raise errors.invalid(
            f"`truncate_prompt_tokens` must be -1 or between 1 and {text.ready.max_model_len}, got {keep}.",
            "truncate_prompt_tokens",
        )
    keep = max(longest, 1) if keep == -1 else keep
    return ids[:keep] if body.truncation_side == "right" else ids[-keep:]


def _params(
    body: GenerateBody,
    text: TextSide,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    asked: tuple[Grammar, str] | None,
    thinking: Thinking | None = None,
) -> SamplingParams:
    """Unset fields take the model's defaults, then OpenAI's. asked: the grammar, and the field that it comes from."""

    def chosen(name: str, default: float) -> float:
        value = getattr(body, name)
        return text.defaults.get(name, default) if value is None else value

    top_k = int(chosen("top_k", 0))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        n=body.samples,
        temperature=chosen("temperature", 1.0),
        top_k=0 if top_k == -1 else top_k,  # both mean off
        top_p=chosen("top_p", 1.0),
        min_p=chosen("min_p", 0.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=chosen("repetition_penalty", 1.0),
        seed=_seed(body),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logit_bias=_logit_bias(body.logit_bias),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        bad_words=_bad_words(body.bad_words, text.tokenizer),
        logprobs=logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        prompt_logprobs=prompt_logprobs,
        repetition=body.repetition,
        grammar=_grammar(asked, text.grammars),
        thinking=thinking,
    )
    check_params(params, text.limits)
    return params


def _seed(body: GenerateBody) -> int:
    """Unset must mean different answers each time, and noise is a function of the seed alone."""
    return secrets.randbits(63) if body.seed is None else body.seed


def _check_repeated(params: SamplingParams, num_prompts: int) -> None:
    """What each prompt carries is bounded for all of them together. Raises 400."""
    for field, size in (
        ("allowed_token_ids", len(params.allowed_token_ids or ())),
        ("bad_words", sum(len(word) for word in params.bad_words)),
    ):
        if size * num_prompts > MAX_REPEATED_IDS:
            raise errors.invalid(
                f"`{field}` comes to {size} token ids for each of {num_prompts} prompts; together at most "
                f"{MAX_REPEATED_IDS} are taken: send fewer prompts in a call.",
                field,
            )


def _grammar(asked: tuple[Grammar, str] | None, grammars: Grammars) -> Grammar | None:
    """Compiled here too, so that one that is wrong is refused before the engine hears of it. Raises 400."""
    if asked is None:
        return None
    grammar, field = asked
    try:
        grammars.begin(grammar)
    except RequestError as error:
        raise errors.invalid(f"`{field}`: {error}.", field) from None
    return grammar


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float]:
    try:
        return clamp_logit_bias({int(token_id): value for token_id, value in (given or {}).items()})
    except ValueError:
        raise errors.invalid("The keys of `logit_bias` must be token ids.", "logit_bias") from None


def _bad_words(words: list[str] | None, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A word is spelled by other tokens at the start of a text than after a space: both are forbidden."""
    spelled: dict[tuple[int, ...], None] = {}
    for word in words or ():
        if not word.strip():
            raise errors.invalid("`bad_words` cannot contain an empty string.", "bad_words")
        for variant in (word, " " + word.lstrip()):
            spelled[tuple(tokenizer.encode(variant, add_special_tokens=False))] = None
    return tuple(spelled)


def _request(
    body: GenerateBody,
    prompts: list[Prompt],
    order: Order,
    encoded: Encoded,
    format: AnswerFormat | None = None,
    *,
    unbound: bool = False,
) -> GenerateRequest:
    format = format or AnswerFormat()
    options = TextOptions(
        stop=body.stops,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        spaces_between_special_tokens=body.spaces_between_special_tokens is not False,
        markup_ids=format.markup_ids,
    )
    check_stop(options.stop)
    return GenerateRequest(
        prompts=prompts,
        text_options=options,
        arrival=order.arrival,
        priority=order.priority,
        cache_salt=order.cache_salt,
        tenant=order.tenant,
        weight=order.weight,
        slo=order.slo,
        timeout=order.timeout,
        speculative=body.speculation,
        format=format,
        interval=body.interval,
        encoded=encoded,
        unbound=unbound,
    )
