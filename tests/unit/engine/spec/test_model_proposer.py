"""Guesses by a model: what it computes, what it keeps in its cache, and that verified guesses lose nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.engine.decoder import Decoder
from quire.engine.families import load_config
from quire.engine.kv_cache import allocate
from quire.engine.loader import load_decoder
from quire.engine.recorded import RecordedDecoder, recorded
from quire.engine.sampler import Sampler
from quire.engine.sequence_state import SequenceState
from quire.engine.spec import contents as contents_module
from quire.engine.spec.acceptance import AcceptanceHead, Dense
from quire.engine.spec.confidence import Confidence, Drawn
from quire.engine.spec.contents import CacheContents
from quire.engine.spec.model import ModelProposer
from quire.engine.spec.proposer import Draft, DraftTree, View
from quire.engine.spec.segments import Segment, gather
from quire.kernels import Kernels, Target, implementations, resolve
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch
from quire.kernels.reference import noise
from quire.kernels.reference.noise import Purpose
from quire.scheduler.drafts import parse_shape
from quire.scheduler.params import SamplingParams

SIZE = 4  # tokens in a block
PROMPT = [7, 250, 31, 99, 12, 5, 180, 44, 2, 66, 140]
SHAPES = ["chain:4", "rsd-c:2,2,1", "rsd-s:3x3"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return resolve(Target("cpu", torch.float32, 16, "fp32"))


@pytest.fixture(scope="module")
def decoder(tiny_model: Path, kernels: Kernels) -> Decoder:
    return load_decoder(tiny_model, load_config(tiny_model), kernels, torch.float32, CPU)


def empty_cache(decoder: Decoder, num_blocks: int = 64) -> list[LayerKV]:
    spec = KVSpec(SIZE, decoder.config.num_kv_heads, decoder.config.head_dim, "fp32")
    return allocate(spec, decoder.config.num_layers, num_blocks, CPU)


class Bench:
    """A draft model with a cache of its own, and views of sequences in blocks of one's choice."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: Kernels,
        max_tokens: int = 256,
        head: AcceptanceHead | Confidence | None = None,
        vocab: int | None = None,
    ) -> None:
        """vocab: of the target, if it is another than that of the model that guesses."""
        self.decoder, self.vocab = decoder, vocab or decoder.config.vocab_size
        self.sampler = Sampler(kernels, self.vocab, 8, (), CPU)
        cache = empty_cache(decoder)
        contents = CacheContents(64, SIZE)
        self.proposer = ModelProposer(
            "draft", decoder, cache, self.sampler, max_tokens=max_tokens, eos_token_ids=(), contents=contents, head=head
        )

    def view(
        self,
        tokens: Sequence[int],
        shape: str = "chain:4",
        slot: int = 0,
        first: int | None = None,
        go_on: float = 0.0,
        **params: Any,
    ) -> View:
        """first: the number of the first of its blocks, which follow each other; None = of the slot."""
        order = parse_shape(shape, 4)
        blocks = -(-(len(tokens) + order.nodes) // SIZE)
        start = 1 + 8 * slot if first is None else first
        values = SamplingParams(**({"max_tokens": 64, "temperature": 1.0, "seed": 3} | params))
        state = SequenceState(values, 0, list(tokens), 1, (), self.vocab)
        table = np.arange(start, start + blocks, dtype=np.int32)
        return View(slot, np.array(tokens), 1, table, state, order, go_on=go_on)

    def draft(self, *views: View) -> list[Draft | None]:
        return self.proposer.propose(views)[0]

    def rows(self, *views: View) -> int:
        return self.proposer.propose(views)[1].rows


def hidden_after(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[n, d], by one pass over an empty cache."""
    table = np.arange(1, 1 + -(-len(tokens) // SIZE), dtype=np.int32)
    with torch.inference_mode():
        batch = gather([Segment(table, 0, list(tokens), [])], SIZE, CPU)
        return decoder.forward(batch, empty_cache(decoder)).clone()


def logits_after(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[V]"""
    with torch.inference_mode():
        return decoder.logits(hidden_after(decoder, tokens)[-1:])[0].clone()


def check(decoder: Decoder, tokens: Sequence[int], draft: Draft | None) -> None:
    """Every node's q is what the model says behind its path."""
    assert draft is not None
    assert draft.q is not None
    for node in [-1, *{parent for parent in draft.tree.parents if parent >= 0}]:
        expected = logits_after(decoder, [*tokens, *draft.tree.path(node)]).softmax(-1)
        torch.testing.assert_close(draft.q[node + 1], expected, atol=2e-4, rtol=1e-3)


# What is computed.


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_s_passes_are_those_of_its_paths(shape: str, decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    for seed in range(3):
        (draft,) = bench.draft(bench.view(PROMPT, shape, seed=seed))
        check(decoder, PROMPT, draft)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_model_does_not_know_it_never_guesses(
    shape: str, known: bool, narrow_model: Path, kernels: Kernels
) -> None:
    """A token of the context that it does not know is read as its last one; edits may name any of the target's."""
    narrow = load_decoder(narrow_model, load_config(narrow_model), kernels, torch.float32, CPU)
    bench, prompt = Bench(narrow, kernels, vocab=300), [token % 200 for token in PROMPT] if known else PROMPT
    (draft,) = bench.draft(bench.view(prompt, shape, logit_bias={299: 50.0}, presence_penalty=0.0001))
    assert draft is not None
    assert draft.q is not None
    assert draft.q.shape[1] == 300
    assert not draft.q[:, 240:].any()
    read = [min(token, 239) for token in prompt]
    check(narrow, read, Draft(draft.tree, draft.q[:, :240]))
    assert (read == prompt) is known


def test_a_greedy_chain_is_the_model_s_own_continuation(decoder: Decoder, kernels: Kernels) -> None:
    tokens = list(PROMPT)
    for _ in range(4):
        tokens.append(int(logits_after(decoder, tokens).argmax()))
    bench = Bench(decoder, kernels)
    (draft,) = bench.draft(bench.view(PROMPT, temperature=0.0))
    assert draft == Draft(draft.tree)
    assert list(draft.tree.tokens) == tokens[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batch_mates_do_not_matter(temperature: float, decoder: Decoder, kernels: Kernels) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:9], PROMPT[:1], PROMPT[5:]]
    shapes = ["chain:4", "rsd-c:2,2,1", "chain:2", "rsd-s:3x3", "rsd-s:3x5"]

    def views(bench: Bench) -> list[View]:
        return [
            bench.view(prompt, shape, slot, seed=slot, temperature=temperature if slot % 2 else 1.0, top_k=20)
            for slot, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True))
        ]

    together = (bench := Bench(decoder, kernels)).draft(*views(bench))
    for i in range(len(prompts)):
        (alone,) = (bench := Bench(decoder, kernels)).draft(views(bench)[i])
        assert alone is not None
        assert together[i] is not None
        assert together[i].tree == alone.tree


