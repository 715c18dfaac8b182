"""The rotary angles that a config.json asks for, in the spellings of both generations of files."""

from __future__ import annotations

from .config_fields import LAYER_TYPES, MAX_LAYERS, MAX_POSITION, ConfigFields
from .model_config import RopeConfig

MAX_BASE = 1e12
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ROPE_ALIASES = {"su": "longrope"}  # Phi-3's first releases
GEMMA3_LOCAL_BASE = 10_000.0

Ropes = tuple[tuple[RopeConfig, ...], tuple[int | None, ...]]


def same_rope(fields: ConfigFields, base: float, head_dim: int, windows: list[int | None]) -> Ropes:
    """One set of angles for every layer. base: the family's theta, where the file has none."""
    base = fields.number("rope_theta", 1, MAX_BASE, base)
    return (_rope(fields, _rope_parameters(fields), head_dim, base),), (0,) * len(windows)


def smollm3_ropes(fields: ConfigFields, base: float, head_dim: int, windows: list[int | None]) -> Ropes:
    """One set of angles, and layers without any."""
    ropes, layers = same_rope(fields, base, head_dim, windows)
    return ropes, tuple(rope if smollm3_rotates(fields, layer) else None for layer, rope in enumerate(layers))


def smollm3_rotates(fields: ConfigFields, layer: int) -> bool:
    flags = fields.integers("no_rope_layers", 0, 1)  # 1 = has rotary angles, whatever the key's name says
    if not flags:
        return (layer + 1) % fields.integer("no_rope_layer_interval", 1, MAX_LAYERS, 4) != 0
    if layer >= len(flags):
        fields.refuse("no_rope_layers", "must have an entry for every layer")
    return bool(flags[layer])


def gemma3_ropes(fields: ConfigFields, base: float, head_dim: int, windows: list[int | None]) -> Ropes:
    """Full layers and sliding layers each have their own angles: nested in new files, two bases in older ones."""
    full = _rope_parameters(fields)
    sliding = ConfigFields(fields.path, {})
    if any(full.has(kind) for kind in LAYER_TYPES):
        full, sliding = (full.child(kind) if full.has(kind) else sliding for kind in LAYER_TYPES)
    ropes = (
        _rope(fields, full, head_dim, fields.number("rope_theta", 1, MAX_BASE, base)),
        _rope(fields, sliding, head_dim, fields.number("rope_local_base_freq", 1, MAX_BASE, GEMMA3_LOCAL_BASE)),
    )
    return ropes, tuple(int(window is not None) for window in windows)


def _rope_parameters(fields: ConfigFields) -> ConfigFields:
    """`rope_parameters` (transformers 5) or `rope_scaling` (before), else nothing."""
    for key in ("rope_scaling", "rope_parameters"):
        if fields.has(key):
            return fields.child(key)
    return ConfigFields(fields.path, {}, "rope_parameters.")


def _rope(fields: ConfigFields, parameters: ConfigFields, head_dim: int, base: float) -> RopeConfig:
    base = parameters.number("rope_theta", 1, MAX_BASE, base)
    whole = fields.number("partial_rotary_factor", 0, 1, 1.0)
    rotary_dim = int(head_dim * parameters.number("partial_rotary_factor", 0, 1, whole))
    if rotary_dim < 2 or rotary_dim % 2:
        parameters.refuse("partial_rotary_factor", f"must leave an even number of rotated columns of {head_dim}")
    return RopeConfig(base=base, rotary_dim=rotary_dim, scaling=_rope_scaling(fields, parameters, rotary_dim))


def _rope_scaling(fields: ConfigFields, parameters: ConfigFields, rotary_dim: int) -> dict[str, object] | None:
    key = "rope_type" if parameters.has("rope_type") else "type"
    kind = parameters.text(key, "default")
    kind = ROPE_ALIASES.get(kind, kind)
    if kind not in ROPE_TYPES:
        parameters.refuse(key, f"must be one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    scaling: dict[str, object] = {"rope_type": kind}
    if kind in ("linear", "dynamic", "llama3") or parameters.has("factor"):
        scaling["factor"] = parameters.number("factor", 1, 1e6)
    if kind in ("yarn", "llama3", "longrope"):
        trained = fields.optional_integer("original_max_position_embeddings", 1, MAX_POSITION)
        scaling["original_max_position_embeddings"] = trained or parameters.integer(
            "original_max_position_embeddings",
            1,
            MAX_POSITION,
            fields.integer("max_position_embeddings", 1, MAX_POSITION),
        )
    if kind == "llama3":
        low = scaling["low_freq_factor"] = parameters.number("low_freq_factor", 1e-6, 1e6)
        scaling["high_freq_factor"] = parameters.number("high_freq_factor", low * (1 + 1e-6), 1e6)
    if kind == "longrope":
        scaling |= {name: parameters.numbers(name, rotary_dim // 2) for name in ("short_factor", "long_factor")}
    if kind in ("yarn", "longrope") and parameters.has("attention_factor"):
        scaling["attention_factor"] = parameters.number("attention_factor", 0, 1e6)
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if parameters.has(name):
                scaling[name] = parameters.number(name, 0, 1e6)
        scaling["truncate"] = parameters.flag("truncate", True)
    return scaling
