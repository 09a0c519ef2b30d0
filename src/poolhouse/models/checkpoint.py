"""Checkpoint: the files of a model, read lazily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.json_files import read_json

Config = Mapping[str, Any]


class Checkpoint:
    """A folder with config.json and weights: safetensors (one file or an index) or pytorch_model.bin.

    weights_folder: where the weights lie, if not beside config.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json. A model folder holds config.json and weights.")

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def tensors(self) -> TensorFiles:
        return TensorFiles(self.folder)


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of a folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pickled: dict[str, Tensor] = {}
        self._file_of: dict[str, Any] = {}
        self._former: dict[str, str] = {}
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        pickle, pickle_index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
        if single.is_file():
            self._open([single])
        elif index.is_file():
            self._open(self._shards(index))
        elif pickle.is_file():
            self._unpickle([pickle])
        elif pickle_index.is_file():
            self._unpickle(self._shards(pickle_index))
        else:
            raise CheckpointError(
                f"{folder} has no weights. Looked for {single.name}, {index.name}, {pickle.name}, {pickle_index.name}."
            )

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
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map.")
        shards = [self.folder / name for name in sorted(set(weight_map.values()))]
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
                today = _todays_name(name)
                self._file_of[today] = file
                self._former[today] = name

    def _unpickle(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                # mmap reads tensors when touched; weights_only keeps pickles from running code.
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise CheckpointError(f"{path} cannot be read as plain weights: {error}") from error
            self._pickled.update({_todays_name(name): tensor for name, tensor in tensors.items()})


def _todays_name(name: str) -> str:
    """The first BERTs call a norm's weight gamma and its bias beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
