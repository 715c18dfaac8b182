"""What is drafted, from the wishes of whoever starts the engine; and what cannot be, refused with field and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.resolve import Machine, Resolved, resolve
from quire.scheduler.drafts import MAX_NODES, DraftShape, chain

MACHINE = Machine(cuda=False, fast_bf16=False, cores=2, free_bytes=1 << 30)
MODELS = {"draft": "some/model", "nested": "h/4", "layers": "0,1,6"}


def settings_of(model: Path, method: str, **wishes: Any) -> Resolved:
    given: dict[str, Any] = {"speculative_method": method, "speculative_model": MODELS.get(method)}
    config = EngineConfig(model=str(model), dtype="float32", max_num_seqs=4, **(given | wishes))
    return resolve(config, load_config(model), MACHINE)


def test_nothing_is_drafted_unasked(tiny_model: Path) -> None:
    settings = resolve(EngineConfig(), load_config(tiny_model), MACHINE)
    assert (settings.draft_method, settings.draft_shape) == ("none", None)
    assert settings.reasons["draft_method"] == "not asked for"
    assert "draft_shape" not in settings.reasons


@pytest.mark.parametrize("method", ["ngram", "draft", "nested", "layers"])
def test_every_method_has_a_default_and_takes_every_shape(method: str, tiny_model: Path) -> None:
    settings = settings_of(tiny_model, method)
    assert (settings.draft_method, settings.draft_shape) == (method, chain(4))
    assert (settings.reasons["draft_method"], settings.reasons["draft_shape"]) == ("given", f"the default of {method}")
    for wishes, shape in (
        ({"num_speculative_tokens": 1}, chain(1)),
        ({"num_speculative_tokens": MAX_NODES}, chain(MAX_NODES)),
        ({"speculative_tree": "chain:6"}, chain(6)),
        ({"speculative_tree": "rsd-c:2,2,1"}, DraftShape("rsd-c", (2, 2, 1))),
        ({"speculative_tree": "rsd-s:3x4"}, DraftShape("rsd-s", (3, 3, 3, 3))),
    ):
        settings = settings_of(tiny_model, method, **wishes)
        assert settings.draft_shape == shape
        assert settings.reasons["draft_shape"] == "given"


@pytest.mark.parametrize("width", ["h/2", "h/8", "1", "384"])
def test_widths_of_a_slice(width: str, tiny_model: Path) -> None:
    assert settings_of(tiny_model, "nested", speculative_model=width).draft_method == "nested"


@pytest.mark.parametrize(
    ("method", "wishes", "says"),
    [
        ("eagle", {}, "speculative_method is 'eagle'; choose none, ngram, draft, nested, layers"),
        ("", {}, "speculative_method is ''; choose none"),
        ("ngram", {"speculative_model": "m"}, "speculative_model is 'm'.*'ngram', which has none: leave it out"),
        ("none", {"speculative_model": "m"}, "speculative_model is 'm'.*'none', which has none: leave it out"),
        ("none", {"num_speculative_tokens": 4}, "num_speculative_tokens is 4.*choose a method or leave num_spec"),
        ("none", {"speculative_tree": "rsd-s:2x2"}, "speculative_tree is 'rsd-s:2x2'.*choose a method or leave"),
        ("draft", {"speculative_model": None}, "speculative_model is None.*'draft': give the folder or hub id"),
        ("draft", {"speculative_model": ""}, "speculative_model is ''.*'draft': give the folder or hub id"),
        *(
            ("nested", {"speculative_model": width}, f"speculative_model is {width!r}.*: give the width of the slice")
            for width in (None, "", "h/3", "h/16", "0", "-4", "1.5", "h/2 ", "models/small", "٣")
        ),
        *(
            ("layers", {"speculative_model": kept}, f"speculative_model is {kept!r}.*: give the layers that it keeps")
            for kept in (None, "", "0,", "0-3", "0, 1", "all", "-1", "٣")
        ),
        ("ngram", {"num_speculative_tokens": 0}, "num_speculative_tokens is 0; give a number from 1 to 63"),
        ("ngram", {"num_speculative_tokens": 64}, "num_speculative_tokens is 64; give a number from 1 to 63"),
        *(
            ("ngram", {"speculative_tree": tree}, f"speculative_tree: '{re.escape(tree)}' is no shape.*; write chain")
            for tree in ("", "tree", "chain:", "chain:-1", "rsd-c:", "rsd-c:2,,1", "rsd-s:3", "rsd-s:3x", "RSD-S:3x4")
        ),
        *(
            ("ngram", {"speculative_tree": tree}, f"speculative_tree: '{tree}' has {nodes} nodes; 1 to 63")
            for tree, nodes in {"chain:0": 0, "chain:64": 64, "rsd-c:2,2,2,2,2,2": 126, "rsd-s:8x8": 64}.items()
        ),
        *(
            ("ngram", {"speculative_tree": tree, "num_speculative_tokens": 2}, "num_speculative_tokens is 2.*leave one")
            for tree in ("chain:4", "rsd-c:2,2", "rsd-s:2x2")
        ),
        (
            "ngram",
            {"num_speculative_tokens": 8, "max_num_batched_tokens": 8},
            "chain:8 is verified in 9 rows, but max_num_batched_tokens is 8: raise it, or lower num_spec",
        ),
        (
            "draft",
            {"speculative_tree": "rsd-c:2,2,1", "max_num_batched_tokens": 10},
            "rsd-c:2,2,1 is verified in 11 rows, but max_num_batched_tokens is 10",
        ),
    ],
)
def test_what_cannot_be(method: str, wishes: dict[str, Any], says: str, tiny_model: Path) -> None:
    with pytest.raises(EngineStartError, match=says):
        settings_of(tiny_model, method, **wishes)


def test_a_draft_that_just_fits_a_step(tiny_model: Path) -> None:
    settings = settings_of(tiny_model, "ngram", speculative_tree="rsd-c:2,2,1", max_num_batched_tokens=11)
    assert settings.draft_shape is not None
    assert settings.draft_shape.nodes == 10
