"""Static embeddings: a table of vectors, one per token id, whose mean is the vector of a text; no model runs.

Layouts: sentence-transformers' StaticEmbedding, model2vec's tensors in its place, and model2vec's own folder without a
modules.json, which drops unknown tokens and reads 512 tokens unless its config.json says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import read_json
from poolhouse.models.files.module_tensors import module_tensors
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.models.pipelines import embed_pipelines
from poolhouse.models.placement import dtype_of
from poolhouse.outputs import Array
from poolhouse.packing.batch import Batch
from poolhouse.packing.segments import Segments
from poolhouse.packing.tokens import Ids
from poolhouse.params import PoolerConfig, PoolingParams
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.rows import Rows

# A table has no longest text. This bounds the memory of one; `max_model_len` moves it.
_MAX_TOKENS = 32768
# As model2vec, where its config.json says nothing.
_MODEL2VEC_MAX_TOKENS = 512


class Table:
    """The backbone of a static model: the row of each token."""

    reentrant = True

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self, batch: Batch) -> Tensor:
        """[total, features]."""
        return F.embedding(batch.ids, self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class StaticVectors:
    """The side of a routed model that is looked up; see `poolhouse.models.files.routes.LookedUp`."""

    table: Table
    pipeline: Pipeline
    tokenizer_folder: Path

    def vector(self, ids: Ids, params: PoolingParams) -> Array:
        """[features]: the pooled rows of these tokens."""
        known = torch.from_numpy(ids)
        with torch.inference_mode():
            rows = self.pipeline(Rows(self.table.rows[known], Segments((len(ids),)), known), params)
        vector: Array = rows.values[0].numpy()
        return vector


@dataclass(frozen=True, slots=True, eq=False)
class StaticModel:
    """What a folder of static embeddings holds.

    files: what sentence-transformers' files say of it, or what they would. max_tokens: None where nobody states one.
    """

    table: Table
    files: SentenceTransformersFiles
    folder: Path
    max_tokens: int | None
    words: str
    notes: tuple[str, ...] = ()

    def longest(self, asked: int | None) -> int:
        """The longest prompt. asked: the user's wish; a table takes any.

        Raises:
            ConfigError: a length below 1.
        """
        if asked is None or asked == -1:
            return self.max_tokens or _MAX_TOKENS
        if asked < 1:
            raise ConfigError(f"max_model_len must be at least 1, or -1 for the model's own limit, got {asked}.")
        return asked


def read_static(folder: Path, files: SentenceTransformersFiles | None, dtype: str) -> StaticModel | None:
    """The static model in `folder`; None where it is none.

    files: what sentence-transformers' files there say. dtype: the user's wish.

    Raises:
        CheckpointError: tensors that are missing or do not fit.
    """
    config = read_json(folder / "config.json", needed=False)
    if files is not None and files.static:
        place = files.transformer_folder
        note = (
            "Texts are read as sentence-transformers does, by modules.json: unknown tokens count, and max_length does not. "
            "model2vec drops unknown tokens, and cuts at max_length."
        )
        notes = (note,) if _is_model2vec(folder, config) else ()
        tokenizer = read_json(place / "tokenizer.json")
        cut = (tokenizer.get("truncation") or {}).get("max_length")
        return StaticModel(read_table(place, dtype), files, place, cut, "table of StaticEmbedding", notes)
    if files is not None or not _is_model2vec(folder, config):
        return None
    described = SentenceTransformersFiles(
        folder, static=True, pooling=("MEAN",), normalize=bool(config.get("normalize")), dropped=_unknown(folder)
    )
    most = config.get("max_length", _MODEL2VEC_MAX_TOKENS)
    if most is not None and (type(most) is not int or most < 1):
        raise CheckpointError(f"{folder / 'config.json'}: max_length is {most!r}.")
    return StaticModel(read_table(folder, dtype), described, folder, most, "table of model2vec")


def read_table(place: Path, dtype: str = "auto") -> Table:
    """The table in a folder, by token id: where the rows of several ids are one, or weighed, each id gets its own."""
    tensors = module_tensors(place)
    rows = tensors.get("embedding.weight", tensors.get("embeddings"))
    if rows is None or rows.ndim != 2:
        raise CheckpointError(
            f"{place}: a table of static embeddings is a matrix `embedding.weight` or `embeddings`; there is "
            f"{sorted(tensors)}."
        )
    kind = dtype_of(dtype, {}, None, torch.device("cpu"))
    rows = rows.float()
    if "embedding.weight" not in tensors:
        mapping, weights = tensors.get("mapping"), tensors.get("weights")
        if mapping is not None:
            if mapping.ndim != 1 or (len(mapping) and not 0 <= int(mapping.min()) <= int(mapping.max()) < len(rows)):
                raise CheckpointError(f"{place}: `mapping` must hold a row of `embeddings` for each token.")
            rows = rows[mapping.long()]
        if weights is not None:
            if weights.shape != (len(rows),):
                raise CheckpointError(
                    f"{place}: `weights` has {list(weights.shape)}, but there are {len(rows)} tokens."
                )
            rows = rows * weights.float()[:, None]
    return Table(rows.to(kind).contiguous())


def static_side(files: SentenceTransformersFiles, user: PoolerConfig) -> StaticVectors:
    """The side of a routed model that these files describe."""
    table = read_table(files.transformer_folder)
    pipeline = embed_pipelines(table.rows.shape[1], user, files, "MEAN")["embed"]
    return StaticVectors(table, pipeline, files.transformer_folder)


def _is_model2vec(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether model2vec wrote this folder; only its distiller names a model type."""
    stated = config.get("model_type")
    if stated is not None or not config:
        return stated == "model2vec"
    path = folder / "model.safetensors"
    return path.is_file() and "embeddings" in module_tensors(folder)


def _unknown(folder: Path) -> int | None:
    """The id of the unknown token, which model2vec takes out of every text."""
    tokenizer: Mapping[str, Any] = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("unk_id") is not None:
        found: int = model["unk_id"]
        return found
    word, vocabulary = model.get("unk_token"), model.get("vocab")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    known = {**vocabulary, **added} if isinstance(vocabulary, Mapping) else added
    return None if word is None else known.get(word)
