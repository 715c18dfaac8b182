"""What callers send: OpenAI's request shapes with the extras that vLLM and SGLang made common.

Types are strict (no "1", 1.0 or true for 1) and null means the default everywhere. Ranges are not checked here but in
`engine/validation.py`, which the offline API shares. Three kinds of fields do nothing, each on purpose:

unknown     accepted, and named in the debug log: newer clients must not fail
NO_EFFECT   known and harmless: labels and hints that change no token
NOT_BUILT   known and not harmless: refused by name unless it says what happens anyway
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from ..engine.chat import MAX_MESSAGES
from ..engine.messages import Slo, Speculative
from ..engine.validation import (
    MAX_BAD_WORDS,
    MAX_STOP_TOKEN_IDS,
    MAX_TENANT_BYTES,
    Limits,
    check_promises,
    check_speculative,
)
from ..scheduler.params import Grammar, Repetition
from . import errors, shapes
from .logs import logger
from .structured import GUIDED, grammar_of

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what the wire to the engine can carry
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # to think with, as OpenAI's
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions only

MAX_QUESTIONS = 400  # of one call, as OpenAI's
MAX_ABORTED = 10_000  # ids in one call
# Where equal ones count once, or the model's own vocabulary is the bound: twice the widest one there is.
MAX_LISTED_IDS = 1 << 19

ID_NAMES = AliasChoices("request_id", "rid")

# Accepted and without effect here.
NO_EFFECT = frozenset(
    {
        "guided_decoding_backend", "metadata", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
        "verbosity",
    }
)  # fmt: skip

# field -> the values, beside null, that ask for nothing
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (),  # n is what it may be equal to: checked where n is known
    "chat_template": (),
    "extra_key": ("",),
    "function_call": ("none",),
    "functions": (),
    "kv_transfer_params": (),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "separate_reasoning": (True,),
    "stop_regex": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none",),
    "tools": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "web_search_options": (),
}
# field -> why, or what to send instead, where there is more to say than that it is not supported
REMEDIES = {
    "best_of": "ask for `n` samples",
    "extra_key": "send `cache_salt`",
    "separate_reasoning": "thinking always comes apart; `include_reasoning` false leaves it out",
    "suffix": "this model has no format for filling a gap",
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def refuse_unbuilt(self) -> None:
        """Raises 400 for the first field that asks for something this server cannot do."""
        extras = self.model_extra or {}
        tells = logger.isEnabledFor(logging.DEBUG)
        for name, value in extras.items():
            if name in NOT_BUILT:
                if value is not None and value not in NOT_BUILT[name] and not self._is_what_happens_anyway(name, value):
                    remedy = REMEDIES.get(name, "leave it out")
                    raise errors.unsupported(name, f"`{name}` is not supported by this server; {remedy}.")
            elif tells and name not in NO_EFFECT:
                logger.debug("a request has the unknown field %s", errors.shown(name))

    def _is_what_happens_anyway(self, name: str, value: Any) -> bool:
        return False


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SloBody(BaseModel):
    """Promises that a request asks for, in milliseconds from its arrival; `itl_ms` between two tokens of a sample."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    ttft_ms: float | None = None
    itl_ms: float | None = None
    deadline_ms: float | None = None

    def promises(self) -> Slo:
        """In seconds. Raises 400 for a promise that nobody here knows: ignored, it would be broken in silence."""
        _refuse_extras(self, "slo")
        ttft, itl, deadline = (
            None if milliseconds is None else milliseconds / 1e3
            for milliseconds in (self.ttft_ms, self.itl_ms, self.deadline_ms)
        )
        return Slo(ttft=ttft, itl=itl, deadline=deadline)


class RepetitionBody(BaseModel):
    """When a sample that repeats itself ends: after `min_count` repetitions of a pattern of so many tokens."""

    model_config = ConfigDict(strict=True, extra="allow")

    max_pattern_size: Integer
    min_pattern_size: Integer | None = None
    min_count: Integer | None = None

    def wish(self) -> Repetition | None:
        """None where the largest pattern is 0, which is off. Raises 400 for a key that nobody here knows."""
        _refuse_extras(self, "repetition_detection")
        if self.max_pattern_size == 0:
            return None
        given = {"min_pattern_size": self.min_pattern_size, "min_count": self.min_count}
        return Repetition(
            max_pattern_size=self.max_pattern_size,
            **{name: value for name, value in given.items() if value is not None},
        )


class SpeculativeBody(BaseModel):
    """What a request wishes of speculation: who guesses ahead, and how many tokens at most."""

    model_config = ConfigDict(strict=True, extra="allow")

    method: str | None = None
    num_tokens: Integer | None = None

    def wish(self) -> Speculative:
        """Raises 400 for a key that nobody here knows."""
        _refuse_extras(self, "speculative")
        return Speculative(method=self.method, num_tokens=self.num_tokens)


def _refuse_extras(body: SloBody | SpeculativeBody | RepetitionBody, name: str) -> None:
    for extra in body.model_extra or {}:
        param = f"{name}.{errors.shown(extra)}"
        raise errors.invalid(f"`{param}` is unknown; `{name}` holds {', '.join(type(body).model_fields)}.", param)


