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

import tokenizers
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import DEFAULT, chat_templates, read_json, special_tokens
from poolhouse.models.files.checkpoint import Checkpoint, Config
from poolhouse.models.files.model_card import ModelCard, read_card, repository
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.models.heads.heads import Head, LoadedHead, vocabulary_matrix
from poolhouse.models.model import Listwise, ScoreRecipe
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.steps import Activation, AtTokens, Dense, Every, Normalize, Step, Truncate
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


BUILT_IN = {
    name: ScoreRecipe(name, name)
    for name in (
        *("qwen3_reranker", "zerank", "mxbai_rerank_v2", "bge_reranker_v2_gemma", "nemotron_rerank"),
        "concatenation",
    )
}
# Of sentence-transformers' chat template options, those that are not for the template.
_NOT_VARIABLES = ("chat_template", "restore_suffix", "padding", "truncation", "max_length", "return_tensors")
# Those that would make another prompt of it than is made here.
_NOT_HONOURED = ("tools", "documents", "tokenize", "continue_final_message", "tokenizer_kwargs")
# Signs in a template that contents are lists of parts; sentence-transformers looks for the same.
_PARTS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
_FLAT_TYPES = ("apertus", "deepseek_v3", "gpt_oss", "seed_oss")


def stored_recipe(folder: Path, config: Config) -> ScoreRecipe | None:
    """How sentence-transformers joins pairs for the model in `folder`, where it does so by a chat template.

    Source: its Transformer module. The template is rendered and tokenised as transformers does, without the tokenizer's
    special tokens.
    """
    settings = _settings(folder)
    modalities: Mapping[str, Any] | None = settings.get("modality_config")
    options = _options(folder, settings)
    template = _template(folder, options.get("chat_template"))
    if template is None and modalities is not None and "message" in modalities:
        raise CheckpointError(f"{folder} is to render pairs by a chat template, but stores none.")
    if template is None or (modalities is not None and "message" not in modalities):
        return None
    message = {} if modalities is None else modalities["message"]
    form = message.get("format", "auto")
    if form == "auto":
        flat = config.get("model_type") in _FLAT_TYPES or not any(sign in template for sign in _PARTS)
        form = "flat" if flat else "structured"
    return ScoreRecipe(
        name="stored with the checkpoint",
        template=template,
        variables={
            **special_tokens(folder),
            **{name: value for name, value in options.items() if name not in _NOT_VARIABLES},
        },
        special_tokens=False,
        structured=form == "structured",
        instruction_as_system=True,
        keep_last_newline=False,
    )


def stored_max_tokens(folder: Path) -> int | None:
    """The longest prompt by sentence-transformers' processing options."""
    processing = _settings(folder).get("processing_kwargs") or {}
    lengths = [(processing.get(place) or {}).get("max_length") for place in ("chat_template", "text", "common")]
    return next((length for length in lengths if isinstance(length, int)), None)


def _options(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said to the chat template.

    Raises:
        CheckpointError: no object, or an option that cannot be honoured.
    """
    options = (settings.get("processing_kwargs") or {}).get("chat_template") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"{folder}: processing_kwargs.chat_template must be an object, got {options!r}.")
    for name in _NOT_HONOURED:
        if options.get(name) or (name == "tokenize" and name in options):
            raise CheckpointError(f"{folder}: processing_kwargs.chat_template sets {name}, which is not honoured here.")
    return options


def _template(folder: Path, name: Any) -> str | None:
    """The chat template of that name, or that text, as transformers takes it; without a name the default one.

    Raises:
        CheckpointError: a name that no template has.
    """
    stored = chat_templates(folder)
    if name is None or name in stored:
        return stored.get(name or DEFAULT)
    if not isinstance(name, str) or "{" not in name:
        raise CheckpointError(
            f"{folder}: processing_kwargs.chat_template names the template {name!r}; there are {sorted(stored)}."
        )
    return name


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "sentence_bert_config.json", needed=False)


def token_ids(folder: Path, words: tuple[str, ...]) -> tuple[int, ...]:
    """The id of each word in the tokenizer of `folder`.

    Raises:
        CheckpointError: no tokenizer.json, or a word that is not one token.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises whatever it likes
        raise CheckpointError(
            f"{path} is needed to find the tokens {list(words)}, and cannot be read: {error}"
        ) from error
    return tuple(_token_id(tokenizer, word) for word in words)


def _token_id(tokenizer: tokenizers.Tokenizer, word: str) -> int:
    known = tokenizer.token_to_id(word)
    if known is not None:
        return int(known)
    ids = tokenizer.encode(word, add_special_tokens=False).ids
    unknown = {tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")} - {None}
    if len(ids) == 1 and not unknown & set(ids):
        return int(ids[0])
    near = sorted(token for token in tokenizer.get_vocab() if word.lower() == token.lstrip("Ġ▁").lower())
    also = f" It has {near}." if near else ""
    raise CheckpointError(f"{word!r} is not one token of this tokenizer: it makes {len(ids)}, or an unknown one.{also}")


def listwise_pipelines(projector: tuple[Step, ...], width: int, tokens: tuple[int, ...]) -> dict[Task, Pipeline]:
    """`token_embed` of a listwise reranker: projected vectors of the passages, in order, and of the query behind them.

    tokens: ids of the tokens that stand for passages and query.
    """
    return {"token_embed": Pipeline((AtTokens(tokens), Every(), *projector, Truncate(), Normalize(False)), width)}
