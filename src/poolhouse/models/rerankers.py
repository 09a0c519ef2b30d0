"""Rerankers that are language models: which checkpoints they are, what their score is made of, and their prompts.

A score is read from the logits of a few tokens ("yes" and "no") behind the prompt, so its weight is rows of the
vocabulary matrix. Sources: the model cards named in `inputs/templates`, sentence-transformers' LogitScore, vLLM's
`classifier_from_token`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.checkpoint import Checkpoint, Config
from poolhouse.models.heads import Head, LoadedHead, vocabulary_matrix
from poolhouse.models.model import Listwise, ScoreRecipe
from poolhouse.models.model_card import ModelCard, read_card
from poolhouse.models.published import repository
from poolhouse.models.score_recipes import BUILT_IN, stored_max_tokens, stored_recipe
from poolhouse.models.vocabulary import token_ids
from poolhouse.pooling.pipelines import Pipeline, listwise_pipelines
from poolhouse.pooling.sentence_transformers import SentenceTransformersFiles
from poolhouse.pooling.steps import Activation, Dense, Step
from poolhouse.tasks import Task


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Logits that make a score.

    tokens: ids of the rows. difference: the second less the first, which is the log-odds of the two.
    scale: factor on the result.
    """

    tokens: tuple[int, ...]
    difference: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Reranker:
    """What is special about scoring with a checkpoint; nothing of it, for most.

    listwise, listwise_ids: of a model that scores all documents of a query in one prompt, and its tokens' ids.
    max_tokens: a limit that the checkpoint's own recipe sets.
    """

    tokens: TokenScore | None = None
    recipe: ScoreRecipe | None = None
    listwise: Listwise | None = None
    listwise_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def dtype(self, word: str, device: torch.device) -> str:
        """The type to run in where the user says "auto": bfloat16 on CUDA, for float16 overflows in such models."""
        made_for_it = self.tokens is not None or self.listwise is not None
        return "bfloat16" if word == "auto" and made_for_it and device.type == "cuda" else word


@dataclass(frozen=True, slots=True)
class Kind:
    """A published family of rerankers. words: what its names hold. tokens: as in TokenScore, by their words."""

    title: str
    model_type: str
    words: tuple[str, ...]
    tokens: tuple[str, ...]
    template: str
    scale: float = 1.0


# The first of a model type is assumed where a card says "text-ranking" and no name fits.
KINDS = (
    Kind("Qwen3-Reranker", "qwen3", ("qwen3-reranker",), ("no", "yes"), "qwen3_reranker"),
    Kind("zerank", "qwen3", ("zerank",), ("Yes",), "zerank", scale=0.2),
    Kind("mxbai-rerank-v2", "qwen2", ("mxbai-rerank",), ("0", "1"), "mxbai_rerank_v2"),
    Kind("bge-reranker-v2-gemma", "gemma", ("bge-reranker-v2-gemma",), ("Yes",), "bge_reranker_v2_gemma"),
)
_EMBEDDERS = ("feature-extraction", "sentence-similarity")


def read_reranker(
    checkpoint: Checkpoint, folder: Path, config: Config, files: SentenceTransformersFiles | None, name: str
) -> Reranker:
    """What is special about scoring with the checkpoint in `folder`.

    config: config.json with the user's changes. name: as the user calls the model.

    Raises:
        ConfigError: overrides that do not fit together. CheckpointError: tokens or files that are missing.
    """
    names = _names(folder, name, config)
    if config.get("classifier_from_token") is not None or config.get("is_original_qwen3_reranker"):
        return _overridden(checkpoint, config, _kind(config, read_card(folder), names, sure=True)[0])
    if files is not None and files.logit_score is not None:
        true, false = files.logit_score
        tokens = TokenScore((true,)) if false is None else TokenScore((false, true), difference=True)
        return replace(_stored(files, config), tokens=tokens)
    architecture = next(iter(config.get("architectures") or ()), "")
    if architecture == "JinaForRanking":
        listwise = Listwise("<|embed_token|>", "<|rerank_token|>")
        ids = token_ids(checkpoint.folder, (listwise.document_token, listwise.query_token))
        return Reranker(listwise=listwise, listwise_ids=ids)
    if architecture == "LlamaBidirectionalForSequenceClassification":
        return Reranker(recipe=BUILT_IN["nemotron_rerank"], notes=(_told("nemotron_rerank", "by its architecture"),))
    if files is not None and files.pooling is None:
        return _stored(files, config)
    if config.get("use_sep_token") is False:
        return Reranker(recipe=BUILT_IN["concatenation"])
    if files is None and architecture.endswith("ForCausalLM"):
        kind, why = _kind(config, read_card(folder), names, sure=False)
        if kind is not None:
            ids = token_ids(checkpoint.folder, kind.tokens)
            note = f"Taken for {kind.title} {why}; convert='embed' makes an embedder of it."
            tokens = TokenScore(ids, len(ids) == 2, kind.scale)
            return Reranker(tokens, BUILT_IN[kind.template], notes=(note, _told(kind.template, "as its card tells")))
    return Reranker()


