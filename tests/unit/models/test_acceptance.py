"""What trains acceptance heads: labels, features, and the play that judges a rule of stopping."""

import pytest
import torch
from safetensors.torch import save_file

from quire.engine.spec.acceptance import head_path, load_head
from quire.engine.spec.confidence import Confidence as Served
from quire.engine.spec.confidence import Drawn
from quire.models import stopping
from quire.models.acceptance import (
    FEATURES,
    Confidence,
    acceptance,
    calibration_error,
    examples,
    features,
    train_confidence,
)
from quire.models.continuations import (
    CONTINUATION,
    Batch,
    draw,
    empty_cache,
    forward_cached,
    next_logits,
    sample,
    tempered,
)
from quire.models.export import FOLDERS, MODELS
from quire.models.llama import Llama, LlamaShape
from quire.models.stopping import Played, play, trace
from quire.models.train import SHAPES
from quire.models.train_acceptance import PAIRS, worth


def tiny(seed: int, hidden: int = 32) -> Llama:
    torch.manual_seed(seed)
    shape = LlamaShape(
        hidden, layers=2, ffn=64, heads=4, kv_heads=2, head_dim=16, widths=(64, 32), vocab=40, context=256
    )
    model = Llama(shape)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def target() -> Llama:
    return tiny(0)


@pytest.fixture(scope="module")
def written(target: Llama) -> Batch:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(40, (16, 8), generator=generator)
    temperatures = torch.tensor([1.0, 0.5, 0.0, 0.8]).repeat(4)
    tokens, states = sample(target, prompts, CONTINUATION, temperatures, generator)
    return Batch(torch.cat([prompts, tokens], 1), states, temperatures)


