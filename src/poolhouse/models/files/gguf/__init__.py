"""GGUF: a file of llama.cpp as the folder of the checkpoint that it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from poolhouse.files import Folder
from poolhouse.models.files.gguf.architectures import Make, converted
from poolhouse.models.files.gguf.header import GgufFile
from poolhouse.models.files.gguf.tokenizer import MadeTokenizer, make_tokenizer

_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
_FLOATS = {"F32", "F16", "BF16", "F64"}


class GgufFolder(Folder):
    """A GGUF file as a folder: config.json and the tokenizer's files are made of its header.

    A tokenizer.json beside the file wins over the vocabulary of the header.

    Raises:
        CheckpointError: a file that is damaged, or of a model that is not served from GGUF files.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = GgufFile(path)
        self._converted = converted(self._file)
        beside = Folder(path.parent)
        # Where the tokenizer lies.
        self.tokenizer = beside if beside.has("tokenizer.json") else self

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors by the checkpoint's names, made float when they are asked for."""
        return _Made(self._converted.tensors)

    @property
    def pooling(self) -> str | None:
        """How the header says that vectors are pooled, if it does."""
        return self._converted.pooling

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, a sentence each."""
        counts = self._file.kinds()
        weights = f"A GGUF file, with tensors of the kinds {', '.join(f'{kind} ({n})' for kind, n in counts.items())}."
        if not _FLOATS.issuperset(counts):
            weights += (
                " All become floats when they are loaded, so the model takes the memory of one that is not quantised."
            )
        if self.tokenizer is not self:
            return weights, f"The tokenizer is {self.tokenizer / 'tokenizer.json'}, and not that of the header."
        return weights, self._tokenizer.note

    def has(self, name: str) -> bool:
        if name in _OF_TOKENIZERS and self.tokenizer is not self:
            return self.tokenizer.has(name)
        return name == "config.json" or name in _OF_TOKENIZERS

    def text(self, name: str) -> str:
        if name == "config.json":
            return json.dumps(self._converted.config)
        if self.tokenizer is not self:
            return self.tokenizer.text(name)
        if name == "tokenizer.json":
            whole: str = self._tokenizer.tokenizer.to_str()
            return whole
        template = self._file.fields.get("tokenizer.chat_template")
        return json.dumps({**self._tokenizer.named, "chat_template": template})

    @cached_property
    def _tokenizer(self) -> MadeTokenizer:
        return make_tokenizer(self.path, self._file.fields)


class _Made(Mapping[str, Tensor]):
    """The tensors of a GGUF file by the checkpoint's names."""

    def __init__(self, make: Mapping[str, Make]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def folder_of(path: Path | Folder) -> Folder:
    """The folder at a path, or a GGUF file as one.

    Raises:
        CheckpointError: a GGUF file that is damaged, or of a model that is not served from such files.
    """
    if isinstance(path, Folder):
        return path
    return GgufFolder(path) if path.suffix == ".gguf" and path.is_file() else Folder(path)
