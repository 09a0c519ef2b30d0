"""Rerankers that are language models: which checkpoints are some, what their score is read from, and their prompts.

A score is read from the logits of a few tokens ("yes" and "no") behind the prompt, so its weight is rows of the
vocabulary matrix. Sources: the model cards named in `inputs/templates`, sentence-transformers' LogitScore, vLLM's
`classifier_from_token`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import DEFAULT, Folder, JsonObject, chat_templates, special_tokens
from poolhouse.inputs.listwise import ListwiseTokens
from poolhouse.inputs.templates.score import ScoreTemplate, score_template
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.files.gguf import GgufFolder
from poolhouse.models.files.model_card import ModelCard, read_card, repository
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.models.heads.heads import Head, LoadedHead, vocabulary_matrix
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
    """What is special about scoring with a checkpoint; for most, nothing is.

    template: what makes one prompt of a query and a document, where the tokenizer does not join them.
    listwise, listwise_ids: of a model that scores all documents of a query in one prompt, and its tokens' ids.
    max_tokens: a limit that the checkpoint's own files set for pairs.
    """

    tokens: TokenScore | None = None
    template: ScoreTemplate | None = None
    listwise: ListwiseTokens | None = None
    listwise_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def dtype(self, name: str, device: torch.device) -> str:
        """The type to run in where the user says "auto": bfloat16 on CUDA, for float16 overflows in such models."""
        language_model = self.tokens is not None or self.listwise is not None
        return "bfloat16" if name == "auto" and language_model and device.type == "cuda" else name


@dataclass(frozen=True, slots=True)
class PublishedReranker:
    """A published series of rerankers. names: parts of its names. tokens: as in TokenScore, by their texts."""

    title: str
    model_type: str
    names: tuple[str, ...]
    tokens: tuple[str, ...]
    template: str
    scale: float = 1.0


# The first of a model type is assumed where a card says "text-ranking" and no name fits.
PUBLISHED = (
    PublishedReranker("Qwen3-Reranker", "qwen3", ("qwen3-reranker",), ("no", "yes"), "qwen3_reranker"),
    PublishedReranker("zerank", "qwen3", ("zerank",), ("Yes",), "zerank", scale=0.2),
    PublishedReranker("mxbai-rerank-v2", "qwen2", ("mxbai-rerank",), ("0", "1"), "mxbai_rerank_v2"),
    PublishedReranker("bge-reranker-v2-gemma", "gemma", ("bge-reranker-v2-gemma",), ("Yes",), "bge_reranker_v2_gemma"),
)
_EMBEDDERS = ("feature-extraction", "sentence-similarity")


def read_reranker(
    folder: Folder, weights: Folder, config: Config, files: SentenceTransformersFiles, name: str
) -> Reranker:
    """What is special about scoring with the model in `folder`.

    weights: the folder of config.json and the tokenizer. config: with the user's changes. name: as the user calls the
    model.

    Raises:
        ConfigError: overrides that do not fit together. CheckpointError: tokens or files that are missing.
    """
    names = names_of(folder.path, name, config)
    if config.get("classifier_from_token") is not None or config.get("is_original_qwen3_reranker"):
        return _overridden(weights, config, _published(config, read_card(folder.path), names, sure=True)[0])
    if files.logit_score is not None:
        true, false = files.logit_score
        tokens = TokenScore((true,)) if false is None else TokenScore((false, true), difference=True)
        return replace(_stored(files, config), tokens=tokens)
    if architecture(config) == "JinaForRanking":
        listwise = ListwiseTokens("<|embed_token|>", "<|rerank_token|>")
        ids = token_ids(weights, (listwise.document_token, listwise.query_token))
        return Reranker(listwise=listwise, listwise_ids=ids)
    if isinstance(weights, GgufFolder) and architecture(config) == "Qwen3ForSequenceClassification":
        return _by_template("qwen3_reranker", "by the labels yes and no of the GGUF file")
    if architecture(config) == "LlamaBidirectionalForSequenceClassification":
        return _by_template("nemotron_rerank", "by its architecture")
    if files.described and files.pooling is None:
        return _stored(files, config)
    if config.get("use_sep_token") is False:
        return Reranker(template=score_template("concatenation"))
    if not files.described and architecture(config).endswith("ForCausalLM"):
        published, why = _published(config, read_card(folder.path), names, sure=False)
        if published is not None:
            ids = token_ids(weights, published.tokens)
            note = f"Taken for {published.title} {why}; convert='embed' makes an embedder of it."
            tokens = TokenScore(ids, len(ids) == 2, published.scale)
            return _by_template(published.template, "as its card tells", tokens, (note,))
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
    combine = torch.tensor([[-1.0, 1.0]]) if score.difference else torch.eye(len(rows))
    combine = combine * score.scale
    softcap = config.get("final_logit_softcapping")
    if softcap:
        steps: tuple[Step, ...] = (Dense(rows, None, _softcap(float(softcap))), Dense(combine))
    elif score.difference:
        steps = (Dense((rows[1:] - rows[:1]) * score.scale),)
    else:
        steps = (Dense(rows * score.scale),)
    used = frozenset() if name == table else frozenset({name})
    return LoadedHead(Head((), pooling="LAST", fixed=True), steps, len(combine), used)


def listwise_pipelines(reranker: Reranker, tensors: Mapping[str, Tensor]) -> dict[Task, Pipeline]:
    """`token_embed` of a listwise reranker: vectors of the passages, in order, and of the query behind them.

    They go through jina-reranker-v3's two matrices, with a ReLU between.

    Raises:
        CheckpointError: one is missing.
    """
    for name in ("projector.0.weight", "projector.2.weight"):
        if name not in tensors:
            raise CheckpointError(f"The checkpoint lacks {name}, which JinaForRanking needs; it is never made up.")
    first, second = (tensors[f"projector.{index}.weight"].float() for index in (0, 2))
    projector = (Dense(first, None, Activation("relu", torch.relu)), Dense(second))
    steps = (AtTokens(reranker.listwise_ids), Every(), *projector, Truncate(), Normalize(False))
    return {"token_embed": Pipeline(steps, second.shape[0])}


def _overridden(weights: Folder, config: Config, published: PublishedReranker | None) -> Reranker:
    """The user's own tokens, as vLLM takes them from hf_overrides."""
    original = bool(config.get("is_original_qwen3_reranker"))
    texts = config.get("classifier_from_token") or (["no", "yes"] if original else None)
    method = config.get("method") or ("from_2_way_softmax" if original else None)
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"classifier_from_token must be a list of tokens, got {texts!r}.")
    if method not in ("from_2_way_softmax", "no_post_processing"):
        raise ConfigError(
            f"classifier_from_token needs method 'from_2_way_softmax' or 'no_post_processing', got {method!r}."
        )
    difference = method == "from_2_way_softmax"
    if difference and len(texts) != 2:
        raise ConfigError(
            f"from_2_way_softmax takes two tokens, the one for no and the one for yes, got {list(texts)}."
        )
    template, why = "concatenation", "for want of a better one"
    if published is not None:
        template, why = published.template, "by the checkpoint's name"
    if original:
        template, why = "qwen3_reranker", why if published is not None else "by is_original_qwen3_reranker"
    return _by_template(template, why, TokenScore(token_ids(weights, tuple(texts)), difference))


