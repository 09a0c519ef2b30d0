"""Static embeddings: a table of vectors, one per token id, whose mean is the vector of a text; no model runs.

Layouts: sentence-transformers' StaticEmbedding, model2vec's tensors under its description, and model2vec's own folder without a
modules.json, which drops unknown tokens and reads 512 tokens unless its config.json says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import Folder, JsonObject
from poolhouse.models.files.module_steps import module_tensors, tensor_names
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.outputs import Array
from poolhouse.packing.pack import Batch, Segments
from poolhouse.packing.tokens import Ids
from poolhouse.params import PoolingParams
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.rows import Rows

# A table has no longest text. This bounds the memory of one; `max_model_len` moves it.
_MAX_TOKENS = 32768
_MODEL2VEC = "table of model2vec"
# As model2vec, where its config.json says nothing.
_MODEL2VEC_MAX_TOKENS = 512


class Table:
    """The backbone of a static model: the row of each token."""

    reentrant = True
    longest_shared = 0
    picks = False

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self, batch: Batch) -> Tensor:
        """[total, features]."""
        return F.embedding(batch.ids, self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class StaticVectors:
    """The route of a model that is looked up; see `poolhouse.models.files.routes.LookedUp`."""

    table: Table
    pipeline: Pipeline
    tokenizer_folder: Folder

    def vector(self, ids: Ids, params: PoolingParams) -> Array:
        """[features]: the pooled rows of these tokens."""
        known = torch.from_numpy(ids)
        with torch.inference_mode():
            pooled = self.pipeline(Rows(self.table.rows[known], Segments((len(ids),)), known), params)
        vector: Array = pooled.owned_by_numpy()[0]
        return vector


@dataclass(frozen=True, slots=True, eq=False)
class StaticFiles:
    """What the files of static embeddings say.

    files: those of sentence-transformers, or what they would say. max_tokens: None where no file states it.
    """

    files: SentenceTransformersFiles
    layout: str
    max_tokens: int | None
    notes: tuple[str, ...] = ()

    def cuts_by_characters(self, requested: int | None) -> bool:
        """Whether a text may have only so many characters too: in model2vec, wherever its tokens are limited."""
        return self.layout == _MODEL2VEC and (self.max_tokens is not None or requested not in (None, -1))

    def longest(self, requested: int | None) -> int:
        """The longest prompt. requested: by the user; a table takes any.

        Raises:
            ConfigError: a length below 1.
        """
        if requested is None or requested == -1:
            return self.max_tokens or _MAX_TOKENS
        if requested < 1:
            raise ConfigError(f"max_model_len must be at least 1, or -1 for the model's own limit, got {requested}.")
        return requested


def read_static(folder: Folder, files: SentenceTransformersFiles) -> StaticFiles | None:
    """What the files in `folder` say of static embeddings; None where it holds none.

    files: what sentence-transformers' files there say.

    Raises:
        CheckpointError: files that are missing, or a length that is none.
    """
    config = folder.json("config.json", needed=False)
    if files.static:
        note = (
            "Texts are read as sentence-transformers does, by modules.json: unknown tokens count, and max_length does not. "
            "model2vec drops unknown tokens, and cuts at max_length."
        )
        notes = (note,) if _is_model2vec(folder, config) else ()
        cut = (_tokenizer(files.transformer_folder).get("truncation") or {}).get("max_length")
        return StaticFiles(files, "table of StaticEmbedding", cut, notes)
    if files.described or not _is_model2vec(folder, config):
        return None
    described = SentenceTransformersFiles(
        folder,
        described=False,
        static=True,
        pooling=("MEAN",),
        normalize=bool(config.get("normalize")),
        dropped=_unknown(folder),
    )
    length = config.get("max_length", _MODEL2VEC_MAX_TOKENS)
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(f"{folder / 'config.json'}: max_length is {length!r}.")
    return StaticFiles(described, _MODEL2VEC, length)


def read_table(folder: Folder, dtype: torch.dtype = torch.float32) -> Table:
    """The table in a folder, by token id: where the rows of several ids are one, or weighted, each id gets its own.

    Raises:
        CheckpointError: tensors that are missing or do not fit.
    """
    tensors = module_tensors(folder)
    rows = tensors.get("embedding.weight", tensors.get("embeddings"))
    if rows is None or rows.ndim != 2:
        raise CheckpointError(
            f"{folder}: a table of static embeddings is a matrix `embedding.weight` or `embeddings`; there is "
            f"{sorted(tensors)}."
        )
    rows = rows.float()
    if "embedding.weight" not in tensors:
        mapping, weights = tensors.get("mapping"), tensors.get("weights")
        if mapping is not None:
            if mapping.ndim != 1 or (len(mapping) and not 0 <= int(mapping.min()) <= int(mapping.max()) < len(rows)):
                raise CheckpointError(f"{folder}: `mapping` must hold a row of `embeddings` for each token.")
            rows = rows[mapping.long()]
        if weights is not None:
            if weights.shape != (len(rows),):
                raise CheckpointError(
                    f"{folder}: `weights` has {list(weights.shape)}, but there are {len(rows)} tokens."
                )
            rows = rows * weights.float()[:, None]
    return Table(rows.to(dtype).contiguous())


def _is_model2vec(folder: Folder, config: JsonObject) -> bool:
    """Whether model2vec wrote this folder; only its distiller names a model type."""
    stated = config.get("model_type")
    if stated is not None or not config:
        return stated == "model2vec"
    return "embeddings" in tensor_names(folder)


def _unknown(folder: Folder) -> int | None:
    """The id of the unknown token, which model2vec takes out of every text."""
    tokenizer = _tokenizer(folder)
    model = tokenizer.get("model") or {}
    if model.get("unk_id") is not None:
        found: int = model["unk_id"]
        return found
    token, vocabulary = model.get("unk_token"), model.get("vocab")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    known = {**vocabulary, **added} if isinstance(vocabulary, Mapping) else added
    return None if token is None else known.get(token)


def _tokenizer(folder: Folder) -> JsonObject:
    """tokenizer.json, of which little is used."""
    return folder.json("tokenizer.json", keep=False)
