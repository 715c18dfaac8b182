"""`quire.LLM`: a model in this process, for scripts and notebooks.

with quire.LLM() as llm:
    for answer in llm.generate(["def fib(n):"], quire.SamplingParams(max_tokens=64), stop=["\\n\\n"]):
        print(answer.outputs[0].text)
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import msgspec
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..scheduler.params import SamplingParams, Slo, Speculative
from ..scheduler.plan import TokenLogprob
from .chat import load_chat_template, require_chat_template
from .client import EngineClient, News
from .config import BUNDLED_MODEL, EngineConfig
from .errors import EngineDeadError, RequestError
from .grammar import Grammars, Vocabulary
from .messages import Abort, AddRequest, EngineDead, Progress, StepOutputs
from .outputs import RequestStream, SampleOutput, TextOptions
from .start_bar import StartBar
from .tokenizer import load_tokenizer
from .validation import (
    check_length,
    check_order,
    check_params,
    check_promises,
    check_speculative,
    check_stop,
    clamp_logit_bias,
    limits_of,
    shown,
    valid_token_ids,
)

DEFAULT_MAX_TOKENS = 256  # where neither the caller nor the model says: a paragraph or a function

Prompt = str | list[int]
Message = Mapping[str, Any]
Messages = Sequence[Message]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt.

    prompt           as it was given or, for a chat, as the template wrote it; None for ids
    prompt_ids       what the model read
    outputs          n samples; one whose finish_reason is "error" has the reason in `error`, and one that is "expired"
                     the limit: "timeout", "deadline" or "unreachable"
    prompt_logprobs  of the prompt's second token onwards, when asked for
    num_cached       prompt tokens that came from the prefix cache
    """

    prompt: str | None
    prompt_ids: list[int]
    outputs: list[SampleOutput]
    prompt_logprobs: list[TokenLogprob] | None
    num_cached: int


@dataclass(slots=True)
class _Request:
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    stream: RequestStream
    outputs: dict[int, SampleOutput] = field(default_factory=dict)  # of samples that have begun


@dataclass(frozen=True, slots=True)
class _Terms:
    """As in `AddRequest`."""

    slo: Slo
    timeout: float | None
    tenant: str
    speculative: Speculative