def test_cached_passes_are_the_whole_pass(target, written):
    tokens = written.tokens[:2, :20]
    with torch.no_grad():
        cache = empty_cache(target, 2, 20)
        pieces = [forward_cached(target, tokens[:, :12], 0, cache)]
        pieces += [forward_cached(target, tokens[:, i : i + 1], i, cache) for i in range(12, 20)]
        torch.testing.assert_close(torch.cat(pieces, 1), target.hidden(tokens), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(written.states, target.hidden(written.tokens)[:, 7:-1], atol=1e-4, rtol=1e-4)


def test_tokens_are_drawn_from_their_distribution():
    chances = torch.tensor([[0.0, 0.2, 0.5, 0.0, 0.3, 0.0]])
    drawn = draw(chances.expand(40_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    torch.testing.assert_close(shares, chances[0], atol=0.01, rtol=0)
    assert set(drawn.tolist()) == {1, 2, 4}


def test_no_temperature_takes_the_likeliest():
    logits = torch.tensor([[[0.0, 2.0, 1.0]]]).repeat(2, 1, 1)
    hot, cold = tempered(logits, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(hot, (logits[0] / 0.5).softmax(-1))
    assert cold.tolist() == [[0.0, 1.0, 0.0]]


def test_what_is_known_of_a_token_is_what_it_says():
    logits, tokens = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 8, 1, 2])
    q = logits.softmax(-1)
    own = q[torch.arange(5), tokens]
    ranked = q.sort(-1, descending=True).values
    expected = [own.log(), ranked[:, 0].log(), ranked[:, 1].log(), -(q * q.log()).sum(-1), own, torch.full((5,), 0.7)]
    torch.testing.assert_close(features(logits, tokens, torch.tensor([0.7])), torch.stack(expected, -1))


@pytest.fixture(scope="module")
def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    known = 3 + 2 * torch.randn(100_000, FEATURES, generator=torch.Generator().manual_seed(0))
    return known, ((known - 3) @ torch.tensor([1.0, -0.5, 0.5, 0.0, 0.0, 0.7])).sigmoid()


def test_the_loss_comes_down_to_the_entropy_of_the_labels(synthetic):
    known, accepted = synthetic
    head = train_confidence(known, accepted)
    assert calibration_error(acceptance(head, known), accepted) < 0.02
    with torch.no_grad():
        loss = torch.nn.functional.binary_cross_entropy(acceptance(head, known), accepted)
        floor = torch.nn.functional.binary_cross_entropy(accepted, accepted)
        assert floor <= loss < floor + 0.01
        head.out.bias += 1.0  # the twin that is surer than it should be
        assert calibration_error(acceptance(head, known), accepted) > 0.05


def test_labels_are_of_the_tokens_that_the_draft_drew(target, written):
    draft = tiny(1)
    known, accepted = examples(target, draft, 64, written, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = next_logits(draft, draft.hidden(written.tokens, 64)[:, written.num_prompt - 1 : -1])
        drafted = draw(tempered(logits, written.temperatures), torch.Generator().manual_seed(0))
        p, q = (
            tempered(x, written.temperatures).gather(-1, drafted[..., None])[..., 0]
            for x in (next_logits(target, written.states), logits)
        )
    own = logits.log_softmax(-1).gather(-1, drafted[..., None])[..., 0].clamp(min=-12)
    torch.testing.assert_close(known[:, 0], own.flatten())
    torch.testing.assert_close(accepted, (p / q).clamp(max=1).flatten())
    greedy = (written.temperatures == 0)[:, None].expand_as(p).flatten()
    assert set(accepted[greedy].tolist()) == {0.0, 1.0}


def test_a_draft_that_is_the_target_is_never_rejected(target, written):
    traced = trace(target, target, 64, written, torch.Generator().manual_seed(0))
    assert traced.rejected.float().mean() < 0.001
    assert traced.tails.shape[1:] == (stopping.LONGEST, FEATURES)


def test_guesses_are_rejected_as_often_as_the_distributions_differ(target, written):
    draft = tiny(1)
    traced = trace(target, draft, 64, written, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = tempered(next_logits(target, written.states), written.temperatures)
        q = tempered(next_logits(draft, draft.hidden(written.tokens, 64)[:, 7:-1]), written.temperatures)
    differ = (p - q).clamp(min=0).sum(-1).mean()
    assert float(traced.rejected.float().mean()) == pytest.approx(float(differ), abs=0.03)


def test_a_trace_at_one_temperature_keeps_its_own_tails(target, written):
    traced = trace(target, tiny(1), 64, written, torch.Generator().manual_seed(0))
    parts = [traced.at(t) for t in (1.0, 0.5, 0.0, 0.8)]
    assert sum(len(part.tails) for part in parts) == len(traced.tails)
    for part in parts:
        assert int(part.rejected.sum()) == len(part.tails)
        assert torch.equal(part.tails[..., -1], part.temperatures[part.rejected.nonzero()[:, :1]].expand(-1, 12))
        assert torch.equal(part.text[..., -1], part.temperatures[:, None].expand_as(part.text[..., -1]))


def test_a_tail_of_the_text_s_own_token_goes_on_from_the_text_s_state(target, written):
    places = torch.arange(50, 90)
    with torch.no_grad():
        cache = empty_cache(target, *written.tokens.shape)
        logits = next_logits(target, forward_cached(target, written.tokens, 0, cache))
        text = [(keys[2], values[2]) for keys, values in cache]
        tails = stopping._tails(
            target,
            64,
            written.tokens[2, places],
            logits[2, places - 1],
            places,
            text,
            torch.zeros(1),
            torch.Generator().manual_seed(0),
        )
    greedy = logits[2, places].argmax(-1)
    torch.testing.assert_close(tails[:, 1], features(logits[2, places], greedy, torch.zeros(1)), atol=1e-3, rtol=1e-3)
    assert tails.shape == (40, stopping.LONGEST, FEATURES)


def test_a_round_wins_what_was_accepted_and_one_more():
    rejected = [[False, False, True, False, False, False, False, False, False, False]]
    text, tails = [[0.9] * 10], [[0.9] * 3]
    # Limit 3: places 0 1 accepted and 2 corrected; 3 4 5 accepted, 6 drawn beside them; then too little is left.
    assert play(rejected, text, tails, 0.0, 3) == Played(rounds=2, drafted=6, tokens=7)
    assert play(rejected, text, tails, 0.0, 1).tokens == 2 + 1 + 2 + 2 + 2
    assert Played(2, 6, 7).rate(0.5) == pytest.approx(7 / 5)


def test_a_draft_stops_with_the_token_in_doubt():
    rejected = [[False, False, True, False, False, False, False]]
    sure = [0.99] * 7
    assert play(rejected, [sure], [[0.99] * 6], 0.5, 6) == Played(1, 6, 3)
    # The wrong guess itself, at place 2, is in doubt: it is the last.
    assert play(rejected, [sure], [[0.1] * 6], 0.5, 6) == Played(1, 3, 3)
    # A doubt about the text's own token there, which was not drafted, says nothing.
    doubtful = [0.99, 0.99, 0.1, 0.99, 0.99, 0.99, 0.99]
    assert play(rejected, [doubtful], [[0.99] * 6], 0.5, 6) == Played(1, 6, 3)
    # A doubt about the first token stops with it, and what is drafted then begins behind it and the next.
    assert play([[False] * 7], [[0.1, *sure[1:]]], [], 0.5, 6) == Played(1, 1, 2)
    # Doubts add up.
    assert play([[False] * 7], [[0.8] * 7], [], 0.5, 6) == Played(1, 4, 5)


def test_what_pays_follows_the_cost():
    """Guesses that are surely right or surely wrong, half and half: the rule takes one and stops when it is wrong."""
    draws = torch.rand(40, 400, generator=torch.Generator().manual_seed(0)) < 0.3
    text, tails = [[0.99] * 400] * 40, [[0.01] + [0.7] * 11] * int(draws.sum())
    for cost in (0.02, 0.1):
        fixed = max(play(draws.tolist(), text, tails, 0.0, length).rate(cost) for length in range(1, 13))
        stopped = play(draws.tolist(), text, tails, worth(fixed, cost, 0.7), 12).rate(cost)
        assert stopped > 1.07 * fixed


def test_heads_are_served_as_they_were_trained(tmp_path):
    torch.manual_seed(0)
    head = Confidence()
    save_file({name: value.detach() for name, value in head.named_parameters()}, head_path(tmp_path))
    served = load_head(head_path(tmp_path), 128, torch.bfloat16, torch.device("cpu"))
    assert isinstance(served, Served)
    logits, tokens, heat = torch.randn(6, 40) * 3, torch.arange(6), torch.rand(6)
    expected = acceptance(head, features(logits, tokens, heat))
    torch.testing.assert_close(served.acceptance(Drawn(torch.empty(0), logits, tokens, heat)), expected)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_shipped_heads_fit_their_drafts(pair):
    file = MODELS / FOLDERS[pair.model] / pair.file
    head = load_head(file, SHAPES[pair.model].hidden, torch.float32, torch.device("cpu"))
    assert isinstance(head, Served)
    sure, unsure = torch.zeros(2, 4096)
    sure[3] = 20.0
    drawn = Drawn(torch.empty(0), torch.stack([sure, unsure]), torch.tensor([3, 3]), torch.ones(2))
    surely, hardly = head.acceptance(drawn).tolist()
    assert surely > 0.9 > 0.7 > hardly