def token_head(score: TokenScore, tensors: Mapping[str, Tensor], config: Config) -> LoadedHead:
    """The head of a score: rows of the vocabulary matrix, in float32.

    Raises:
        CheckpointError: no vocabulary matrix, a token outside it, or logits that are scaled in a way unknown here.
    """
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if config.get(key) not in (None, 1, 1.0):
            raise CheckpointError(f"config.json: {key} is {config[key]}; logits so scaled cannot be scored with.")
    table = next((name for name in tensors if name.split(".")[-2:] == ["embed_tokens", "weight"]), "")
    name = vocabulary_matrix(tensors, config, table)
    matrix = tensors[name]
    if max(score.tokens) >= len(matrix):
        raise CheckpointError(f"Token {max(score.tokens)} is outside the vocabulary of {len(matrix)} that {name} has.")
    rows = matrix[list(score.tokens)].float()
    turn = torch.tensor([[-1.0, 1.0]]) if score.difference else torch.eye(len(rows))
    turn = turn * score.scale
    softcap = config.get("final_logit_softcapping")
    if softcap:
        steps: tuple[Step, ...] = (Dense(rows, None, _softcap(float(softcap))), Dense(turn))
    elif score.difference:
        steps = (Dense((rows[1:] - rows[:1]) * score.scale),)
    else:
        steps = (Dense(rows * score.scale),)
    used = frozenset() if name == table else frozenset({name})
    return LoadedHead(Head((), pooling="LAST", fixed=True), steps, len(turn), used)


def listwise_vectors(reranker: Reranker, tensors: Mapping[str, Tensor]) -> dict[Task, Pipeline]:
    """What a listwise reranker answers: vectors through jina-reranker-v3's two matrices, with a ReLU between.

    Raises:
        CheckpointError: one is missing.
    """
    for name in ("projector.0.weight", "projector.2.weight"):
        if name not in tensors:
            raise CheckpointError(f"The checkpoint lacks {name}, which JinaForRanking needs; it is never made up.")
    first, second = (tensors[f"projector.{place}.weight"].float() for place in (0, 2))
    steps = (Dense(first, None, Activation("relu", torch.relu)), Dense(second))
    return listwise_pipelines(steps, second.shape[0], reranker.listwise_ids)


def _overridden(checkpoint: Checkpoint, config: Config, kind: Kind | None) -> Reranker:
    """The user's own words, as vLLM takes them."""
    original = bool(config.get("is_original_qwen3_reranker"))
    words = config.get("classifier_from_token") or (["no", "yes"] if original else None)
    method = config.get("method") or ("from_2_way_softmax" if original else None)
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"classifier_from_token must be a list of tokens, got {words!r}.")
    if method not in ("from_2_way_softmax", "no_post_processing"):
        raise ConfigError(
            f"classifier_from_token needs method 'from_2_way_softmax' or 'no_post_processing', got {method!r}."
        )
    difference = method == "from_2_way_softmax"
    if difference and len(words) != 2:
        raise ConfigError(
            f"from_2_way_softmax takes two tokens, the one for no and the one for yes, got {list(words)}."
        )
    template = "qwen3_reranker" if original else "concatenation" if kind is None else kind.template
    why = (
        "by the checkpoint's name"
        if kind
        else "by is_original_qwen3_reranker"
        if original
        else "for want of a better one"
    )
    tokens = TokenScore(token_ids(checkpoint.folder, tuple(words)), difference)
    return Reranker(tokens, BUILT_IN[template], notes=(_told(template, why),))


def _stored(files: SentenceTransformersFiles, config: Config) -> Reranker:
    """A cross-encoder of sentence-transformers, with the template that it stores, if any."""
    recipe = stored_recipe(files.transformer_folder, config)
    return Reranker(
        recipe=recipe,
        max_tokens=stored_max_tokens(files.transformer_folder),
        notes=() if recipe is None else ("Pairs go through the chat template stored with the checkpoint.",),
    )


def _kind(config: Config, card: ModelCard, names: tuple[str, ...], sure: bool) -> tuple[Kind | None, str]:
    """The published kind that a checkpoint is of, and why.

    sure: that it is a reranker is known already, so names alone decide which.
    """
    kinds = [kind for kind in KINDS if kind.model_type == config.get("model_type")]
    tagged = next((tag for tag in (card.pipeline_tag, *card.tags) if tag in ("text-ranking", "reranker")), None)
    if not sure and (card.pipeline_tag in _EMBEDDERS or (tagged is None and set(card.tags) & set(_EMBEDDERS))):
        return None, ""
    for label, candidates in (("base model", card.base_models), ("name", names)):
        for kind in kinds:
            named = next((name for name in candidates for word in kind.words if word in name.lower()), None)
            if named is not None:
                also = f", and its card's tag {tagged!r}" if tagged else ""
                return kind, f"by its {label} {named!r}{also}"
    if sure or tagged is None or not kinds:
        return None, ""
    return kinds[0], f"because its card is tagged {tagged!r} and its model type is {kinds[0].model_type}"


def _names(folder: Path, name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the checkpoint is called: by the user, on disk, in its config."""
    return (name.rstrip("/").rsplit("/", 1)[-1], repository(folder), str(config.get("_name_or_path") or ""))


def _told(template: str, why: str) -> str:
    return f"Pairs go through the template {template!r} {why}; chat_template sets another."


def _softcap(most: float) -> Activation:
    return Activation(f"softcap {most:g}", lambda logits: torch.tanh(logits / most) * most)
