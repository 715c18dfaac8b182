"""A request is a counter chasing a length: num_computed chases num_tokens, and nothing else is a phase."""

from __future__ import annotations

from dataclasses import dataclass, field

from .hashing import block_key, root_key
from .params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One sample of one request: n samples of a prompt are n of these with one request_id.

    token_ids      prompt, then output
    num_computed   tokens whose K/V is in the blocks, or will be when the running step ends
    block_ids      append-only while running; empty otherwise
    num_published  leading blocks already offered to the prefix cache
    num_promised   leading blocks that others may wait for while this one computes them
    slot           the runner's row, -1 while waiting
    waits_for      key of the promised block that it was last seen waiting for
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    arrival: float  # seconds
    order: tuple[float, int]  # place in the waiting queue, unique; see queue.py
    root: bytes = field(default_factory=root_key)

    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_promised: int = 0
    waits_for: bytes | None = None
    slot: int = -1
    num_preemptions: int = 0
    num_cached: int = -1  # prompt tokens found in the cache at first admission; -1 = reported, or not yet admitted
    queued_seconds: float = -1.0  # from arrival to first admission; -1 as above
    max_computed: int = 0  # the farthest num_computed ever was: what is computed again below it is preemption's tax
    finished: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def draws(self) -> bool:
        """Whether a token is drawn when num_computed reaches num_tokens."""
        return self.params.max_tokens > 0

    def keys(self, block_size: int, count: int) -> list[bytes]:
        """The keys of the first `count` blocks, all of which must be full."""
        while len(self.block_keys) < count:
            i = len(self.block_keys)
            parent = self.block_keys[-1] if i else self.root
            self.block_keys.append(block_key(parent, self.token_ids[i * block_size : (i + 1) * block_size]))
        return self.block_keys[:count]
