"""A folder's safetensors, read without trusting them: mapped, checked against a layout, copied out tensor by tensor.

No other format is ever opened: pickled weights (.bin, .pt, …) can run code when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config_fields import read_json
from .errors import EngineStartError
from .layout import Part, Weight

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """Where a tensor lies: the open file, its path and the name it has there."""

    file: Any
    path: Path
    name: str


class Checkpoint:
    """The tensors of a folder by name, without the leading `model.`. A context manager: it holds the files mapped.

    Raises EngineStartError for a folder without safetensors and for a corrupt or truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._tensors: dict[str, Stored] = {}
        try:
            for path in weight_files(folder):
                self._map(path)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def _map(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise EngineStartError(f"{path} is not a whole safetensors file ({error}); download it again") from None
        for name in file.keys():  # noqa: SIM118  (not a dict)
            self._tensors[name.removeprefix("model.")] = Stored(file, path, name)

    def check(self, weights: Iterable[Weight], spare: Iterable[str] = ()) -> None:
        """Compare headers with what the model needs, before a byte of data is read.

        spare: names that may be there and are not needed. Raises EngineStartError for a missing, misshapen,
        non-float or surplus tensor.
        """
        needed = {part.name for weight in weights for part in self._parts(weight)}
        surplus = [name for name in self._tensors if name not in needed and not name.endswith("rotary_emb.inv_freq")]
        surplus = sorted(set(surplus) - set(spare))
        if surplus:
            shown = ", ".join(surplus[:5]) + (f" and {len(surplus) - 5} more" if len(surplus) > 5 else "")
            raise EngineStartError(
                f"{self.folder}: tensors that config.json does not account for: {shown}; "
                "the configuration belongs to another model, or the model has parts that are not supported"
            )

    def _parts(self, weight: Weight) -> tuple[Part, ...]:
        """The first layout of which the checkpoint has a part; all its parts must be there and in shape."""
        present = (layout for layout in weight.layouts if any(part.name in self._tensors for part in layout))
        parts = next(present, weight.layouts[-1])
        for part in parts:
            self._check_part(part)
        return parts

    def _check_part(self, part: Part) -> None:
        stored = self._tensors.get(part.name)
        if stored is None:
            raise EngineStartError(
                f"{self.folder}: tensor {part.name} {list(part.shape)} is missing; "
                "the download is incomplete or config.json belongs to another model"
            )
        header = stored.file.get_slice(stored.name)
        if tuple(header.get_shape()) != part.shape:
            raise EngineStartError(
                f"{stored.path}: tensor {stored.name} has shape {header.get_shape()}, config.json asks for "
                f"{list(part.shape)}; the two belong to different models"
            )
        if header.get_dtype() not in FLOATS:
            raise EngineStartError(
                f"{stored.path}: tensor {stored.name} is stored as {header.get_dtype()}, supported are "
                f"{', '.join(FLOATS)}; use the unquantized model"
            )

    def read(self, weight: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy of the parameter in its joined shape, cast and placed. The mapped file is not referred to by it."""
        out = torch.empty(weight.shape, dtype=dtype, device=device)
        flat, end = out.view(-1), 0
        for part in self._parts(weight):
            stored = self._tensors[part.name]
            values = stored.file.get_tensor(stored.name)
            flat[end : end + values.numel()].copy_(values.view(-1))
            end += values.numel()
        return out


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise EngineStartError(f"{index}: weight_map must map tensor names to files; download it again")
        return [_shard(index, name) for name in sorted(set(map(str, weight_map.values())))]
    found = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in found or len(found) == 1:
        return [single if single in found else found[0]]
    if found:
        raise EngineStartError(f"{folder} has {len(found)} safetensors files but no {index.name}; download it again")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise EngineStartError(
            f"{folder} has only pickled weights ({', '.join(pickled[:3])}), which can run code when read; "
            "convert them to safetensors"
        )
    raise EngineStartError(f"{folder} has no model.safetensors; give a folder in Hugging Face layout")


def _shard(index: Path, name: str) -> Path:
    path = index.parent / name
    if Path(name).name != name or path.suffix != ".safetensors":
        raise EngineStartError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
    if not path.is_file():
        raise EngineStartError(f"{index}: the file {name} is missing; the download is incomplete")
    return path
