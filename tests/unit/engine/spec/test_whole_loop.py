"""Guess, verify, move what was accepted, and again: tokens are those of the target alone, whoever guesses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.engine.decoder import Decoder
from quire.engine.families import load_config
from quire.engine.kv_cache import allocate
from quire.engine.loader import BUNDLED_FOLDER, load_decoder
from quire.engine.sampler import Sampler
from quire.engine.spec import model
from quire.engine.spec.contents import CacheContents
from quire.engine.spec.model import ModelProposer
from quire.engine.spec.proposer import Draft, DraftTree, View
from quire.engine.spec.segments import Segment, gather
from quire.engine.spec.slices import layers_decoder, nested_decoder
from quire.engine.spec.verification import judge
from quire.engine.tokenizer import load_tokenizer
from quire.kernels import Kernels, Target, resolve
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch
from quire.scheduler.drafts import DraftShape, chain, parse_shape
from quire.scheduler.params import SamplingParams

CPU = torch.device("cpu")
SIZE, NEW = 16, 24
TEXT = "def read_config(path):\n    with open(path) as handle:\n"
Loaded = tuple[Decoder, Kernels]


def load(folder: Path) -> Loaded:
    config = load_config(folder)
    kernels = resolve(Target("cpu", torch.float32, config.head_dim, "fp32"))
    return load_decoder(folder, config, kernels, torch.float32, CPU), kernels


def empty_cache(decoder: Decoder) -> list[LayerKV]:
    spec = KVSpec(SIZE, decoder.config.num_kv_heads, decoder.config.head_dim, "fp32")
    return allocate(spec, decoder.config.num_layers, 12, CPU)


@pytest.fixture(scope="module")
def target() -> Loaded:
    return load(BUNDLED_FOLDER)


class Loop:
    """One sequence of the bundled target in the blocks 1, 2, 3, ..."""

    def __init__(self, target: Loaded, method: str, temperature: float) -> None:
        self.decoder, kernels = target
        self.compact = kernels.kv_compact.run
        self.cache = empty_cache(self.decoder)
        self.sampler = Sampler(kernels, self.decoder.config.vocab_size, 1, (), CPU)
        self.tokens = load_tokenizer(BUNDLED_FOLDER).encode(TEXT)
        self.sampler.add(0, SamplingParams(max_tokens=NEW, temperature=temperature, seed=5), 0, self.tokens, 1)
        self.table = np.arange(1, 11, dtype=np.int32)
        self.proposer = self.propose_by(method, kernels)
        self.run(self.tokens[:-1])

    def propose_by(self, method: str, kernels: Kernels) -> ModelProposer | None:
        cache, contents = self.cache, None
        if method == "none":
            return None
        if method == "draft":
            decoder, _ = load(BUNDLED_FOLDER.parent / "quire-py-1m")
            cache, contents = empty_cache(decoder), CacheContents(12, SIZE)
        elif method == "nested":
            decoder = nested_decoder(self.decoder, BUNDLED_FOLDER, kernels, 256)
        else:
            decoder = layers_decoder(self.decoder, BUNDLED_FOLDER, kernels, [0, 1, 2, 3, 6])
        return ModelProposer(method, decoder, cache, self.sampler, max_tokens=64, eos_token_ids=(), contents=contents)

    @torch.inference_mode()
    def run(self, tokens: list[int], tree: DraftTree | None = None) -> torch.Tensor:
        """Logits of the target behind the tokens, of which the first follows what it has computed, and of the nodes."""
        start = 0 if tree is None else len(self.tokens) - 1
        parents = None
        if tree is not None:
            parents, tokens = [-1, *(parent + 1 for parent in tree.parents)], [*tokens, *tree.tokens]
        segment = Segment(self.table, start, tokens, range(len(tokens)), parents)
        batch = gather([segment], SIZE, CPU)
        return self.decoder.logits_at(self.decoder.forward(batch, self.cache), batch.logit_rows)

    def step(self, shape: DraftShape) -> int:
        """Tokens that it gave."""
        count = len(self.tokens)
        draft: Draft | None = None
        if self.proposer is not None:
            (state,) = self.sampler.states([0])
            view = View(0, np.array(self.tokens), 1, self.table, state, shape)
            ((draft,), _) = self.proposer.propose([view])
        draft = draft or Draft(DraftTree((), ()))
        logits = self.run(self.tokens[-1:], draft.tree)
        (verdict,) = judge(self.sampler, logits, [0], [count], [draft])
        assert verdict.result.error is None
        slots = (torch.arange(1, 11)[:, None] * SIZE + torch.arange(SIZE)).flatten()
        if verdict.path:
            sources = slots[[count + node for node in verdict.path]]
            for layer in self.cache:
                self.compact(layer, sources, slots[count : count + len(verdict.path)])
        self.tokens += verdict.result.token_ids
        return len(verdict.result.token_ids)

    def steps(self, shape: DraftShape) -> Iterator[int]:
        end = len(self.tokens) + NEW
        while len(self.tokens) < end:
            yield self.step(shape)
        del self.tokens[end:]


@pytest.mark.parametrize("shape", ["chain:4", "rsd-c:2,2,1", "rsd-s:3x3"])
@pytest.mark.parametrize("method", ["draft", "nested", "layers"])
def test_greedy_tokens_are_the_target_s(method: str, shape: str, target: Loaded) -> None:
    alone, guessed = Loop(target, "none", 0.0), Loop(target, method, 0.0)
    steps = len(list(alone.steps(chain(0))))
    fewer = len(list(guessed.steps(parse_shape(shape, 4))))
    assert guessed.tokens == alone.tokens
    assert (steps, fewer < 20) == (NEW, True)


@pytest.mark.parametrize("shape", ["chain:4", "rsd-c:2,2,1", "rsd-s:3x3"])
def test_a_draft_that_is_the_target_is_always_right(
    shape: str, target: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p = q: of drawn guesses the first child is accepted at every node, whatever the temperature."""
    loop = Loop(target, "nested", 0.9)
    loop.proposer._decoder = loop.decoder
    order = parse_shape(shape, 4)
    assert all(count == order.depth + 1 for count in loop.steps(order))


@pytest.mark.parametrize("method", ["draft", "nested"])
def test_sampled_guesses_are_accepted_often(method: str, target: Loaded) -> None:
    loop = Loop(target, method, 0.7)
    given = list(loop.steps(parse_shape("rsd-s:3x4", 4)))
    assert sum(given) / len(given) > 1.3


def test_positions_that_ignore_depth_are_caught(target: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft whose siblings stand one behind the other is no longer the target's equal."""
    loop = Loop(target, "nested", 0.9)
    loop.proposer._decoder = loop.decoder

    def wrong(segments: Sequence[Segment], block_size: int, device: torch.device) -> RaggedBatch:
        batch = gather(segments, block_size, device)
        (segment,) = segments
        batch.positions = segment.start + torch.arange(len(segment.tokens))
        return batch

    monkeypatch.setattr(model, "gather", wrong)
    order = parse_shape("rsd-c:2,2,1", 4)
    assert not all(count == order.depth + 1 for count in loop.steps(order))
