"""What crosses between the API side and the engine: typed msgpack, never pickle.

down  Launch (once, before all else)  AddRequest  Abort  Watch  Shutdown
up    Progress  EngineReady  Busy  StepOutputs (one a step, for all requests)  EngineDead
"""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from ..scheduler.params import SamplingParams, Slo, Speculative
from ..scheduler.plan import Chunk, TokenLogprob


class Launch(msgspec.Struct, frozen=True):
    """All that an engine process is told at its start, before anything else."""

    config: dict[str, object]  # the fields of EngineConfig
    log_level: int
    parent: int  # the process that the engine must not outlive


class AddRequest(msgspec.Struct, frozen=True, tag="add", omit_defaults=True):
    request_id: str  # made by the API side, unique for the engine's life
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    arrival: float = 0.0  # time.monotonic(); on Linux one clock for all processes of a machine
    cache_salt: str = ""  # prefix blocks are shared only between requests with equal salts
    tenant: str = ""  # who pays: the `fair` policy shares the engine out between tenants
    weight: float | None = None  # that tenant's share from now on; None = as the engine was started
    slo: Slo = Slo()
    speculative: Speculative = Speculative()
    timeout: float | None = None  # seconds from arrival after which the request ends, whatever it was doing


class Abort(msgspec.Struct, frozen=True, tag="abort", omit_defaults=True):
    request_ids: list[str]
    index: int | None = None  # of the sample that ends, while its siblings go on; None = all of them


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Somebody looks on: for so long, StepOutputs tell what each step was made of, and who holds what."""

    seconds: float


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop at once; whoever wants a drain waits for its requests first."""


class StepStats(msgspec.Struct, array_like=True, gc=False):
    """The engine's figures after a step. `*_total` count from the engine's start; the rest is the state now."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0  # held by requests
    kv_blocks_cached: int = 0  # free, but with a hash that a prompt could hit
    kv_blocks_total: int = 0
    step_tokens: int = 0  # rows that the model was given in this step
    step_seqs: int = 0
    launched_tokens: int = 0  # step_tokens, filled up to whole tiles
    predicted_seconds: float = 0.0  # what the step-time model said of this step before it ran
    step_time_error: float = 0.0  # its mean relative error over recent steps
    step_cost: tuple[float, ...] = ()  # its coefficients: the fields of scheduler.step_time.StepCost
    queue_seconds: float = 0.0  # predicted wait of a request that came now
    schedule_seconds: float = 0.0  # this step: schedule() and update()
    forward_seconds: float = 0.0  # this step: model and sampling
    steps_total: int = 0
    requests_total: int = 0  # AddRequests taken in, refused ones included: what these figures know of
    prompt_tokens_total: int = 0  # computed, recomputed ones included
    generated_tokens_total: int = 0
    prefix_query_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    preemptions_total: int = 0
    recomputed_tokens_total: int = 0  # the preemption tax
    evicted_blocks_total: int = 0  # cached blocks handed out for something else
    expired_total: int = 0  # samples that ran out of time, waiting or running
    aborted_total: int = 0
    failed_total: int = 0
    nan_total: int = 0  # of these, by logits or hidden states that are not numbers
    discarded_tokens_total: int = 0  # drawn for samples that had ended while the step was out
    graph_steps_total: int = 0  # forward passes that replayed a CUDA graph
    eager_steps_total: int = 0  # forward passes launched kernel by kernel
    draft_seconds: float = 0.0  # this step: guessing, a part of forward_seconds
    draft_tokens_total: int = 0  # guessed and verified
    accepted_tokens_total: int = 0  # of these, those that were drawn
    draft_failures_total: int = 0  # times that a proposer failed a sequence
    drafted_by_position: list[int] = []  # [k]: drafts that guessed a (k + 1)-th token behind the last real one
    accepted_by_position: list[int] = []  # [k]: of these, those of which k + 1 tokens at least were accepted
    draft_depths: list[int] = []  # [k]: times that depth k was chosen for a sequence that could have been drafted for


_TOTALS = [name for name in StepStats.__struct_fields__ if name.endswith("_total") and name != "kv_blocks_total"]
_LISTED_TOTALS = ("drafted_by_position", "accepted_by_position", "draft_depths")


def add_totals(stats: StepStats, before: StepStats) -> StepStats:
    """`stats`, changed: what counts from an engine's start goes on from what was counted `before`."""
    for name in _TOTALS:
        setattr(stats, name, getattr(stats, name) + getattr(before, name))
    for name in _LISTED_TOTALS:
        setattr(stats, name, [a + b for a, b in zip_longest(getattr(stats, name), getattr(before, name), fillvalue=0)])
    return stats


class StepBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step was made of, as it ran. The tokens of all parts together are what the model was given."""

    decodes: int  # streams that got their next token
    packed_prompts: int  # prompts of which this step computed all that the cache lacked
    packed_tokens: int
    chunk_prompts: int  # prompts of which it computed a part
    chunk_tokens: int
    drafted: int  # tokens that were guessed and verified
    accepted: int  # of these, those that were drawn
    seconds: float  # of the whole step: planning, model, and taking in what it gave


class Holding(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tenant's part of the engine."""

    tenant: str
    waiting: int  # samples
    running: int
    blocks: int  # that its running samples hold; a shared one counts for each of them


class Holdings(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Who holds the engine now. Blocks that nobody holds are in StepStats."""

    shared_blocks: int  # held by several: the beginning of prompts that they have in common
    whole_blocks: int  # held by one, and full: others can find them
    open_blocks: int  # held by one, and still being written
    tenants: list[Holding]


class StepOutputs(msgspec.Struct, frozen=True, omit_defaults=True, tag="step"):
    """News of a step; the last two only while somebody watches, and `holdings` only now and then."""

    chunks: list[Chunk]
    stats: StepStats
    batch: StepBatch | None = None
    holdings: Holdings | None = None


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """What the engine resolved at start; the limits that the API side validates against."""

    model_path: str
    model_type: str
    num_parameters: int
    dtype: str
    device: str
    vocab_size: int  # the logits' width: the bound for every token id
    max_model_len: int  # prompt and output together, capped by what the KV cache can hold
    max_num_seqs: int
    max_num_batched_tokens: int
    max_n: int  # samples of one prompt
    scheduling_policy: str
    tenants: list[str]  # the names that requests may give; empty = any
    step_cost: list[float]  # the step-time model after the warm-up: the fields of scheduler.step_time.StepCost
    max_logprobs: int  # rivals per token that a request may ask for; -1 = the whole vocabulary
    block_size: int
    num_blocks: int
    eos_token_ids: list[int]
    kernels: dict[str, str]  # op -> implementation
    reasons: dict[str, str]  # resolved setting -> where it came from
    startup_seconds: dict[str, float]  # phase -> seconds
    memory_bytes: dict[str, int]  # weights, kv_cache, ...
    quantization: str = "none"  # of the weights: the checkpoint's method, or the format they were rounded to
    kv_cache_dtype: str = ""  # a name in kernels/kv_formats.py
    tenant_weights: dict[str, float] = {}  # of `tenants`, for the API side's share of the queue
    speculative_method: str = "none"  # who guesses tokens ahead
    speculative_tree: str = ""  # the largest shape of a draft, as scheduler.drafts names it; empty = none
    num_speculative_tokens: int = 0  # its depth: the most that a request may ask for
    speculative_adaptive: bool = True  # whether less is guessed where that pays
    tensor_parallel_size: int = 1  # processes that share the model; sizes in memory_bytes are those of one


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The engine is starting, and this is what it does now."""

    phase: str
    seconds: dict[str, float]  # the phases that are over
    done: float | None = None  # of this one, 0 to 1; None = nobody knows
    settled: bool = False  # the settings are right: nothing is refused for their sake any more


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """The engine's loop turns, and will be silent for a while: the next step is a long one."""

    seconds: float  # predicted


class EngineHung(msgspec.Struct, frozen=True, tag="hung"):
    """Nothing has been heard of the engine for so long that it is taken to hang. It may yet come back, or be killed."""

    seconds: float


class EngineDead(msgspec.Struct, frozen=True, tag="dead"):
    """The engine has ended; what it was working on is lost.

    kind   "crash", "hang" (it was killed), "start" (it could not be started), "setting" (nor can it ever be)
    final  no other will be started in its place
    """

    reason: str
    kind: str = "crash"
    final: bool = True


Down = AddRequest | Abort | Watch | Shutdown
Up = Progress | EngineReady | Busy | StepOutputs | EngineDead

__all__ = [
    "Abort",
    "AddRequest",
    "Busy",
    "Chunk",
    "EngineDead",
    "EngineHung",
    "EngineReady",
    "Holding",
    "Holdings",
    "Launch",
    "Progress",
    "Shutdown",
    "Slo",
    "Speculative",
    "StepBatch",
    "StepOutputs",
    "StepStats",
    "TokenLogprob",
    "Watch",
]

encoder = msgspec.msgpack.Encoder()
down_decoder: msgspec.msgpack.Decoder[Down] = msgspec.msgpack.Decoder(Down)
up_decoder: msgspec.msgpack.Decoder[Up] = msgspec.msgpack.Decoder(Up)
