"""Family: how to read one kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from poolhouse.models.backbone import Backbone
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.native.weights import Layout, Weights


def _transformer(_: Config, spec: TransformerSpec, weights: Weights) -> Backbone:
    return Transformer(spec, weights)


def score_head(_: Config) -> Head:
    """A decoder's: the last token through one matrix."""
    return Head((HeadModule("score"),), pooling="LAST")


def token_score_head(_: Config) -> Head:
    """A decoder's, of every token."""
    return Head((HeadModule("score"),), pooling=None)


def token_classifier_head(_: Config) -> Head:
    """An encoder's, of every token."""
    return Head((HeadModule("classifier"),), pooling=None)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: what its config means and how its tensors are called.

    model_types: values of `model_type` in config.json that it serves.
    spec: behaviour from a config.json. Defaults are those of transformers' config class, for files that omit a key.
    layouts: how its checkpoints name tensors; the one whose token table is present wins.
    pooling: the default where neither the user nor sentence-transformers files say (CLS, MEAN or LAST).
    stated_pooling: the pooling that a config.json demands, whatever the files say; None where it does not.
    aside: regular expressions of tensors that belong to heads or are not used by the backbone.
    max_tokens: longest prompt by the config, or None where the config does not say.
    backbone: what runs it, where that is no Transformer.
    attends_to_part: whether its backbone honours `Segments.attended`.
    float16: whether its activations stay within float16's range.
    sequence_head, token_head: the heads of its classifiers of whole texts and of tokens; a decoder's by default.
    vocabulary_head: the head of its masked language models, None where it has none.
    default_adapter: the task adapter of its checkpoints for requests that name none.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Config], TransformerSpec]
    layouts: tuple[Layout, ...]
    pooling: Literal["CLS", "MEAN", "LAST"] = "CLS"
    stated_pooling: Callable[[Config], str | None] = lambda _: None
    aside: tuple[str, ...] = ()
    max_tokens: Callable[[Config], int | None] = lambda config: config.get("max_position_embeddings")
    backbone: Callable[[Config, TransformerSpec, Weights], Backbone] = _transformer
    attends_to_part: bool = True
    float16: bool = True
    sequence_head: Callable[[Config], Head] = score_head
    token_head: Callable[[Config], Head] = token_score_head
    vocabulary_head: Callable[[Config], Head] | None = None
    default_adapter: str | None = None
