"""What one request asks for: plain values that cross every layer unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Promises asked for one request, in seconds; None = none.

    ttft      from arrival to the first token
    itl       between two tokens of a sample: bounds the steps that it is in
    deadline  from arrival to the last token: past it the request ends, and what cannot meet it need not begin
    """

    ttft: float | None = None
    itl: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculative:
    """What one request wishes of speculation; None = as the engine was started.

    method      "none", "ngram", or the engine's own
    num_tokens  guessed at most, one after another
    """

    method: str | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the text of a sample must be, from its first token to its end.

    kind    "json_object"     any JSON object; no source
            "json_schema"     a JSON Schema, as text
            "regex"           a regular expression that the whole text matches
            "choice"          one of several texts: a JSON list of them
            "lark"            a grammar in llguidance's Lark, or in GBNF
            "structural_tag"  free text with JSON between tags: {"structures": [...], "triggers": [...]}
    """

    kind: str
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """When a sample that goes round in circles ends: min_count repetitions of one pattern of so many tokens."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How a model marks its thinking, and how much of it there may be.

    start_ids  the tokens that begin it
    end_ids    the tokens that end it
    opened     the prompt has begun it
    budget     tokens between them at most, then the end is forced; None = as many as the model likes
    """

    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    opened: bool = False
    budget: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when drawing ends.

    Only ids and numbers: stop *strings* are matched where text is made, beside the detokenizer.
    Ranges are checked once at the door (`engine/validation.py`); here every value is taken as valid.

    max_tokens      tokens drawn at most, per sample; 0 computes the prompt only (echo, prompt logprobs)
    min_tokens      stop ids and EOS are masked out until this many tokens are drawn, or `grammar` leaves nothing else
    n               samples drawn from one prompt
    temperature     0 = greedy
    top_k           0 = off
    top_p, min_p    1 and 0 = off
    seed            with the sample index and the position, the only source of randomness
    stop_token_ids  end the sample; the id is reported as its stop reason
    ignore_eos      the model's own end tokens do not end the sample
    logit_bias      {token id: value added to its logit}
    allowed_token_ids  None = all
    bad_words       token sequences that are never completed
    logprobs        None = off, k = the drawn token and the k most likely, -1 = the whole vocabulary
    logprob_token_ids  beside those k, these tokens as well; needs logprobs
    prompt_logprobs as `logprobs`, for the prompt's own tokens
    repetition      when a sample that repeats itself ends; None = never
    thinking        where the answer begins, for a budget or a grammar; None = at once
    grammar         what the text must be; None = anything
    """

    max_tokens: int
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    repetition: Repetition | None = None
    grammar: Grammar | None = None
    thinking: Thinking | None = None

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on which tokens were drawn before it, beyond what the model makes of them."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or any(len(word) > 1 for word in self.bad_words)
            or self.grammar
            or self.thinking
        )
