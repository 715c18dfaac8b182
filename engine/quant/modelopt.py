"""FP8 checkpoints of NVIDIA's ModelOpt: one scale per matrix and a fixed one of its activations.

Newer ones describe themselves in config.json, older ones in a file of their own, hf_quant_config.json.
"""

from __future__ import annotations

import fnmatch
import re

from ..config_fields import ConfigFields
from .fp8 import Fp8
from .scheme import EVERYTHING, LM_HEAD, Rule, Scheme, named

OWN_FILE = "hf_quant_config.json"


def read_modelopt(fields: ConfigFields) -> Scheme:
    """The keys of `quantization_config` in config.json, or of `quantization` in its own file."""
    if fields.text("quant_algo") != "FP8":
        fields.refuse("quant_algo", "must be FP8; take such a quantization of the model")
    entries = [*fields.texts("ignore"), *fields.texts("exclude_modules")]
    kept = [Rule(_matching(entry), None) for entry in entries]
    return Scheme(
        method="modelopt",
        rules=(*kept, Rule(LM_HEAD, None), Rule(EVERYTHING, Fp8(per="tensor", static=True))),
        kv_format=_kv_format(fields),
    )


def _matching(entry: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(entry)) if "*" in entry else named(entry)


def _kv_format(fields: ConfigFields) -> str | None:
    if fields.has("kv_cache_quant_algo"):
        if fields.text("kv_cache_quant_algo") != "FP8":
            fields.refuse("kv_cache_quant_algo", "must be FP8 or null")
        return "fp8_e4m3"
    return kv_scheme(fields)


def kv_scheme(fields: ConfigFields) -> str | None:
    """`kv_cache_scheme` as compressed-tensors and ModelOpt write it."""
    if not fields.has("kv_cache_scheme"):
        return None
    scheme = fields.child("kv_cache_scheme")
    if (
        scheme.text("type", "float") != "float"
        or scheme.integer("num_bits", 1, 32) != 8
        or scheme.flag("dynamic", False)
    ):
        fields.refuse(
            "kv_cache_scheme", "must be eight-bit floats with fixed scales; remove the key and give --kv-cache-dtype"
        )
    return "fp8_e4m3"
