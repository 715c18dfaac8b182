"""What an engine drafts: the options of speculation by themselves and against each other.

Whether a draft model, a slice or a choice of layers fits the target is for the proposers' loader, which has read both.
"""

from __future__ import annotations

import re

from ...scheduler.drafts import DraftShape, parse_shape
from ..config import EngineConfig
from ..errors import EngineStartError

# Tokens guessed one after another where nobody says how many. With adaptive speculation each step takes the best depth
# up to it, so it bounds what is reserved; without, it is short enough that a guess gone wrong costs little.
DEFAULT_DEPTHS = {"ngram": 4, "draft": 4, "nested": 4, "layers": 4}

METHODS = ("none", *DEFAULT_DEPTHS)

# method -> (how its speculative_model is written, the same in words)
MODELS = {
    "draft": (re.compile(r".+"), "the folder or hub id of a smaller model with the same tokenizer"),
    "nested": (
        re.compile(r"h/[248]|[1-9][0-9]*"),
        "the width of the slice: h/2, h/4, h/8, or a number of FFN channels",
    ),
    "layers": (re.compile(r"[0-9]+(,[0-9]+)*"), "the layers that it keeps, such as 0,1,6"),
}


def choose_drafts(config: EngineConfig, reasons: dict[str, str]) -> tuple[str, DraftShape | None]:
    """Method and largest shape of the drafts; None = none are made. Raises EngineStartError for what cannot be."""
    method = config.speculative_method
    if method not in METHODS:
        raise EngineStartError(f"speculative_method is {method!r}; choose {', '.join(METHODS)}")
    _check_model(method, config.speculative_model)
    if method == "none":
        _check_nothing_is_wished(config)
        reasons["draft_method"] = "not asked for"
        return method, None
    shape = _shape(config)
    if shape.nodes + 1 > config.max_num_batched_tokens:
        raise EngineStartError(
            f"a draft of {shape} is verified in {shape.nodes + 1} rows, but max_num_batched_tokens is "
            f"{config.max_num_batched_tokens}: raise it, or lower num_speculative_tokens or take a smaller "
            "speculative_tree"
        )
    given = config.num_speculative_tokens is not None or config.speculative_tree != "chain"
    reasons["draft_method"] = "given"
    reasons["draft_shape"] = "given" if given else f"the default of {method}"
    return method, shape


def _check_model(method: str, model: str | None) -> None:
    if method not in MODELS:
        if model is not None:
            raise EngineStartError(
                f"speculative_model is {model!r}, but speculative_method is {method!r}, which has none: leave it out"
            )
        return
    form, words = MODELS[method]
    if model is None or not form.fullmatch(model):
        raise EngineStartError(f"speculative_model is {model!r}, but speculative_method is {method!r}: give {words}")


def _check_nothing_is_wished(config: EngineConfig) -> None:
    for name, idle in (("num_speculative_tokens", None), ("speculative_tree", "chain")):
        value = getattr(config, name)
        if value != idle:
            raise EngineStartError(
                f"{name} is {value!r}, but speculative_method is 'none': choose a method or leave {name} out"
            )


def _shape(config: EngineConfig) -> DraftShape:
    tree, depth = config.speculative_tree, config.num_speculative_tokens
    if depth is not None and tree != "chain":
        raise EngineStartError(
            f"num_speculative_tokens is {depth}, but speculative_tree is {tree!r}, which says itself how deep it is: "
            "leave one of them out"
        )
    try:
        return parse_shape(tree, DEFAULT_DEPTHS[config.speculative_method] if depth is None else depth)
    except ValueError as error:
        raise EngineStartError(f"speculative_tree: {error}") from None
