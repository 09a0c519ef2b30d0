"""Recipes of prompts: the built-in ones, and what sentence-transformers stores with a cross-encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poolhouse.chat_files import DEFAULT, chat_templates, special_tokens
from poolhouse.errors import CheckpointError
from poolhouse.json_files import read_json
from poolhouse.models.checkpoint import Config
from poolhouse.models.model import ScoreRecipe

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
