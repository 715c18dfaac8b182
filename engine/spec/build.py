"""From the settings of speculation to proposers: what has to be loaded, once, and what goes with one runner's cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...kernels import Kernels
from ...kernels.batch import LayerKV
from ..config import BUNDLED_MODEL, EngineConfig
from ..decoder import Decoder
from ..errors import EngineStartError
from ..families import load_config
from ..kv_cache import FORMAT, allocate, kv_spec
from ..loader import BUNDLED_FOLDER, load_decoder, locate_model
from ..model_config import DecoderConfig
from ..recorded import recorded
from ..resolve import Resolved, choose_kernels
from ..sampler import Sampler
from .acceptance import AcceptanceHead, head_path, load_head
from .confidence import Confidence
from .contents import CacheContents
from .model import ModelProposer
from .ngram import NgramProposer
from .proposer import Proposer
from .slices import layers_decoder, nested_decoder
from .vocabulary import check_same_tokenizer

BUNDLED_DRAFT = BUNDLED_FOLDER.parent / "quire-py-1m"


class Drafter(NamedTuple):
    """A model that guesses. cached: it has keys and values of its own; else it reads the target's."""

    decoder: Decoder
    kernels: Kernels
    cached: bool
    head: AcceptanceHead | Confidence | None = None


def load_draft_config(config: EngineConfig, folder: Path) -> DecoderConfig | None:
    """The configuration of an independent draft model; None where there is none. folder: the target's.

    Raises EngineStartError for one that speaks another language than the target.
    """
    if config.speculative_method != "draft" or config.speculative_model is None:
        return None
    path = _folder(config.speculative_model)
    draft = load_config(path)
    check_same_tokenizer(folder, path)
    return draft


def load_drafter(
    config: EngineConfig, settings: Resolved, folder: Path, target: Decoder, kernels: Kernels
) -> Drafter | None:
    """The model that guesses; None where none is asked for, or a look-up does it.

    folder, target, kernels: of the model that is served. Raises EngineStartError for what does not fit it.
    """
    asked = config.speculative_model
    if settings.draft is not None and asked is not None:
        path = _folder(asked)
        own = choose_kernels(config, settings, settings.draft, FORMAT[settings.dtype])
        decoder = load_decoder(path, settings.draft, own, settings.dtype, settings.device, settings.max_model_len)
        return Drafter(decoder, own, True, _head(head_path(path), settings.draft, settings, own))
    if settings.draft_method == "nested" and asked is not None:
        width = _width(asked, target.config.ffn)
        decoder = nested_decoder(target, folder, kernels, width, rounding=settings.rounding)
        return Drafter(decoder, kernels, False, _head(head_path(folder, width), target.config, settings, kernels))
    if settings.draft_method == "layers" and asked is not None:
        layers = [int(number) for number in asked.split(",")]
        return Drafter(layers_decoder(target, folder, kernels, layers), kernels, False)
    return None


def make_proposers(
    settings: Resolved,
    drafter: Drafter | None,
    cache: Sequence[LayerKV],
    sampler: Sampler,
    eos_token_ids: Sequence[int],
) -> dict[str, Proposer]:
    """By their method. cache: the target's. Look-up is always there beside a model: requests may ask for it."""
    if settings.draft_shape is None:
        return {}
    proposers: dict[str, Proposer] = {"ngram": NgramProposer()}
    if drafter is not None:
        contents = None
        if drafter.cached:
            contents = CacheContents(settings.num_blocks, settings.block_size)
            cache = _own_cache(drafter.decoder.config, settings)
        rows = settings.max_num_batched_tokens
        proposers[settings.draft_method] = ModelProposer(
            settings.draft_method,
            recorded(drafter.decoder, drafter.kernels, cache, rows, settings.most_drawn),
            list(cache),
            sampler,
            max_tokens=rows,
            eos_token_ids=eos_token_ids,
            contents=contents,
            head=drafter.head,
        )
    return proposers


def _folder(name: str) -> Path:
    """As for the model that is served, whose bundled one has a bundled draft model."""
    return locate_model(str(BUNDLED_DRAFT) if name == BUNDLED_MODEL else name)


def _own_cache(config: DecoderConfig, settings: Resolved) -> list[LayerKV]:
    spec = kv_spec(config, settings.block_size, FORMAT[settings.dtype])
    return allocate(spec, config.num_layers, settings.num_blocks, settings.device)


def _head(
    path: Path, config: DecoderConfig, settings: Resolved, kernels: Kernels
) -> AcceptanceHead | Confidence | None:
    if not path.exists():
        return None
    head = load_head(path, config.hidden, settings.dtype, settings.device)
    return head.on(kernels) if isinstance(head, AcceptanceHead) else head


def _width(asked: str, ffn: int) -> int:
    """Of "h/4" or a number of hidden units."""
    if not asked.startswith("h/"):
        return int(asked)
    parts = int(asked.removeprefix("h/"))
    if ffn % parts:
        raise EngineStartError(f"speculative_model is {asked!r}, but feed-forwards of {ffn} units have no such part")
    return ffn // parts