class LLM:
    """A model and its engine. Close it, or use it in a `with` block, to give its memory and threads back.

    model     "bundled", a folder in Hugging Face layout, or a hub id
    progress  draw the start, if there is a terminal to draw on
    settings  the fields of `EngineConfig`: max_model_len, dtype, device, kv_cache_bytes, ...

    Calls from several threads wait for each other. Raises EngineStartError if the engine does not come up.
    """

    def __init__(self, model: str = BUNDLED_MODEL, *, progress: bool = True, **settings: Any) -> None:
        self._connect(_inproc_client(EngineConfig(model=model, **settings)), progress)

    @classmethod
    def from_client(cls, client: EngineClient, *, progress: bool = True) -> Self:
        """An LLM that speaks to an engine of the caller's own making; it is started here and closed with the LLM."""
        llm = cls.__new__(cls)
        llm._connect(client, progress)
        return llm

    def _connect(self, client: EngineClient, progress: bool) -> None:
        self._client = client
        self._inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._one_call = threading.Lock()
        self._caller: int | None = None  # the thread whose call runs
        bar = StartBar()

        def hear(news: News) -> None:
            if not isinstance(news, Progress):
                self._inbox.put(news)
            elif progress:
                bar.tell(news)

        try:
            with closing(bar):
                self.info = client.start(hear)
            self.tokenizer = load_tokenizer(self.info.model_path)
            self._template = load_chat_template(self.tokenizer)
        except BaseException:
            client.close()
            raise
        self._limits = limits_of(self.info)
        self._grammars = Grammars(lambda: Vocabulary(self.tokenizer, self.info.vocab_size))

    def default_params(self) -> SamplingParams:
        """What is used where no parameters are given: the model's own recommendations, and seed 0."""
        return SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **self.tokenizer.generation_defaults})  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        slo: Slo | None = None,
        timeout: float | None = None,
        tenant: str = "",
        speculative: Speculative | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; answers come in the prompts' order.

        prompts          one text, or a list of texts and of token-id lists
        sampling_params  one for all, one each, or None: `default_params`, cut to what fits the context
        stop, ...        as in `TextOptions`, for all prompts
        slo, timeout     promises and limit of each prompt, in seconds from this call
        tenant           whose prompts these are, under the policy "fair"
        speculative      who guesses ahead for them and how far, within what the engine was started with. It changes how
                         fast tokens come, not which; a sample's num_drafted and num_accepted say how it went

        Raises RequestError, naming the prompt's index, before anything is drawn, if any prompt cannot be served as
        asked. A sample that fails later has finish_reason "error", one that runs out of time "expired", and leaves the
        others alone.
        Raises EngineDeadError if the engine itself is gone.
        """
        terms = self._terms(slo, timeout, tenant, speculative)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded: list[tuple[str | None, list[int]]] = []
        for i, prompt in enumerate(texts):
            with _naming(f"prompts[{i}]"):
                encoded.append((prompt if isinstance(prompt, str) else None, self._ids(prompt)))
        options = _text_options(stop, include_stop_str_in_output, skip_special_tokens, spaces_between_special_tokens)
        return self._run(encoded, "prompts", sampling_params, options, terms, progress)

    def samples(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        verify: Callable[[SampleOutput], bool] | None = None,
        *,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        slo: Slo | None = None,
        timeout: float | None = None,
        tenant: str = "",
        speculative: Speculative | None = None,
    ) -> Generator[SampleOutput]:
        """The n samples of one prompt, each when it ends: the shortest come first.

        verify  asked of every sample that ends by itself; the first that it says True to is the last one, and what has
                not ended by then is cancelled. Repeated sampling costs as much as it takes (arXiv 2407.21787)

        Ending the loop cancels the rest as well. Until it has ended, calls from other threads wait and those from this
        one raise RuntimeError. For the rest as `generate`.
        """
        terms = self._terms(slo, timeout, tenant, speculative)
        encoded = [(prompt if isinstance(prompt, str) else None, self._ids(prompt))]
        options = _text_options(stop, include_stop_str_in_output, skip_special_tokens, spaces_between_special_tokens)
        return self._samples(self._requests(encoded, None, sampling_params, options), terms, verify)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        slo: Slo | None = None,
        timeout: float | None = None,
        tenant: str = "",
        speculative: Speculative | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several: `generate` on what the model's chat template writes.

        messages  [{"role": "user", "content": "..."}, ...], or a list of such lists; see `ChatTemplate.render` for the
                  template's options
        """
        terms = self._terms(slo, timeout, tenant, speculative)
        template = require_chat_template(self._template)
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages

        encoded: list[tuple[str | None, list[int]]] = []
        for i, conversation in enumerate(conversations):
            with _naming(f"messages[{i}]"):
                text = template.render(
                    conversation,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    variables=chat_template_kwargs,
                )
                self.tokenizer.check_bytes(text, self.info.max_model_len, "messages")
                encoded.append((text, self.tokenizer.encode(text, add_special_tokens=False)))
        options = _text_options(stop, include_stop_str_in_output, skip_special_tokens, spaces_between_special_tokens)
        return self._run(encoded, "messages", sampling_params, options, terms, progress)

    def close(self) -> None:
        """Stop the engine; idempotent."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            self.tokenizer.check_bytes(prompt, self.info.max_model_len)
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence):
            raise RequestError(f"must be text or a list of token ids, not {shown(prompt)}", "prompts")
        ids = list(prompt)
        valid_token_ids(ids, self.info.vocab_size, "prompt")
        return ids

    def _terms(self, slo: Slo | None, timeout: float | None, tenant: str, speculative: Speculative | None) -> _Terms:
        if slo is not None and not isinstance(slo, Slo):
            raise RequestError(f"slo must be a Slo, not {shown(slo)}", "slo")
        if speculative is not None and not isinstance(speculative, Speculative):
            raise RequestError(f"speculative must be a Speculative, not {shown(speculative)}", "speculative")
        terms = _Terms(
            Slo() if slo is None else slo, timeout, tenant, Speculative() if speculative is None else speculative
        )
        check_order(0, tenant, self._limits)
        check_promises(terms.slo, timeout)
        check_speculative(terms.speculative, self._limits)
        return terms

    def _run(
        self,
        encoded: list[tuple[str | None, list[int]]],
        param: str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: TextOptions,
        terms: _Terms,
        progress: bool,
    ) -> list[RequestOutput]:
        requests = self._requests(encoded, param, sampling_params, options)
        with (
            self._turn(),
            closing(self._ends(requests, terms)) as ends,
            tqdm(total=len(requests), disable=not progress, unit="prompt") as bar,
        ):
            for request, _ in ends:
                if request.stream.finished:
                    bar.update()
        return [
            RequestOutput(
                r.prompt,
                r.prompt_ids,
                [r.outputs[index] for index in range(r.params.n)],
                r.stream.prompt_logprobs,
                r.stream.num_cached,
            )
            for r in requests.values()
        ]

    def _samples(
        self, requests: dict[str, _Request], terms: _Terms, verify: Callable[[SampleOutput], bool] | None
    ) -> Generator[SampleOutput]:
        with self._turn(), closing(self._ends(requests, terms)) as ends:
            for request, sample in ends:
                del request.outputs[sample.index]
                done = verify is not None and sample.finish_reason in ("stop", "length") and verify(sample)
                if done:
                    ends.close()  # before the caller takes its time over the sample
                yield sample
                if done:
                    return

    def _requests(
        self,
        encoded: list[tuple[str | None, list[int]]],
        param: str | None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: TextOptions,
    ) -> dict[str, _Request]:
        """Checked. `param`: the caller's list, whose entries refusals name."""
        each = self._params_for(encoded, sampling_params)
        requests: dict[str, _Request] = {}
        for i, ((prompt, ids), params) in enumerate(zip(encoded, each, strict=True)):
            with nullcontext() if param is None else _naming(f"{param}[{i}]"):
                check_params(params, self._limits)
                params = _as_sent(params)
                check_length(len(ids), params.max_tokens, self.info.max_model_len)
                if params.grammar is not None:
                    self._grammars.begin(params.grammar)
            stream = RequestStream(self.tokenizer, options, ids, n=params.n, min_tokens=params.min_tokens)
            requests[uuid.uuid4().hex] = _Request(prompt, ids, params, stream)
        return requests

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time."""
        if self._caller == threading.get_ident():
            raise RuntimeError("this LLM is in the middle of samples(): finish or close that loop first")
        with self._one_call:
            self._caller = threading.get_ident()
            try:
                yield
            finally:
                self._caller = None

    def _params_for(
        self, encoded: list[tuple[str | None, list[int]]], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None:
            default = self.default_params()
            rooms = [max(self.info.max_model_len - len(ids), 1) for _, ids in encoded]
            return [replace(default, max_tokens=min(default.max_tokens, room)) for room in rooms]
        each = [given] * len(encoded) if isinstance(given, SamplingParams) else list(given)
        if len(each) != len(encoded):
            raise RequestError(
                f"sampling_params has {len(each)} entries for {len(encoded)} prompts; give one, or one for each",
                "sampling_params",
            )
        return [
            replace(
                params,
                top_k=0 if params.top_k == -1 else params.top_k,
                logit_bias=clamp_logit_bias(params.logit_bias),
            )
            for params in each
        ]

    def _ends(self, requests: dict[str, _Request], terms: _Terms) -> Generator[tuple[_Request, SampleOutput]]:
        """Send all, fold what comes; every sample when it ends. Whatever interrupts this aborts the rest."""
        unfinished = dict(requests)
        try:
            now = time.monotonic()
            for request_id, request in requests.items():
                self._client.send(
                    AddRequest(
                        request_id,
                        request.prompt_ids,
                        request.params,
                        arrival=now,
                        tenant=terms.tenant,
                        slo=terms.slo,
                        timeout=terms.timeout,
                        speculative=terms.speculative,
                    )
                )
            while unfinished:
                yield from self._fold(self._inbox.get(), unfinished)
        finally:
            if unfinished:
                with suppress(EngineDeadError):
                    self._client.send(Abort(list(unfinished)))

    def _fold(self, message: News, unfinished: dict[str, _Request]) -> Iterator[tuple[_Request, SampleOutput]]:
        """Fold one message; the samples that it ended. Chunks of requests that are over are the engine's last words."""
        if isinstance(message, EngineDead):
            raise EngineDeadError(message.reason)
        for chunk in message.chunks if isinstance(message, StepOutputs) else ():
            request = unfinished.get(chunk.request_id)
            if request is None:
                continue
            delta = request.stream.fold(chunk)
            if delta.is_empty and not delta.num_drawn:
                continue
            output = request.outputs.get(chunk.index)
            if output is None:
                output = request.outputs[chunk.index] = SampleOutput(chunk.index)
            output.add(delta)
            if delta.finish_reason is not None:
                if request.stream.ended_early(delta):
                    self._client.send(Abort([chunk.request_id], chunk.index))
                if request.stream.finished:
                    del unfinished[chunk.request_id]
                yield request, output


def _inproc_client(config: EngineConfig) -> EngineClient:
    from .inproc import InprocClient  # brings torch, which a caller with an engine elsewhere need not load

    client: EngineClient = InprocClient(config)
    return client


def _text_options(
    stop: str | Sequence[str], include_stop: bool, skip_special_tokens: bool, spaces_between_special_tokens: bool
) -> TextOptions:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    check_stop(stops)
    return TextOptions(
        stop=stops,
        include_stop_str_in_output=include_stop,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )


def _as_sent(params: SamplingParams) -> SamplingParams:
    """As an engine in another process gets them: tuples, where the caller gave lists or sets of ids."""
    return msgspec.convert(msgspec.to_builtins(params), SamplingParams)


@contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Refusals inside say which entry of the caller's list they are about."""
    try:
        yield
    except RequestError as error:
        raise type(error)(f"{entry}: {error}", error.param) from None
