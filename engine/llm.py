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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..scheduler.params import SamplingParams
from ..scheduler.plan import TokenLogprob
from .chat import load_chat_template, require_chat_template
from .client import EngineClient
from .config import BUNDLED_MODEL, EngineConfig
from .errors import EngineDeadError, RequestError
from .messages import Abort, AddRequest, EngineDead, StepOutputs
from .outputs import RequestStream, SampleOutput, TextOptions
from .tokenizer import load_tokenizer
from .validation import Limits, check_length, check_params, check_stop, clamp_logit_bias, shown, valid_token_ids

DEFAULT_MAX_TOKENS = 256  # where neither the caller nor the model says: a paragraph or a function

Prompt = str | list[int]
Message = Mapping[str, Any]
Messages = Sequence[Message]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt.

    prompt           as it was given or, for a chat, as the template wrote it; None for ids
    prompt_ids       what the model read
    outputs          n samples; one whose finish_reason is "error" has the reason in `error`
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
    outputs: list[SampleOutput]


class LLM:
    """A model and its engine. Close it, or use it in a `with` block, to give its memory and threads back.

    model     "bundled", a folder in Hugging Face layout, or a hub id
    settings  the fields of `EngineConfig`: max_model_len, dtype, device, kv_cache_bytes, ...

    Calls from several threads wait for each other. Raises EngineStartError if the engine does not come up.
    """

    def __init__(self, model: str = BUNDLED_MODEL, **settings: Any) -> None:
        self._connect(_inproc_client(EngineConfig(model=model, **settings)))

    @classmethod
    def from_client(cls, client: EngineClient) -> Self:
        """An LLM that speaks to an engine of the caller's own making; it is started here and closed with the LLM."""
        llm = cls.__new__(cls)
        llm._connect(client)
        return llm

    def _connect(self, client: EngineClient) -> None:
        self._client = client
        self._inbox: queue.SimpleQueue[StepOutputs | EngineDead] = queue.SimpleQueue()
        self._one_call = threading.Lock()
        try:
            self.info = client.start(self._inbox.put)
            self.tokenizer = load_tokenizer(self.info.model_path)
            self._template = load_chat_template(self.tokenizer)
        except BaseException:
            client.close()
            raise
        self._limits = Limits(self.info.vocab_size, self.info.max_model_len, self.info.max_logprobs)

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
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; answers come in the prompts' order.

        prompts          one text, or a list of texts and of token-id lists
        sampling_params  one for all, one each, or None: `default_params`, cut to what fits the context
        stop, ...        as in `TextOptions`, for all prompts

        Raises RequestError, naming the prompt's index, before anything is drawn, if any prompt cannot be served as
        asked. A sample that fails later has finish_reason "error" and leaves the others alone.
        Raises EngineDeadError if the engine itself is gone.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded: list[tuple[str | None, list[int]]] = []
        for i, prompt in enumerate(texts):
            with _naming(f"prompts[{i}]"):
                encoded.append((prompt if isinstance(prompt, str) else None, self._ids(prompt)))
        options = _text_options(stop, include_stop_str_in_output, skip_special_tokens, spaces_between_special_tokens)
        return self._run(encoded, "prompts", sampling_params, options, progress)

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
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several: `generate` on what the model's chat template writes.

        messages  [{"role": "user", "content": "..."}, ...], or a list of such lists; see `ChatTemplate.render` for the
                  template's options
        """
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
        return self._run(encoded, "messages", sampling_params, options, progress)

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

    def _run(
        self,
        encoded: list[tuple[str | None, list[int]]],
        param: str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: TextOptions,
        progress: bool,
    ) -> list[RequestOutput]:
        each = self._params_for(encoded, sampling_params)
        requests: dict[str, _Request] = {}
        for i, ((prompt, ids), params) in enumerate(zip(encoded, each, strict=True)):
            with _naming(f"{param}[{i}]"):
                check_params(params, self._limits)
                check_length(len(ids), params.max_tokens, self.info.max_model_len)
            stream = RequestStream(self.tokenizer, options, ids, n=params.n, min_tokens=params.min_tokens)
            outputs = [SampleOutput(index) for index in range(params.n)]
            requests[uuid.uuid4().hex] = _Request(prompt, ids, params, stream, outputs)
        with self._one_call:
            self._complete(requests, progress)
        return [
            RequestOutput(r.prompt, r.prompt_ids, r.outputs, r.stream.prompt_logprobs, r.stream.num_cached)
            for r in requests.values()
        ]

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

    def _complete(self, requests: dict[str, _Request], progress: bool) -> None:
        """Send all, fold what comes until all are finished; whatever interrupts this aborts the rest."""
        unfinished = dict(requests)
        try:
            now = time.monotonic()
            for request_id, request in requests.items():
                self._client.send(AddRequest(request_id, request.prompt_ids, request.params, arrival=now))
            with tqdm(total=len(requests), disable=not progress, unit="prompt") as bar:
                while unfinished:
                    for request_id in self._fold(self._inbox.get(), unfinished):
                        del unfinished[request_id]
                        bar.update()
        finally:
            if unfinished:
                with suppress(EngineDeadError):
                    self._client.send(Abort(list(unfinished)))

    def _fold(self, message: StepOutputs | EngineDead, unfinished: dict[str, _Request]) -> Iterator[str]:
        """Fold one message; the requests it finished. Chunks of requests that are over are the engine's last words."""
        if isinstance(message, EngineDead):
            raise EngineDeadError(message.reason)
        for chunk in message.chunks:
            request = unfinished.get(chunk.request_id)
            if request is None:
                continue
            delta = request.stream.fold(chunk)
            request.outputs[chunk.index].add(delta)
            if request.stream.ended_early(delta):
                self._client.send(Abort([chunk.request_id], chunk.index))
            if request.stream.finished:
                yield chunk.request_id


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


@contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Refusals inside say which entry of the caller's list they are about."""
    try:
        yield
    except RequestError as error:
        raise type(error)(f"{entry}: {error}", error.param) from None
