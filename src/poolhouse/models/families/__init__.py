"""The native families: one file each, listed here."""

from __future__ import annotations

from poolhouse.models.checkpoint import Config
from poolhouse.models.families.albert import ALBERT
from poolhouse.models.families.bert import BERT, ROBERTA
from poolhouse.models.families.distilbert import DISTILBERT
from poolhouse.models.families.electra import ELECTRA
from poolhouse.models.families.eurobert import EUROBERT
from poolhouse.models.families.family import Family
from poolhouse.models.families.gemma import GEMMA, GEMMA2
from poolhouse.models.families.gemma3 import GEMMA3
from poolhouse.models.families.gte import GTE
from poolhouse.models.families.jina import JINA
from poolhouse.models.families.jina_v5 import JINA_V5
from poolhouse.models.families.llama import LLAMA, LLAMA_BIDIRECTIONAL
from poolhouse.models.families.mistral import MISTRAL
from poolhouse.models.families.modernbert import MODERNBERT
from poolhouse.models.families.mpnet import MPNET
from poolhouse.models.families.nomic import NOMIC
from poolhouse.models.families.qwen import QWEN2, QWEN3

FAMILIES: tuple[Family, ...] = (
    *(BERT, ROBERTA, DISTILBERT, MPNET, ALBERT, ELECTRA),
    *(MODERNBERT, NOMIC, GTE, JINA, JINA_V5, EUROBERT),
    *(LLAMA, LLAMA_BIDIRECTIONAL, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3),
)


def family_of(config: Config) -> Family | None:
    """The family that serves a config.json, or None."""
    model_type = config.get("model_type")
    if model_type == "xlm-roberta" and config.get("position_embedding_type") == "rotary":
        model_type = "xlm-roberta-rotary"
    return next((family for family in FAMILIES if model_type in family.model_types), None)


__all__ = ["FAMILIES", "Family", "family_of"]
