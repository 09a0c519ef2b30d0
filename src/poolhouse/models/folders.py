"""Where the parts of a model lie: for most in one folder, for an adapter that stands as a model in two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from poolhouse.errors import CheckpointError
from poolhouse.models.adapters.peft import base_of, is_peft_folder
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles, read_sentence_transformers


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """described: sentence-transformers' files and prompts; files: what they say. weights: config.json and tensors.

    adapters: PEFT folders to merge into the weights; two where an adapter was trained on an adapted model.
    """

    described: Path
    weights: Path
    tokenizer: Path
    files: SentenceTransformersFiles | None
    adapters: tuple[Path, ...] = ()


def folders_of(folder: Path, find: Callable[[str], Path]) -> ModelFolders:
    """The folders of the model in `folder`. find: the folder of a path or hub id, for an adapter's base.

    An adapter's own description and tokenizer win over its base's, as in sentence-transformers.

    Raises:
        CheckpointError: an adapter whose base is not named or not there.
    """
    files = read_sentence_transformers(folder)
    transformer = folder if files is None else files.transformer_folder
    if not is_peft_folder(transformer):
        return ModelFolders(folder, transformer, transformer, files)
    base_folder = find(_near(base_of(transformer), transformer))
    if base_folder.resolve() == folder.resolve():
        raise CheckpointError(f"{transformer} holds an adapter that names itself as its base.")
    base = folders_of(base_folder, find)
    own_tokenizer = (transformer / "tokenizer_config.json").is_file() or (transformer / "tokenizer.json").is_file()
    return ModelFolders(
        described=base.described if files is None else folder,
        weights=base.weights,
        tokenizer=transformer if own_tokenizer else base.tokenizer,
        files=base.files if files is None else files,
        adapters=(*base.adapters, transformer),
    )


def _near(base: str, adapter: Path) -> str:
    """A relative path that is nothing from here may be one from beside the adapter."""
    beside = adapter.parent / base
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base