def _by_template(name: str, why: str, tokens: TokenScore | None = None, notes: tuple[str, ...] = ()) -> Reranker:
    """A reranker with a built-in template. notes: those that come before the note about it."""
    note = f"Pairs go through the template {name!r} {why}; chat_template sets another."
    return Reranker(tokens, score_template(name), notes=(*notes, note))


def _stored(files: SentenceTransformersFiles, config: Config) -> Reranker:
    """A cross-encoder of sentence-transformers, with the template that it stores, if any."""
    template = stored_template(files.transformer_folder, config)
    return Reranker(
        template=template,
        max_tokens=stored_max_tokens(files.transformer_folder),
        notes=() if template is None else ("Pairs go through the chat template stored with the checkpoint.",),
    )


def _published(
    config: Config, card: ModelCard, names: tuple[str, ...], sure: bool
) -> tuple[PublishedReranker | None, str]:
    """The published series that a checkpoint is of, and why.

    sure: that it is a reranker is known already, so names alone decide which.
    """
    series = [one for one in PUBLISHED if one.model_type == config.get("model_type")]
    tagged = next((tag for tag in (card.pipeline_tag, *card.tags) if tag in ("text-ranking", "reranker")), None)
    if not sure and (card.pipeline_tag in _EMBEDDERS or (tagged is None and set(card.tags) & set(_EMBEDDERS))):
        return None, ""
    for label, candidates in (("base model", card.base_models), ("name", names)):
        for one in series:
            named = next((name for name in candidates for part in one.names if part in name.lower()), None)
            if named is not None:
                also = f", and its card's tag {tagged!r}" if tagged else ""
                return one, f"by its {label} {named!r}{also}"
    if sure or tagged is None or not series:
        return None, ""
    return series[0], f"because its card is tagged {tagged!r} and its model type is {series[0].model_type}"


def names_of(folder: Path, name: str, config: Config) -> tuple[str, ...]:
    """What a checkpoint is called: by the user, on disk, in its config."""
    return (name.rstrip("/").rsplit("/", 1)[-1], repository(folder), str(config.get("_name_or_path") or ""))


