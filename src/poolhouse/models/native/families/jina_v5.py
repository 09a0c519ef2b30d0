"""Jina embeddings v5: Qwen3, or EuroBERT where is_decoder is false, with a LoRA adapter per task beside the weights.

Source: the model code of jinaai/jina-embeddings-v5-text-nano and -small; both pool the last token.
"""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families.eurobert import EUROBERT
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.qwen import QWEN3
from poolhouse.models.native.spec import TransformerSpec


def _jina_v5(config: Config) -> TransformerSpec:
    return _kind(config).spec(config)


def _max_tokens(config: Config) -> int | None:
    return _kind(config).max_tokens(config)


def _kind(config: Config) -> Family:
    return EUROBERT if config.get("is_decoder") is False else QWEN3


JINA_V5 = Family(
    ("jina_embeddings_v5",),
    _jina_v5,
    (*EUROBERT.layouts, *QWEN3.layouts),
    pooling="LAST",
    aside=(*QWEN3.aside, *EUROBERT.aside),
    max_tokens=_max_tokens,
    default_adapter="retrieval",
)
