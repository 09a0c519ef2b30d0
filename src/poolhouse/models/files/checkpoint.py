"""Checkpoint: config.json and the tensors of a model, each tensor read when it is asked for."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject, weight_files
from poolhouse.models.files.gguf import GgufFolder, folder_of
from poolhouse.models.files.quantised import Dequantised, Quantised

Config = Mapping[str, Any]


class Checkpoint:
    """A folder with config.json and weights: safetensors (one file or an index), pytorch_model.bin, or a GGUF file.

    variant: which of several weights of one folder: "fp16" for model.fp16.safetensors and its like.
    quantised: how its weights are stored, where that is not as they are.
    """

    def __init__(self, folder: Path | Folder, variant: str | None = None, quantised: Quantised | None = None) -> None:
        self.folder = folder_of(folder)
        self.variant = variant
        self.quantised = quantised

    @property
    def config(self) -> JsonObject:
        """config.json.

        Raises:
            CheckpointError: there is none.
        """
        if not self.folder.has("config.json"):
            raise CheckpointError(f"{self.folder} has no config.json. A model folder holds config.json and weights.")
        return self.folder.json("config.json")

    @cached_property
    def tensors(self) -> TensorFiles | Dequantised | Mapping[str, Tensor]:
        if isinstance(self.folder, GgufFolder):
            return self.folder.tensors
        stored = TensorFiles(self.folder, self.variant)
        return stored if self.quantised is None else Dequantised(stored, self.quantised)

    def check_weights(self) -> None:
        """Raise CheckpointError where there are none, before somebody else looks for them."""
        _weights(self.folder, self.variant)


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of a folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path | Folder, variant: str | None = None) -> None:
        self.folder = Folder.of(folder)
        self._pickled: dict[str, Tensor] = {}
        self._file_of: dict[str, safe_open] = {}
        self._former: dict[str, str] = {}
        found = _weights(self.folder, variant)
        paths = self._shards(found) if found.suffix == ".json" else [found]
        if found.name.startswith("model."):
            self._open(paths)
        else:
            self._unpickle(paths)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._pickled:
            return self._pickled[name]
        tensor: Tensor = self._file_of[name].get_tensor(self._former.get(name, name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._pickled
        yield from self._file_of

    def __len__(self) -> int:
        return len(self._pickled) + len(self._file_of)

    def _shards(self, index: Path) -> list[Path]:
        weight_map = self.folder.json(index.name, keep=False).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map.")
        shards = [self.folder.path / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(f"{self.folder} lacks {missing}, which {index.name} names.")
        return shards

    def _open(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is corrupt or no safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 - a file of tensors is no mapping
                today = _current_name(name)
                self._file_of[today] = file
                self._former[today] = name

    def _unpickle(self, paths: list[Path]) -> None:
        for path in paths:
            self._pickled.update({_current_name(name): tensor for name, tensor in unpickled(path).items()})


def unpickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file of `torch.save`, of today's format or of the one before torch 1.6; it runs no code.

    Raises:
        CheckpointError: a damaged file, or one that holds anything but tensors by name.
    """
    try:
        # mmap reads tensors when touched, which files from before torch 1.6 do not allow; weights_only keeps pickles
        # from running code.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as plain weights: {reason(error)}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        held = list(map(str, tensors))[:5] if isinstance(tensors, Mapping) else type(tensors).__name__
        raise CheckpointError(f"{path} does not hold tensors by name, as save_pretrained writes them, but {held}.")
    return tensors


def reason(error: Exception) -> str:
    """Torch's reason for not reading a file, without its advice, which is to run what the file brings."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        return (
            f"it holds Python objects ({code[1]}) beside tensors, and reading them could run code. "
            "Save its tensors as model.safetensors."
        )
    if "tar" in str(error):
        return "it is in the tar format of torch before 0.1.10; save it anew, as model.safetensors."
    if "Weights only load failed" in str(error):
        return "it is damaged, or no file of torch."
    return str(error) or "it ends too early."


def _weights(folder: Folder, variant: str | None) -> Path:
    """The file of weights, or of their index.

    Raises:
        CheckpointError: none, naming the variants that are there.
    """
    files = [folder.path / name for name in weight_files(variant)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise CheckpointError(_nothing_found(folder.path, [file.name for file in files], variant))
    return found


def _nothing_found(folder: Path, looked_for: list[str], variant: str | None) -> str:
    """What to say of a folder without the weights that were wanted."""
    pattern = re.compile(
        r"(?:model|pytorch_model)\.(?:(?:safetensors|bin)\.index\.)?([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin|json)"
    )
    matches = [pattern.fullmatch(file.name) for file in sorted(folder.iterdir())]
    variants = sorted({match[1] for match in matches if match} - {"index"})
    message = f"{folder} has no weights{f' of the variant {variant!r}' if variant else ''}. Looked for "
    message += ", ".join(looked_for) + "."
    if variants:
        message += f" It has the variants {variants}: choose one by variant={variants[0]!r}."
    return message


def _current_name(name: str) -> str:
    """The first BERTs call a norm's weight gamma and its bias beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
