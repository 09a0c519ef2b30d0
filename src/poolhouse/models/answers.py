"""What a loaded model answers: a pipeline per task, and the names of its labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.adapters import Adapters
from poolhouse.models.backbone import Backbone
from poolhouse.models.heads import LoadedHead
from poolhouse.models.roles import Role, architecture
from poolhouse.params import PoolerConfig
from poolhouse.pooling.activations import classifier_activation, stated_activation
from poolhouse.pooling.bge_m3 import bge_m3_pipelines
from poolhouse.pooling.pipelines import Pipeline, classify_pipelines, embed_pipelines, splade_pipelines
from poolhouse.pooling.sentence_transformers import SentenceTransformersFiles
from poolhouse.pooling.splade import SpladePooling
from poolhouse.tasks import Task


@dataclass(frozen=True, slots=True)
class Served:
    """A backbone, what the loader must know of it, and the head of a classifier or masked language model.

    role: what it is run as. words: who runs it. pooling: the default where no file says.
    pools_itself: whether the rows of a text are all the same, its vector.
    stated_pooling: what config.json demands, whatever the files say. endless: whether no table of positions ends at
    max_tokens, so that the user may ask for more. token_types: rows of its table of them, or 0.
    """

    role: Role
    backbone: Backbone
    words: str
    hidden_size: int
    vocabulary_size: int
    parameters: int
    max_tokens: int | None
    dtype: torch.dtype
    pooling: str
    head: LoadedHead | None = None
    notes: tuple[str, ...] = ()
    stated_pooling: str | None = None
    adapters: Adapters | None = None
    endless: bool = False
    pools_itself: bool = False
    token_types: int = 0


def pipelines_of(
    served: Served,
    config: Mapping[str, Any],
    files: SentenceTransformersFiles | None,
    default_pooling: str,
    user: PoolerConfig,
    folder: Path,
    literal: bool = False,
) -> dict[Task, Pipeline]:
    """Vectors, labels, or both, as the model's head and files have it.

    folder: where config.json lies, and heads beside it. literal: take the activation that the files state.
    """
    head = served.head
    if served.role in ("classify", "token_classify") and head is not None:
        return _classifier(head, config, None if files is None else files.activation, user, literal)
    if served.role == "splade" and head is not None:
        if files is None or files.splade is None:
            return splade_pipelines(head.steps, head.labels, SpladePooling(), user)
        if files.heads:
            behind = ", ".join(step.words for step in files.heads)
            raise CheckpointError(f"{folder}: modules behind SpladePooling are not served ({behind}).")
        return splade_pipelines(head.steps, head.labels, files.splade, user, files.max_active_dims, files.normalize)
    pipelines = embed_pipelines(served.hidden_size, user, files, default_pooling)
    if served.pools_itself:
        _check_no_pooling(files, user, folder)
        del pipelines["token_embed"]
    if head is not None:
        pipelines |= _classifier(head, {}, None, user)
    needed = architecture(config) == "BgeM3EmbeddingModel"
    return pipelines | bge_m3_pipelines(folder, served.hidden_size, served.vocabulary_size, config, user, needed)


def _check_no_pooling(files: SentenceTransformersFiles | None, user: PoolerConfig, folder: Path) -> None:
    """Refuse a pooling of what has been pooled.

    Raises:
        ConfigError: the user's. CheckpointError: that of sentence-transformers' files.
    """
    if user.seq_pooling_type is not None:
        raise ConfigError("pooler_config: this model makes one vector of each text itself; leave the pooling out.")
    if files is not None and files.pooling is not None:
        raise CheckpointError(
            f"{folder}: a Pooling of token vectors behind a model that makes one vector of each text."
        )


def labels_of(config: Mapping[str, Any], served: Served) -> tuple[dict[int, str], tuple[str, ...]]:
    """The names of a classifier's labels, and a note where the config names another number of them."""
    head = served.head
    if head is None or served.role not in ("classify", "token_classify"):
        return {}, ()
    names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    if names and len(names) != head.labels:
        return {}, (f"The config names {len(names)} labels, but the head has {head.labels}: they are left unnamed.",)
    return names, ()


def about_activation(
    served: Served, config: Mapping[str, Any], files: SentenceTransformersFiles | None, literal: bool
) -> tuple[str, ...]:
    """A note where a classifier's files state another activation than vLLM's order of precedence gives."""
    if literal or served.head is None or served.role not in ("classify", "token_classify"):
        return ()
    from_files, labels = None if files is None else files.activation, served.head.labels
    used = classifier_activation(config, labels, from_files)
    try:
        stated = stated_activation(config, from_files)
    except CheckpointError as error:
        # problem_type decides, and nobody runs it.
        return (f"Not used: {error}",)
    if stated is None or stated.name == used.name:
        return ()
    note = (
        f"The files state {stated.name} as the activation over the logits; {used.name} is used, by vLLM's order of "
        "precedence (problem_type first, then sigmoid of one label and softmax of several). score_compat='files' takes "
        "the files' word."
    )
    return (note,)


def _classifier(
    loaded: LoadedHead, config: Mapping[str, Any], activation: str | None, user: PoolerConfig, literal: bool = False
) -> dict[Task, Pipeline]:
    head = loaded.head
    return classify_pipelines(
        loaded.steps,
        loaded.labels,
        user,
        (stated_activation(config, activation) if literal else None)
        or classifier_activation(config, loaded.labels, activation),
        pooling=head.pooling,
        fixed=head.fixed,
        late=head.late,
        use_activation=head.use_activation,
        step_tag_id=head.step_tag_id,
        tokens=head.tokens,
        columns=loaded.columns,
    )
