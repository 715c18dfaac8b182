"""A folder's safetensors, read without trusting them: mapped, checked against a layout, copied out tensor by tensor.

No other format is ever opened: pickled weights (.bin, .pt, …) can run code when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.packed import PackedWeight
from .config_fields import read_json
from .errors import EngineStartError
from .layout import Part, Weight
from .quant.integers import column_order
from .quant.scheme import FLOATS, Entry, Scheme, Storage, end_to_end

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Stored(NamedTuple):
    """Where a tensor lies: the open file, its path and the name it has there."""

    file: Any
    path: Path
    name: str


class Source(NamedTuple):
    """A part of a parameter, and how it is stored; None = as floats."""

    part: Part
    storage: Storage | None


class Checkpoint:
    """The tensors of a folder by name, without the leading `model.`. A context manager: it holds the files mapped.

    scheme: how its linears are quantized, None = not.
    Raises EngineStartError for a folder without safetensors and for a corrupt or truncated file.
    """

    def __init__(self, folder: Path, scheme: Scheme | None = None) -> None:
        self.folder, self.scheme = folder, scheme
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

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def items(self) -> Iterator[tuple[str, str]]:
        """(name without the leading `model.`, name in the file) of every tensor."""
        return ((name, stored.name) for name, stored in self._tensors.items())

    def _map(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise EngineStartError(f"{path} is not a whole safetensors file ({error}); download it again") from None
        for name in file.keys():  # noqa: SIM118  (not a dict)
            self._tensors[name.removeprefix("model.")] = Stored(file, path, name)

    # ---------------------------------------------------------------- what lies where

    def sources(self, weight: Weight) -> tuple[Source, ...]:
        """The first layout of which the checkpoint has a tensor, else the usual one."""
        layouts = [tuple(self._source(weight, part) for part in layout) for layout in weight.layouts]
        return next((sources for sources in layouts if any(map(self._has_any, sources))), layouts[-1])

    def _source(self, weight: Weight, part: Part) -> Source:
        """A linear that lies there under its float name alone is one of floats, whatever the configuration says:
        several writers do not list what they leave out."""
        storage = self.scheme.storage(part.linear) if self.scheme is not None and weight.linear else None
        if storage is None or len(part.shape) != 2:
            return Source(part, None)
        packed = Source(part, storage)
        return Source(part, None) if part.name in self._tensors and not self._has_any(packed) else packed

    def _has_any(self, source: Source) -> bool:
        return any(name in self._tensors for name in self._names(source))

    def _names(self, source: Source) -> dict[str, Entry]:
        """The tensors of a part by name."""
        part, storage = source
        if storage is None:
            return {part.name: Entry("weight", (part.shape,), FLOATS)}
        stem = part.name.removesuffix("weight")
        return {stem + entry.suffix: entry for entry in storage.tensors(*part.shape)}

    # ---------------------------------------------------------------- checks of headers

    def check(self, weights: Iterable[Weight], spare: Iterable[str] = ()) -> None:
        """Compare headers with what the model needs, before a byte of data is read.

        spare: names that may be there and are not needed. Raises EngineStartError for a missing, misshapen,
        mistyped or surplus tensor, and for a shape that its format cannot have.
        """
        needed = set(spare)
        for weight in weights:
            for source in self.sources(weight):
                self._check_source(source)
                needed.update(self._names(source))
        surplus = sorted(name for name in self._tensors if name not in needed and not self._means_nothing(name))
        if surplus:
            shown = ", ".join(surplus[:5]) + (f" and {len(surplus) - 5} more" if len(surplus) > 5 else "")
            raise EngineStartError(
                f"{self.folder}: tensors that config.json does not account for: {shown}; "
                "the configuration belongs to another model, or the model has parts that are not supported"
            )

    def _means_nothing(self, name: str) -> bool:
        """Old buffers of angles; biases of zeros, which writers of quantized linears add where the model has none."""
        if self.scheme is not None and name.endswith(".bias"):
            return not self.tensor(name).any()
        return name.endswith("rotary_emb.inv_freq")

    def _check_source(self, source: Source) -> None:
        part, storage = source
        why = None if storage is None else storage.refuses(*part.shape)
        if why is not None:
            raise EngineStartError(f"{self.folder}: tensor {part.name} {list(part.shape)} cannot be packed: {why}")
        for name, entry in self._names(source).items():
            if name in self._tensors or not entry.optional:
                self.check_entry(name, entry)

    def check_entry(self, name: str, entry: Entry) -> None:
        """Raises EngineStartError for a tensor that is missing, misshapen or of another dtype."""
        stored = self._tensors.get(name)
        shapes = " or ".join(str(list(shape)) for shape in entry.shapes)
        if stored is None:
            raise EngineStartError(
                f"{self.folder}: tensor {name} {shapes} is missing; "
                "the download is incomplete or config.json belongs to another model"
            )
        header = stored.file.get_slice(stored.name)
        if tuple(header.get_shape()) not in entry.shapes:
            raise EngineStartError(
                f"{stored.path}: tensor {stored.name} has shape {header.get_shape()}, config.json asks for "
                f"{shapes}; the two belong to different models"
            )
        if header.get_dtype() not in entry.dtypes:
            raise EngineStartError(
                f"{stored.path}: tensor {stored.name} is stored as {header.get_dtype()}, config.json asks for "
                f"{' or '.join(entry.dtypes)}; use the unquantized model or one in a supported format"
            )

    # ---------------------------------------------------------------- values

    def tensor(self, name: str) -> Tensor:
        """The values as they are mapped: whoever keeps them copies them."""
        stored = self._tensors[name]
        return stored.file.get_tensor(stored.name)

    def read(self, weight: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy of a parameter of floats in its joined shape, cast and placed."""
        out = torch.empty(weight.shape, dtype=dtype, device=device)
        flat, end = out.view(-1), 0
        for part, _ in self.sources(weight):
            values = self.held(part)
            flat[end : end + values.numel()].copy_(values.reshape(-1))
            end += values.numel()
        return out

    def held(self, part: Part) -> Tensor:
        """What is held of a tensor of floats: only these pages of the file are touched."""
        values = self.tensor(part.name)
        return values if part.cut is None else end_to_end(values, part.cut.dim, part.cut.spans)

    def packed(self, part: Part, storage: Storage, device: torch.device) -> PackedWeight:
        """A quantized linear, placed. Raises EngineStartError naming the tensor whose values no weight has."""
        tensors = {
            entry.suffix: self._held_of(part, entry, name).to(device, copy=True)
            for name, entry in self._names(Source(part, storage)).items()
            if name in self._tensors
        }
        outputs, inputs = part.held
        try:
            if part.cut is not None:
                _forget_the_whole(tensors, part, storage)
            return storage.pack(tensors, outputs, inputs)
        except ValueError as error:
            raise EngineStartError(f"{self.folder}: tensor {part.name.removesuffix('weight')}{error}") from None

    def _held_of(self, part: Part, entry: Entry, name: str) -> Tensor:
        tensor = self.tensor(name)
        return tensor if part.cut is None else entry.cut(tensor, part.cut.dim, part.cut.spans)


def _forget_the_whole(tensors: dict[str, Tensor], part: Part, storage: Storage) -> None:
    """Take out what speaks of all inputs: the shape, and an order that is none. ValueError for one that is."""
    tensors.pop("weight_shape", None)
    if part.cut is not None and part.cut.dim == 1:
        for suffix in ("g_idx", "weight_g_idx"):
            order = tensors.pop(suffix, None)
            if column_order(order, part.shape[1], storage.packing.group or part.shape[1]) is not None:
                raise ValueError(
                    f"{suffix}: is in an order of its own (act-order), which ranks cannot share in a mixture"
                )


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
