"""Which blocks a prompt can share: those that lie in the cache, and those that a running request is computing now."""

from __future__ import annotations

from .block_pool import BlockContent, BlockPool
from .predict import BlockFacts
from .request import Request


class PrefixCache:
    """Sharing of full blocks by their keys, over a pool; with `enabled` off it finds, keeps and promises nothing."""

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool) -> None:
        self.pool = pool
        self.block_size = block_size
        self.enabled = enabled
        self._promised: dict[bytes, int] = {}  # key of a block being computed now -> how many compute it

    @property
    def num_promised(self) -> int:
        return len(self._promised)

    def may_share(self, request: Request) -> bool:
        """Prompt logprobs need every prompt token's logits, so the first sample has to compute every prompt token."""
        return self.enabled and (request.params.prompt_logprobs is None or request.index > 0)

    def match(self, request: Request) -> list[int]:
        """The blocks that a request need not compute: those of the cache, or of its group's prompt while that is held.

        The longest run that it begins with; its last token is left to compute, unless it forks.
        """
        held = request.group.prefix[: request.num_prompt // self.block_size]
        return held if request.forks else max(held, self._cached(request), key=len)

    def _cached(self, request: Request) -> list[int]:
        if not self.may_share(request):
            return []
        blocks: list[int] = []
        size, parent = self.block_size, request.group.root
        for i, key in enumerate(request.keys(size, (request.num_tokens - 1) // size)):
            block = self.pool.find(key, parent, request.token_ids[i * size : (i + 1) * size])
            if block is None:
                break
            blocks.append(block)
            parent = key
        return blocks

    def look(self, request: Request) -> None:
        """Note what of a waiting request could be found now, and which block it would compute first."""
        found = len(self.match(request))
        request.findable = found * self.block_size
        if self.may_share(request):
            full = (request.num_tokens - 1) // self.block_size
            request.lacks = request.block_keys[found] if found < full else None

    def is_promised(self, request: Request) -> bool:
        """Whether a running request is computing the very block that this one would compute first.

        Then waiting is cheaper than computing it twice: it will be a cache hit.
        """
        return request.lacks in self._promised

    def promise(self, request: Request) -> None:
        """Announce the full blocks that `request` has yet to compute."""
        if self.enabled:
            request.num_promised = request.num_tokens // self.block_size
            for key in request.keys(self.block_size, request.num_promised)[request.num_published :]:
                self._promised[key] = self._promised.get(key, 0) + 1

    def withdraw(self, request: Request, upto: int) -> None:
        """Take back the announcements of blocks num_published .. upto - 1: they are there, or will not be."""
        for key in request.block_keys[request.num_published : min(upto, request.num_promised)]:
            self._promised[key] -= 1
            if not self._promised[key]:
                del self._promised[key]

    def publish(self, request: Request, num_computed: int) -> None:
        """Offer the blocks that have become full since the last call: the first num_computed tokens are in them.

        Fewer than request.num_computed while a step is out: what it computes is not certain, or even known, yet.
        """
        if not self.enabled:
            return
        size = self.block_size
        full = num_computed // size
        if full == request.num_published:
            return
        keys = request.keys(size, full)
        self.withdraw(request, full)
        for i in range(request.num_published, full):
            parent = keys[i - 1] if i else request.group.root
            tokens = tuple(request.token_ids[i * size : (i + 1) * size])
            self.pool.publish(request.block_ids[i], BlockContent(keys[i], parent, tokens), self._facts(request, i))
        request.num_published = full

    def _facts(self, request: Request, depth: int) -> BlockFacts:
        group = request.group
        generated = (depth + 1) * self.block_size > len(group.prompt)
        return BlockFacts(depth, generated, generated and group.params.n > 1, group.tenant, group.session_turn)
