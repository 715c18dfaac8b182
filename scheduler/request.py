"""A request is a counter chasing a length: num_computed chases num_tokens, and nothing else is a phase.

A `Group` is what a caller asked for; a `Request` is one sample of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .acceptance import Trials
from .drafts import DraftOrder
from .hashing import block_key, root_key
from .loops import Loops
from .params import SamplingParams, Slo


@dataclass(slots=True, eq=False)
class Group:
    """All samples of one request: the prompt that they share, and what was asked for them.

    Samples come into being one after another, each when the one before it has its place: what waits or is kept of a
    request does not grow with n.

    key     unique; names the logits that the runner keeps for it
    max_len tokens, prompt and output, at which a sample has its full length
    due     when its first token is due by its promises, on the clock of the arrivals; inf = none
    prefix  the blocks of the computed prompt, pinned for the samples that are to fork it; empty before, and when the
            memory was needed
    salt    the prompt's blocks, and guesses, are shared only with requests of equal salt
    draft   what may be guessed for it at most; None = nothing
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    key: int
    max_len: int
    arrival: float  # seconds
    priority: int = 0
    tenant: str = ""
    slo: Slo = field(default_factory=Slo)
    due: float = math.inf
    root: bytes = field(default_factory=root_key)
    salt: str = ""
    draft: DraftOrder | None = None

    session_turn: bool = False  # the prompt continues an answer that lies in the cache
    next_index: int = 0
    cancelled: set[int] = field(default_factory=set)  # indices >= next_index that shall never begin
    live: list[Request] = field(default_factory=list)
    prefix: list[int] = field(default_factory=list)

    def begin(self, order: tuple[float, int]) -> Request | None:
        """The next sample, placed in the queue at `order`; None when all have begun."""
        while self.next_index in self.cancelled:
            self.cancelled.remove(self.next_index)
            self.next_index += 1
        if self.next_index >= self.params.n:
            return None
        sample = Request(self, self.next_index, list(self.prompt), order, self.params, len(self.prompt), self.draft)
        if self.params.repetition is not None:
            sample.loops = Loops(self.params.repetition)
        self.next_index += 1
        self.live.append(sample)
        return sample

    @property
    def has_begun(self) -> bool:
        """Whether any of its samples ever ran."""
        return self.next_index > 1 or any(sample.slot >= 0 or sample.max_computed for sample in self.live)

    @property
    def num_unborn(self) -> int:
        """Samples that are yet to begin."""
        return self.params.n - self.next_index - len(self.cancelled)


@dataclass(slots=True, eq=False)
class Request:
    """One sample.

    token_ids      prompt, then output
    order          place in the queue, unique: lower is earlier
    num_computed   tokens whose K/V is in the blocks, or will be when the steps that are out have ended
    num_pending    tokens drawn by steps that are out: they have a place, and nobody knows them yet
    block_ids      append-only while running; empty otherwise
    num_published  leading blocks already offered to the prefix cache
    num_found      tokens whose K/V was there when it entered: it has computed none of them since
    num_promised   leading blocks that others may wait for while this one computes them
    slot           the runner's row, -1 while waiting
    findable       tokens that were in the cache when it was last looked at, waiting
    lacks          key of the first full block that was not; None = nothing that another could compute for it
    work           predicted seconds that its tokens take when it enters: what counts against the queue's bound
    passed_over    steps in which it would have fitted in part, and others were taken whole instead
    draft          what may be guessed for it at most; None = nothing, or not any more, since guessing failed
    trials         how its guesses fared; None = there were none
    loops          how far it repeats itself; None = it may
    """

    group: Group
    index: int
    token_ids: list[int]
    order: tuple[float, int]
    params: SamplingParams
    num_prompt: int

    draft: DraftOrder | None = None
    trials: Trials | None = None
    loops: Loops | None = None
    num_computed: int = 0
    num_pending: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_found: int = 0
    num_promised: int = 0
    slot: int = -1
    findable: int = 0
    lacks: bytes | None = None
    work: float = 0.0
    passed_over: int = 0
    num_preemptions: int = 0
    num_cached: int = -1  # prompt tokens found in the cache at first admission; -1 = reported, or not yet admitted
    queued_seconds: float = -1.0  # from arrival to first admission; -1 as above
    max_computed: int = 0  # the farthest num_computed ever was: what is computed again below it is preemption's tax
    finished: bool = False

    @property
    def request_id(self) -> str:
        return self.group.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens to compute. The last of its length is drawn and never computed."""
        num_tokens = len(self.token_ids) + self.num_pending
        if self.num_pending and num_tokens >= self.group.max_len:
            return 0
        return num_tokens - self.num_computed

    @property
    def draws(self) -> bool:
        """Whether a token is drawn when num_computed reaches num_tokens."""
        return self.params.max_tokens > 0

    @property
    def forks(self) -> bool:
        """Whether it can begin from its group's computed prompt, with nothing left to compute."""
        return bool(self.group.prefix) and len(self.token_ids) == self.num_prompt

    def keys(self, block_size: int, count: int) -> list[bytes]:
        """The keys of the first `count` blocks, all of which must be full."""
        while len(self.block_keys) < count:
            i = len(self.block_keys)
            parent = self.block_keys[-1] if i else self.group.root
            self.block_keys.append(block_key(parent, self.token_ids[i * block_size : (i + 1) * block_size]))
        return self.block_keys[:count]