def _softcap(limit: float) -> Activation:
    return Activation(f"softcap {limit:g}", lambda logits: torch.tanh(logits / limit) * limit)


# Of sentence-transformers' chat template options, those that are not for the template.
_NOT_VARIABLES = ("chat_template", "restore_suffix", "padding", "truncation", "max_length", "return_tensors")
# Those with which the prompt would be another.
_NOT_HONOURED = ("tools", "documents", "tokenize", "continue_final_message", "tokenizer_kwargs")
# Signs in a template that contents are lists of parts; sentence-transformers looks for the same.
_PARTS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
_FLAT_TYPES = ("apertus", "deepseek_v3", "gpt_oss", "seed_oss")


def stored_template(folder: Folder, config: Config) -> ScoreTemplate | None:
    """How sentence-transformers joins pairs for the model in `folder`, where it does so by a chat template.

    Source: its Transformer module. The template is rendered and tokenised as transformers does, without the tokenizer's
    special tokens.
    """
    settings = _settings(folder)
    modalities: JsonObject | None = settings.get("modality_config")
    options = _options(folder, settings)
    text = _template(folder, options.get("chat_template"))
    if text is None and modalities is not None and "message" in modalities:
        raise CheckpointError(f"{folder} is to render pairs by a chat template, but stores none.")
    if text is None or (modalities is not None and "message" not in modalities):
        return None
    message = {} if modalities is None else modalities["message"]
    form = message.get("format", "auto")
    if form == "auto":
        flat = config.get("model_type") in _FLAT_TYPES or not any(sign in text for sign in _PARTS)
        form = "flat" if flat else "structured"
    return ScoreTemplate(
        name="stored with the checkpoint",
        text=text,
        variables={
            **special_tokens(folder),
            **{name: value for name, value in options.items() if name not in _NOT_VARIABLES},
        },
        special_tokens=False,
        structured=form == "structured",
        instruction_as_system=True,
        keep_last_newline=False,
    )


def stored_max_tokens(folder: Folder) -> int | None:
    """The longest prompt by sentence-transformers' processing options."""
    processing = _settings(folder).get("processing_kwargs") or {}
    lengths = [(processing.get(kind) or {}).get("max_length") for kind in ("chat_template", "text", "common")]
    return next((length for length in lengths if isinstance(length, int)), None)


def _options(folder: Folder, settings: JsonObject) -> JsonObject:
    """The options of the chat template.

    Raises:
        CheckpointError: no object, or an option that cannot be honoured.
    """
    options = (settings.get("processing_kwargs") or {}).get("chat_template") or {}
    if not isinstance(options, dict):
        raise CheckpointError(f"{folder}: processing_kwargs.chat_template must be an object, got {options!r}.")
    for name in _NOT_HONOURED:
        if options.get(name) or (name == "tokenize" and name in options):
            raise CheckpointError(f"{folder}: processing_kwargs.chat_template sets {name}, which is not honoured here.")
    return options


def _template(folder: Folder, name: object) -> str | None:
    """The chat template of that name, or that text, as transformers takes it; without a name the default one.

    Raises:
        CheckpointError: a name that no template has.
    """
    stored = chat_templates(folder)
    if name is None:
        return stored.get(DEFAULT)
    if isinstance(name, str) and name in stored:
        return stored[name]
    if not isinstance(name, str) or "{" not in name:
        raise CheckpointError(
            f"{folder}: processing_kwargs.chat_template names the template {name!r}; there are {sorted(stored)}."
        )
    return name


def _settings(folder: Folder) -> JsonObject:
    return folder.json("sentence_bert_config.json", needed=False)


def token_ids(folder: Folder, texts: tuple[str, ...]) -> tuple[int, ...]:
    """The id of each text in the tokenizer of `folder`.

    Raises:
        CheckpointError: no tokenizer.json, or a text that is not one token.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_str(folder.text("tokenizer.json"))
    except Exception as error:  # the library raises whatever it likes
        raise CheckpointError(
            f"{path} is needed to find the tokens {list(texts)}, and cannot be read: {error}"
        ) from error
    return tuple(_token_id(tokenizer, text) for text in texts)


def _token_id(tokenizer: tokenizers.Tokenizer, text: str) -> int:
    known = tokenizer.token_to_id(text)
    if known is not None:
        return int(known)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    unknown = {tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")} - {None}
    if len(ids) == 1 and not unknown & set(ids):
        return int(ids[0])
    near = sorted(token for token in tokenizer.get_vocab() if text.lower() == token.lstrip("Ġ▁").lower())
    also = f" It has {near}." if near else ""
    raise CheckpointError(f"{text!r} is not one token of this tokenizer: it makes {len(ids)}, or an unknown one.{also}")