class OrderBody(_Body):
    """Whose request it is and what it was promised: the fields of every route that asks the model something."""

    model: str | None = None
    priority: Integer | None = None
    tenant: Annotated[str, Field(min_length=1, max_length=MAX_TENANT_BYTES)] | None = None
    slo: SloBody | None = None
    timeout: float | None = None  # seconds from arrival
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    # The suffix of the answer's id.
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(None, validation_alias=ID_NAMES)
    session_id: Annotated[str, Field(max_length=256)] | None = None  # a label of traces

    @property
    def promises(self) -> Slo:
        return Slo() if self.slo is None else self.slo.promises()


class GenerateBody(OrderBody):
    """The fields that both generating endpoints share."""

    n: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Integer | None = None
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Integer], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Annotated[list[Integer], Field(max_length=MAX_LISTED_IDS)] | None = None
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Integer | None = None  # tokens of an event
    speculative: SpeculativeBody | None = None
    repetition_detection: RepetitionBody | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: Literal["left", "right"] | None = None
    logprob_token_ids: Annotated[list[Integer], Field(max_length=MAX_LISTED_IDS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_prompt_text: bool | None = None
    response_format: shapes.ResponseFormat | None = None
    structured_outputs: shapes.StructuredOutputs | None = None
    guided_json: shapes.Schema | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def grammar(self) -> tuple[Grammar, str] | None:
        """What the text must be, and the field that says so. Raises 400."""
        guided = {name: getattr(self, name) for name in GUIDED}
        return grammar_of(self.response_format, self.structured_outputs, guided)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def speculation(self) -> Speculative:
        return Speculative() if self.speculative is None else self.speculative.wish()

    @property
    def repetition(self) -> Repetition | None:
        return None if self.repetition_detection is None else self.repetition_detection.wish()

    @property
    def interval(self) -> int:
        return (self.stream_interval or 1) if self.stream else 1

    def check_together(self, limits: Limits) -> None:
        """What no single field's type can say, as far as it needs no tokens. Raises 400."""
        self.refuse_unbuilt()
        if not 1 <= self.samples <= limits.max_n:  # before admission, which counts them
            raise errors.invalid(f"`n` must be between 1 and {limits.max_n}, got {self.n}.", "n")
        check_promises(self.promises, self.timeout)
        check_speculative(self.speculation, limits)
        if self.stream_options is not None and not self.stream:
            raise errors.invalid("Stream options can only be defined when `stream=True`.", "stream_options")
        if self.stream_interval is not None and self.stream_interval < 1:
            raise errors.invalid(
                f"`stream_interval` must be at least 1, got {self.stream_interval}.", "stream_interval"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise errors.invalid("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")

    def _is_what_happens_anyway(self, name: str, value: Any) -> bool:
        return name == "best_of" and type(value) is int and value == self.samples


class CompletionBody(GenerateBody):
    # Text, texts, ids or lists of ids; told apart in `inputs.py`, off the event loop: it may hold a million ids.
    prompt: shapes.Prompt = None
    echo: bool | None = None
    logprobs: Integer | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Rivals of each token; tokens that are named show log-probabilities in any case."""
        return 0 if self.logprobs is None and self.logprob_token_ids else self.logprobs


class ChatBody(GenerateBody):
    messages: shapes.Messages
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool | None = None
    reasoning_effort: Effort | None = None
    tools: shapes.Tools | None = None
    tool_choice: shapes.ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: shapes.Functions | None = None  # the older names of the two (functions.py)
    function_call: shapes.FunctionChoice | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Integer | None = None

    def check_together(self, limits: Limits) -> None:
        super().check_together(limits)
        if len(self.messages) > MAX_MESSAGES:  # before their size is taken
            raise errors.invalid(
                f"`messages` has {len(self.messages)} entries; at most {MAX_MESSAGES} are taken: leave out the oldest.",
                "messages",
            )
        if self.top_logprobs is not None and self.top_logprobs != 0 and not self.logprobs:
            raise errors.invalid("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise errors.invalid("`top_logprobs` must be a positive value.", "top_logprobs")

    @property
    def num_logprobs(self) -> int | None:
        """Rivals of each token; tokens that are named show log-probabilities in any case."""
        return (self.top_logprobs or 0) if self.logprobs or self.logprob_token_ids else None

    @property
    def final_text(self) -> str:
        """Of the last message, its parts joined as templates read them."""
        content = self.messages[-1].get("content") if self.messages else None
        if isinstance(content, list):
            content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return content if isinstance(content, str) else ""

    @property
    def echoed(self) -> str:
        """The text of the assistant's own last message, with which an answer begins that goes on writing it."""
        is_own = self.echo and self.messages and self.messages[-1].get("role") == "assistant"
        return self.final_text if is_own else ""


class TokenizeBody(_Body):
    """Either `prompt`, or `messages` with the options of a chat request."""

    model: str | None = None
    prompt: str | None = None
    messages: shapes.Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: shapes.Tools | None = None


class QuestionBody(_Body):
    type: Literal["predicate", "choice", "score"]
    name: str | None = None
    instructions: shapes.Instructions
    choices: shapes.Choices | None = None
    levels: shapes.Levels | None = None


class DecisionBody(OrderBody):
    """Text or messages, and questions about them."""

    input: shapes.DecisionInput
    questions: list[QuestionBody] = Field(min_length=1, max_length=MAX_QUESTIONS)

    def check_together(self) -> None:
        """Raises 400."""
        self.refuse_unbuilt()
        check_promises(self.promises, self.timeout)


class AbortBody(_Body):
    """Ids of requests, as their callers gave or were given them."""

    request_ids: list[str] = Field(min_length=1, max_length=MAX_ABORTED)


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[Integer]
