"""Every supported `quant_method` in one table. To add one: a file with its `Storage` and reader, and a row here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config_fields import ConfigFields, read_json
from .awq import read_awq
from .compressed_tensors import read_compressed_tensors
from .fp8 import read_fp8
from .gptq import read_gptq
from .modelopt import OWN_FILE, read_modelopt
from .scheme import Scheme

METHODS: dict[str, Callable[[ConfigFields], Scheme]] = {
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "modelopt": read_modelopt,
}


def read_scheme(folder: Path, config: ConfigFields) -> Scheme | None:
    """What a folder says of its quantization; None = the weights are floats. config: its config.json.

    Raises EngineStartError naming file, key, value and remedy for what is not supported.
    """
    if config.has("quantization_config"):
        fields = config.child("quantization_config")
        method = fields.text("quant_method")
        if method not in METHODS:
            fields.refuse(
                "quant_method",
                f"is not supported; supported are {', '.join(METHODS)}, and --quantization quantizes the model's "
                "unquantized checkpoint while it is loaded",
            )
        return METHODS[method](fields)
    if (folder / OWN_FILE).is_file():
        return read_modelopt(ConfigFields(folder / OWN_FILE, read_json(folder / OWN_FILE)).child("quantization"))
    return None
