"""Checkpoint and config -> a pipeline per task.

Per field the first that says something wins: the user's PoolerConfig, sentence-transformers' files, the model's default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.params import PoolerConfig, PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.sentence_transformers import SentenceTransformersFiles
from poolhouse.pooling.steps import Dense, Every, Norm, Normalize, Reduce, Step, Truncate, Unit
from poolhouse.tasks import Task


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The steps of one task. width: features of its answer, before Matryoshka cuts."""

    steps: tuple[Step, ...]
    width: int

    @property
    def words(self) -> str:
        """The steps for people: "mean > dense 384 > truncate > normalize"."""
        return " > ".join(step.words for step in self.steps)

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        for step in self.steps:
            rows = step(rows, params)
        return rows

    def to(self, device: torch.device) -> Pipeline:
        return replace(self, steps=tuple(step.to(device) for step in self.steps))


def embed_pipelines(
    hidden_size: int, user: PoolerConfig, files: SentenceTransformersFiles | None, default_pooling: str
) -> dict[Task, Pipeline]:
    """`embed` (one vector per prompt) and `token_embed` (one per token, through the same heads).

    hidden_size: features of a hidden state. default_pooling: a name of REDUCTIONS, for models that come without files.

    Raises:
        ConfigError: a pooling that these tasks do not have. CheckpointError: a head of another width than its input.
    """
    if user.tok_pooling_type == "STEP":
        raise ConfigError("pooler_config: STEP pooling belongs to token_classify, which this model does not offer.")
    reduce, from_files = _reduction(user, files, default_pooling)
    heads: tuple[Step, ...] = () if files is None else files.heads
    use_activation = user.use_activation
    if use_activation is None:
        use_activation = files.normalize if from_files and files is not None else True
    tail = (Truncate(), Normalize(use_activation))
    width = _width(hidden_size * len(reduce.names), heads)
    pipelines: dict[Task, Pipeline] = {"embed": Pipeline((reduce, *heads, *tail), width)}
    if len(reduce.names) == 1:
        # Token vectors are normalised unless the user says otherwise, as in vLLM.
        unit = True if user.use_activation is None else user.use_activation
        pipelines["token_embed"] = Pipeline((Every(), *heads, Truncate(), Normalize(unit)), width)
    else:
        # A head made for concatenated poolings does not fit single token vectors.
        unit = True if user.use_activation is None else user.use_activation
        pipelines["token_embed"] = Pipeline((Every(), Truncate(), Normalize(unit)), hidden_size)
    return pipelines


def _reduction(
    user: PoolerConfig, files: SentenceTransformersFiles | None, default_pooling: str
) -> tuple[Reduce, bool]:
    """The reduction, and whether sentence-transformers' files describe the pooling."""
    described = files is not None and files.pooling is not None
    include_prompt = files.include_prompt if files is not None else True
    if user.seq_pooling_type is not None:
        return Reduce(tuple(user.seq_pooling_type.split("+")), include_prompt), described
    if files is not None and files.pooling is not None:
        return Reduce(files.pooling, include_prompt), True
    return Reduce((default_pooling,)), False


def _width(width: int, heads: tuple[Step, ...]) -> int:
    """The width after the heads, each checked against what comes in."""
    for head in heads:
        if isinstance(head, Dense):
            if head.weight.shape[1] != width:
                raise CheckpointError(
                    f"A Dense module takes {head.weight.shape[1]} features, but {width} come in from the step before."
                )
            width = head.weight.shape[0]
        elif isinstance(head, Norm) and head.weight.shape[0] != width:
            raise CheckpointError(f"A LayerNorm takes {head.weight.shape[0]} features, but {width} come in.")
        assert isinstance(head, Dense | Norm | Unit)
    return width
