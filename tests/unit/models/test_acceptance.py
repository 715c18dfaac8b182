"""What trains acceptance heads: labels, loss, token mixing, and the play that judges a stopping rule."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quire.models import stopping
from quire.models.acceptance import (
    AcceptanceHead,
    acceptance,
    acceptance_loss,
    calibration_error,
    examples,
    fit_confidence,
    mix,
    train_head,
)
from quire.models.continuations import CONTINUATION, Batch, draw, empty_cache, forward_cached, probabilities, sample
from quire.models.export import FOLDERS, MODELS
from quire.models.llama import Llama, LlamaShape
from quire.models.stopping import Played, play, trace
from quire.models.train import SHAPES
from quire.models.train_acceptance import PAIRS


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
    temperatures = torch.tensor([1.0, 0.5]).repeat(8)
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


def test_mixing_keeps_the_share_and_says_where_the_drafts_are():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.arange(20_000).view(2, -1), -torch.arange(20_000).view(2, -1) - 1
    mixed, is_draft = mix(ours, theirs, 0.15, generator)
    assert torch.equal(mixed < 0, is_draft)
    assert torch.equal(mixed, torch.where(is_draft, theirs, ours))
    assert float(is_draft.float().mean()) == pytest.approx(0.85, abs=0.01)


@pytest.fixture(scope="module")
def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300_000, 8, generator=generator)
    return states, (states @ torch.tensor([1.0, -1.0, 0.5, 0, 0, 2.0, 0, 0])).sigmoid()


@pytest.mark.parametrize("weight", [1.0, 6.0])
def test_the_loss_comes_down_to_the_entropy_of_the_labels(synthetic, weight):
    states, accepted = synthetic
    head = train_head(states, accepted, depth=1, weight=weight)
    assert calibration_error(acceptance(head, states), accepted) < 0.02
    uncalibrated = torch.stack([torch.zeros(len(accepted)), torch.logit(accepted) - torch.tensor(weight).log()], -1)
    floor = acceptance_loss(uncalibrated, accepted, weight)
    with torch.no_grad():
        head.out.bias[1] -= torch.tensor(weight).log()
        assert floor <= acceptance_loss(head(states), accepted, weight) < floor + 0.01
        if weight != 1:  # the twin whose odds are not given back
            assert calibration_error(acceptance(head, states), accepted) > 0.1


def test_what_q_tells_is_the_mean_acceptance_of_its_like():
    chances = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    table = fit_confidence(chances, chances.square(), bins=16)
    torch.testing.assert_close(table.acceptance(chances), chances.square(), atol=0.07, rtol=0)
    assert calibration_error(table.acceptance(chances), chances.square()) < 0.01


def test_the_loss_is_what_it_says():
    logits, accepted = torch.tensor([[0.3, 1.0], [0.0, -2.0]]), torch.tensor([0.25, 1.0])
    a = logits.softmax(-1)[:, 1]
    expected = -(6 * 0.75 * (1 - a[0]).log() + 0.25 * a[0].log() + a[1].log()) / (6 * 0.75 + 1.25)
    torch.testing.assert_close(acceptance_loss(logits, accepted, 6.0), expected)


def test_a_state_is_that_of_the_drafted_token_as_the_input(target, written):
    """Without mixing all tokens are drafted ones, and the state of each is the one behind it."""
    draft, calls = tiny(1), []
    hidden = draft.hidden

    def recorded(tokens: torch.Tensor, width: int) -> torch.Tensor:
        calls.append((tokens, hidden(tokens, width)))
        return calls[-1][1]

    draft.hidden = recorded
    states, chances, accepted = examples(target, draft, 64, written, 0.0, torch.Generator().manual_seed(0))
    (_, before), (mixed, after) = calls
    first = written.num_prompt
    assert torch.equal(states, after[:, first:].flatten(0, 1))
    drafted = mixed[:, first:, None]
    p = probabilities(target, written.states, written.temperatures).gather(-1, drafted)
    q = probabilities(draft, before[:, first - 1 : -1], written.temperatures).gather(-1, drafted)
    torch.testing.assert_close(chances.view(p.shape[:2]), q[..., 0])
    torch.testing.assert_close(accepted.view(p.shape[:2]), (p / q).clamp(max=1)[..., 0])


def test_a_draft_that_is_the_target_is_never_rejected(target, written):
    traced = trace(target, target, 64, written, torch.Generator().manual_seed(0))
    assert traced.rejected.float().mean() < 0.001
    assert traced.tails.shape[1:] == (stopping.LONGEST, 32)


def test_guesses_are_rejected_as_often_as_the_distributions_differ(target, written):
    draft = tiny(1)
    traced = trace(target, draft, 64, written, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = probabilities(target, written.states, written.temperatures)
        q = probabilities(draft, draft.hidden(written.tokens, 64)[:, 7:-1], written.temperatures)
    differ = (p - q).clamp(min=0).sum(-1).mean()
    assert float(traced.rejected.float().mean()) == pytest.approx(float(differ), abs=0.03)


def test_a_tail_of_the_text_s_own_token_has_the_text_s_state(target, written):
    places = torch.arange(50, 90)
    with torch.no_grad():
        cache = empty_cache(target, *written.tokens.shape)
        states = forward_cached(target, written.tokens, 0, cache)
        text = [(keys[3], values[3]) for keys, values in cache]
        own = written.tokens[3, places]
        tails, chances = stopping._tails(
            target, 64, own, torch.ones(40), places, text, torch.ones(1), torch.Generator().manual_seed(0)
        )
    torch.testing.assert_close(tails[:, 0], states[3, places], atol=1e-4, rtol=1e-4)
    assert chances.shape == (40, stopping.LONGEST)


def test_a_round_wins_what_was_accepted_and_one_more():
    rejected = [[False, False, True, False, False, False, False, False, False, False]]
    states, tails = [[0.9] * 10], [[0.9] * 3]
    # Limit 3: places 0 1 accepted and 2 corrected; 3 4 5 accepted, 6 drawn beside them; then too little is left.
    assert play(rejected, states, tails, 1.0, 3) == Played(rounds=2, drafted=6, tokens=7)
    assert play(rejected, states, tails, 1.0, 1).tokens == 2 + 1 + 2 + 2 + 2
    assert Played(2, 6, 7).rate(0.5) == pytest.approx(7 / 5)


def test_a_draft_stops_a_token_after_its_doubtful_one():
    rejected = [[False, False, True, False, False, False, False]]
    sure = [0.99] * 7
    assert play(rejected, [sure], [[0.99] * 6], 0.5, 6) == Played(1, 6, 3)
    # The wrong guess itself, at place 2, is what the head doubts: the fourth is drafted while that is found out.
    assert play(rejected, [sure], [[0.1] * 6], 0.5, 6) == Played(1, 4, 3)
    # A doubt about the text's own token there, which was not drafted, says nothing.
    doubtful = [0.99, 0.99, 0.1, 0.99, 0.99, 0.99, 0.99]
    assert play(rejected, [doubtful], [[0.99] * 6], 0.5, 6) == Played(1, 6, 3)
    # A doubt about the first token stops with the second.
    assert play(rejected, [[0.1, *sure[1:]]], [[0.99] * 6], 0.5, 6) == Played(1, 2, 3)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_shipped_heads_fit_their_drafts(pair):
    file = MODELS / FOLDERS[pair.model] / pair.file
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    head = AcceptanceHead(SHAPES[pair.model].hidden, int(metadata["depth"]))
    head.load_state_dict(load_file(file))
    assert 0 < float(metadata["threshold"]) < 1