@pytest.mark.parametrize("text", [*SHAPES, "chain:1", "rsd-c:3", "rsd-c:1,4,2", "rsd-s:2x1", "rsd-s:7x9"])
def test_the_order_is_never_exceeded(text: str, decoder: Decoder, kernels: Kernels) -> None:
    shape, bench = parse_shape(text, 4), Bench(decoder, kernels)
    for params in ({}, {"temperature": 0.0}, {"top_p": 0.2}):
        (draft,) = bench.draft(bench.view(PROMPT, text, **params))
        assert draft is not None
        assert len(draft.tree.tokens) <= shape.nodes
        assert max(draft.tree.depths()) <= shape.depth
        if params == {}:
            assert len(draft.tree.tokens) == shape.nodes


def test_guesses_end_behind_an_end_token(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    (draft,) = bench.draft(bench.view(PROMPT, temperature=0.0))
    assert draft is not None
    second = draft.tree.tokens[1]
    (cut,) = bench.draft(bench.view(PROMPT, temperature=0.0, stop_token_ids=(second,)))
    assert cut is not None
    assert cut.tree.tokens == draft.tree.tokens[:2]
    bench.proposer._eos_token_ids = frozenset({second})
    (cut, whole) = bench.draft(
        bench.view(PROMPT, temperature=0.0), bench.view(PROMPT, temperature=0.0, ignore_eos=True, slot=1)
    )
    assert cut is not None
    assert whole is not None
    assert (cut.tree.tokens, whole.tree.tokens) == (draft.tree.tokens[:2], draft.tree.tokens)


def test_surplus_logits_are_cut(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    bench.sampler = bench.proposer._sampler = Sampler(kernels, 100, 8, (), CPU)
    bench.vocab = 100
    (draft,) = bench.draft(bench.view([5, 6, 7], "rsd-c:2,2"))
    assert draft is not None
    assert draft.q is not None
    assert draft.q.shape[1] == 100
    assert max(draft.tree.tokens) < 100


def test_broken_logits_are_refused(decoder: Decoder, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(decoder, kernels)
    monkeypatch.setattr(decoder, "logits_at", lambda hidden, rows: torch.full((len(rows), 300), torch.nan))
    with pytest.raises(ValueError, match="no numbers"):
        bench.draft(bench.view(PROMPT))


def test_recorded_passes_give_the_same(decoder: Decoder, kernels: Kernels) -> None:
    if kernels.attention.name != "native":
        pytest.skip("no native kernels on this machine")
    plain, taped = Bench(decoder, kernels), Bench(decoder, kernels)
    cache = taped.proposer._cache
    with torch.inference_mode():
        taped.proposer._decoder = recorded(decoder, kernels, cache, 128, 64)
    assert isinstance(taped.proposer._decoder, RecordedDecoder)
    for bench in (plain, taped):
        bench.views = [bench.view(PROMPT, shape, slot) for slot, shape in enumerate(SHAPES)]
    for ours, theirs in zip(plain.draft(*plain.views), taped.draft(*taped.views), strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.tree == theirs.tree
        assert torch.equal(ours.q, theirs.q)


# What is kept.


def test_a_prompt_may_be_caught_up_with_in_pieces(decoder: Decoder, kernels: Kernels) -> None:
    whole, pieces = Bench(decoder, kernels), Bench(decoder, kernels, max_tokens=4)
    (expected,) = whole.draft(whole.view(PROMPT, "rsd-c:2,2"))
    view = pieces.view(PROMPT, "rsd-c:2,2")
    assert pieces.draft(view) == [None]
    assert pieces.draft(view) == [None]
    (draft,) = pieces.draft(view)
    assert expected is not None
    assert draft is not None
    assert draft.tree == expected.tree
    torch.testing.assert_close(draft.q, expected.q, atol=1e-5, rtol=1e-5)


def test_who_misses_least_goes_first(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels, max_tokens=8)
    long, short = bench.view(PROMPT, slot=0), bench.view(PROMPT[:2], slot=1)
    first, second = bench.draft(long, short)
    assert first is None
    assert second is not None
    assert bench.rows(long, short) == (5 + 1) + 2 * 3  # 6 of 11 were done; then three levels of one row each


def test_rows_of_catching_up_are_told_from_those_of_levels(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels, max_tokens=8)
    for missed, levels, rows in ((8, 1, 8), (2, 4, 2 + 4), (0, 4, 4)):  # the last token and what follows are levels
        _, took = bench.proposer.propose([bench.view(PROMPT)])
        assert (took.caught_up, took.levels, took.rows) == (missed, levels, rows)


def test_what_is_known_is_not_computed_again(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    (draft,) = bench.draft(bench.view(PROMPT))
    assert draft is not None
    accepted = [*PROMPT, *draft.tree.tokens]
    # The last guess was not consumed, and a token followed it.
    assert bench.rows(bench.view([*accepted, 8])) == 2 + 3
    (again,) = bench.draft(bench.view([*accepted, 8]))
    check(decoder, [*accepted, 8], again)
    # Of another sequence, rejected at the second guess, only what differs.
    rejected = [*accepted[: len(PROMPT) + 1], (accepted[len(PROMPT) + 1] + 1) % 300]
    (other,) = bench.draft(bench.view(rejected))
    check(decoder, rejected, other)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_tree_leaves_nothing_behind_the_last_token(shape: str, decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    (draft,) = bench.draft(bench.view(PROMPT, shape))
    assert draft is not None
    for node in range(len(draft.tree.tokens)):
        tokens = [*PROMPT, *draft.tree.path(node), 9]
        (again,) = bench.draft(bench.view(tokens, shape))
        check(decoder, tokens, again)
        bench.draft(bench.view(PROMPT, shape))


def reused(decoder: Decoder, kernels: Kernels) -> tuple[list[int], Draft | None]:
    """A sequence whose second block is one that was filled with the same tokens behind others."""
    bench = Bench(decoder, kernels)
    first, other, common = PROMPT[:4], PROMPT[4:8], PROMPT[7:11]
    bench.draft(bench.view([*first, *common, 3], first=10))
    bench.draft(bench.view(other, "chain:1", slot=1, first=10))
    bench.proposer.enter(2)
    (draft,) = bench.draft(bench.view(tokens := [*other, *common, 3], slot=2, first=10))
    return tokens, draft


def test_blocks_of_others_are_computed_again(decoder: Decoder, kernels: Kernels) -> None:
    check(decoder, *reused(decoder, kernels))


def test_a_name_that_forgets_what_came_before_is_caught(
    decoder: Decoder, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents_module, "_hash", lambda parent, tokens: 1)
    with pytest.raises(AssertionError):
        check(decoder, *reused(decoder, kernels))


def test_shared_blocks_are_computed_once(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    bench.draft(bench.view(PROMPT, "chain:1", first=10))
    bench.proposer.enter(1)
    other = [*PROMPT[:8], 77, 78]
    view = bench.view(other, "chain:1", slot=1, first=20)
    view.block_table[:2] = (10, 11)
    assert bench.rows(view) == 2
    check(decoder, other, bench.draft(view)[0])


def test_a_slot_s_next_sequence_is_looked_at_afresh(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels)
    bench.draft(bench.view(PROMPT))
    bench.proposer.enter(0)
    tokens = [*PROMPT[:3], 200, *PROMPT[4:]]
    (draft,) = bench.draft(bench.view(tokens))
    check(decoder, tokens, draft)


# The acceptance head.


def test_a_chain_stops_where_the_head_doubts(decoder: Decoder, kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(2)
    d = decoder.config.hidden
    head = AcceptanceHead(
        (Dense(torch.randn(d, d, generator=generator) / 8, torch.zeros(d)),),
        Dense(torch.randn(2, d, generator=generator) / 12, torch.tensor([-0.5, 0.5])),
        threshold=0.8,
    )
    lengths = set()
    for seed in range(12):
        (whole,) = (bench := Bench(decoder, kernels)).draft(bench.view(PROMPT, "chain:8", seed=seed))
        (draft,) = (bench := Bench(decoder, kernels, head=head)).draft(bench.view(PROMPT, "chain:8", seed=seed))
        assert whole is not None
        assert draft is not None
        tokens = list(whole.tree.tokens)
        states = hidden_after(decoder, [*PROMPT, *tokens])[len(PROMPT) :]  # those where a guess is the input
        survival = head.acceptance(judged(states)).cumprod(0).tolist()
        # Guess j is judged by the pass that draws guess j + 1, which is kept.
        stop = next((j for j in range(7) if 1 - survival[j] > head.threshold), 6)
        assert list(draft.tree.tokens) == tokens[: stop + 2]
        lengths.add(stop)
    assert len(lengths) > 2


def judged(hidden: Tensor) -> Drawn:
    """For a head that looks at hidden states alone."""
    return Drawn(hidden, torch.empty(0), torch.empty(0), torch.empty(0))


def by_chance(slope: float = 1.0, shift: float = 0.0) -> Confidence:
    """Of log q(Y) alone: about sigmoid(slope · log q(Y) + shift)."""
    weight = torch.zeros(2, 6)
    weight[:, 0] = torch.tensor([1.0, -1.0])  # SiLU(x) - SiLU(-x) = x
    return Confidence(weight, torch.zeros(2), torch.tensor([slope, -slope]), torch.tensor(shift))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_chain_stops_with_the_guess_that_is_in_doubt(temperature: float, decoder: Decoder, kernels: Kernels) -> None:
    head, lengths = by_chance(0.6, 2.5), set()
    for seed in range(12):
        prompt = PROMPT[: 2 + seed % 9]
        at = {"temperature": temperature, "seed": seed}
        (whole,) = (bench := Bench(decoder, kernels)).draft(bench.view(prompt, "chain:8", **at))
        bench = Bench(decoder, kernels, head=head)
        (draft,) = bench.draft(bench.view(prompt, "chain:8", go_on=0.6, **at))
        assert whole is not None
        assert draft is not None
        tokens, survival = list(whole.tree.tokens), 1.0
        for count in range(1, 9):  # the guess that brings it below 0.6 is the last, and stays
            log_q = logits_after(decoder, [*prompt, *tokens[: count - 1]]).log_softmax(-1)[tokens[count - 1]]
            survival *= torch.sigmoid(0.6 * log_q + 2.5).item()
            if survival < 0.6:
                break
        assert list(draft.tree.tokens) == tokens[:count]
        lengths.add(count)
    assert len(lengths) > 1


def test_what_is_asked_for_decides_how_long_chains_are(decoder: Decoder, kernels: Kernels) -> None:
    bench = Bench(decoder, kernels, head=by_chance(0.6, 2.5))
    lengths = []
    for go_on in (0.0, 0.4, 0.8, 2.0):
        drafts = bench.draft(*(bench.view(PROMPT, "chain:8", slot, go_on=go_on, seed=slot) for slot in range(4)))
        lengths.append([len(draft.tree.tokens) for draft in drafts if draft is not None])
    assert lengths[0] == [8] * 4
    assert lengths[3] == [1] * 4
    assert all(a >= b for more, less in itertools.pairwise(lengths) for a, b in zip(more, less, strict=True))
    assert sum(lengths[0]) > sum(lengths[1]) > sum(lengths[2]) > 4


def test_doubts_of_batch_mates_do_not_matter(decoder: Decoder, kernels: Kernels) -> None:
    """A tree between chains, and a chain that ends by itself: every chain is judged by its own row."""
    order = [("chain:8", 0.1), ("rsd-c:2,2,1", 0.9), ("chain:8", 0.0), ("chain:1", 0.5), ("chain:8", 0.4)]

    def views(bench: Bench) -> list[View]:
        return [
            bench.view(PROMPT[slot:], shape, slot, go_on=go_on, seed=slot, temperature=float(slot != 4))
            for slot, (shape, go_on) in enumerate(order)
        ]

    together = (bench := Bench(decoder, kernels, head=by_chance(0.6, 2.5))).draft(*views(bench))
    for i in range(len(order)):
        (alone,) = (bench := Bench(decoder, kernels, head=by_chance(0.6, 2.5))).draft(views(bench)[i])
        assert alone is not None
        assert together[i] is not None
        assert together[i].tree == alone.tree


def test_trees_do_not_ask_the_head(decoder: Decoder, kernels: Kernels) -> None:
    d = decoder.config.hidden
    never = AcceptanceHead((), Dense(torch.zeros(2, d), torch.tensor([9.0, -9.0])), threshold=0.1)
    bench = Bench(decoder, kernels, head=never)
    tree, chain = bench.draft(bench.view(PROMPT, "rsd-c:2,2,1"), bench.view(PROMPT, slot=1))
    assert tree is not None
    assert chain is not None
    assert (len(tree.tree.tokens), len(chain.tree.tokens)) == (10, 2)


# Nothing is lost: two tokens of a model that looks at one, drafted and verified, against the joint.

V, COUNT, ALPHA = 4, 12_000, 1e-4
generator = torch.Generator().manual_seed(11)
TARGET, DRAFT = torch.randn(V, V, generator=generator) * 1.5, torch.randn(V, V, generator=generator) * 1.5


# Likely guesses go on, unlikely ones end their chain.
DOUBTFUL = by_chance(1.0, 1.2)


class TableDecoder:
    """Its hidden states are its inputs. known: so many tokens have logits."""

    def __init__(self, known: int) -> None:
        self.config = SimpleNamespace(vocab_size=known)

    def forward(self, batch: RaggedBatch, cache: Sequence[LayerKV]) -> Tensor:
        return batch.input_ids[:, None]

    def logits_at(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return DRAFT[hidden[rows, 0], : self.config.vocab_size]


def verified(
    kernels: Kernels,
    shape: str,
    spoil: bool = False,
    known: int = V,
    head: Confidence | None = None,
    drops: bool = False,
    **params: Any,
) -> float:
    """The p-value of the first two tokens behind token 0.

    spoil: q is not what guesses were drawn from. known: to the model that guesses. drops: a guess that ended its chain
    by being in doubt is not verified.
    """
    sampler = Sampler(kernels, V, 1, (), CPU)
    cache = [LayerKV(KVSpec(SIZE, 1, 16, "fp32"), torch.zeros(1), torch.zeros(1))]
    decoder: Any = TableDecoder(known)
    proposer = ModelProposer("nested", decoder, cache, sampler, max_tokens=COUNT, eos_token_ids=(), head=head)
    states = [
        SequenceState(SamplingParams(**({"max_tokens": 9, "temperature": 1.0} | params)), i, [0], 1, (), V)
        for i in range(COUNT)
    ]
    order, table = parse_shape(shape, 4), np.zeros(4, np.int32)
    views = [View(0, np.zeros(1, np.int64), 1, table, state, order, go_on=0.5) for state in states]
    drafts, _ = proposer.propose(views)
    if head is not None:
        assert {len(draft.tree.tokens) for draft in drafts if draft} == set(range(1, order.depth + 1))
    if drops:
        drafts = [draft and shortened(draft, order.depth) for draft in drafts]
    rows = 1 + max(len(draft.tree.tokens) for draft in drafts if draft)
    tokens, parents = torch.zeros(COUNT, rows, dtype=torch.int64), torch.full((COUNT, rows), -1)
    q = torch.zeros(COUNT, rows, V)
    for i, draft in enumerate(drafts):
        assert draft is not None
        assert draft.q is not None
        count = 1 + len(draft.tree.tokens)
        tokens[i, 1:count] = torch.tensor(draft.tree.tokens)
        parents[i, 1:count] = torch.tensor(draft.tree.parents) + 1
        q[i, :count] = draft.q
    p = sampler.distributions(TARGET, [states[0]] * V)
    if spoil:
        q = (q**0.3 / (q**0.3).sum(-1, keepdim=True).clamp(min=1e-9)).nan_to_num()
    seeds, index = torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT)
    accepted, bonus = implementations("verify")["reference"].run(
        p[tokens], q, tokens, parents, seeds, index, torch.ones_like(index)
    )
    seen: Counter[tuple[int, int]] = Counter()
    then = (p.log()[bonus] + noise.gumbel(seeds, index, torch.full_like(index, 2), Purpose.SAMPLE, V)).argmax(-1)
    for i in range(COUNT):
        run = [*tokens[i][accepted[i]].tolist(), int(bonus[i]), int(then[i])]
        seen[run[0], run[1]] += 1
    joint = {(a, b): (p[0, a] * p[a, b]).item() for a, b in itertools.product(range(V), repeat=2)}
    cells = [cell for cell in joint if joint[cell] > 0]
    assert seen.keys() <= set(cells)
    expected = np.array([joint[cell] for cell in cells])
    return float(stats.chisquare([seen[cell] for cell in cells], expected / expected.sum() * COUNT).pvalue)


def shortened(draft: Draft, depth: int) -> Draft:
    """Without its last guess, if it is no whole chain."""
    count = len(draft.tree.tokens)
    if count == depth or draft.q is None:
        return draft
    tree = DraftTree(draft.tree.tokens[: count - 1], draft.tree.parents[: count - 1])
    return Draft(tree, draft.q[:count])


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_k": 3}, {"known": 3}], ids=str)
@pytest.mark.parametrize("shape", ["chain:2", "chain:3"])
def test_stopped_chains_are_distributed_as_the_target(shape: str, params: dict[str, Any], kernels: Kernels) -> None:
    assert verified(kernels, shape, head=DOUBTFUL, **params) > ALPHA


def test_dropping_what_is_in_doubt_is_caught(kernels: Kernels) -> None:
    for shape in ("chain:2", "chain:3"):
        assert verified(kernels, shape, head=DOUBTFUL, drops=True) < ALPHA


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_k": 3}, {"known": 3}], ids=str)
@pytest.mark.parametrize("shape", ["chain:2", "rsd-c:2,2", "rsd-s:3x2"])
def test_verified_guesses_are_distributed_as_the_target(shape: str, params: dict[str, Any], kernels: Kernels) -> None:
    assert verified(kernels, shape, **params) > ALPHA


@pytest.mark.parametrize("shape", ["chain:2", "rsd-c:2,2"])
def test_another_q_than_that_of_the_draws_is_caught(shape: str, kernels: Kernels) -> None:
    assert verified(kernels, shape, spoil=True) < ALPHA
