"""The native families: one file each, listed here."""

from __future__ import annotations

from poolhouse.models.families.bert import BERT, ROBERTA
from poolhouse.models.families.family import Family
from poolhouse.models.families.gemma import GEMMA, GEMMA2
from poolhouse.models.families.gemma3 import GEMMA3
from poolhouse.models.families.llama import LLAMA, LLAMA_BIDIRECTIONAL
from poolhouse.models.families.mistral import MISTRAL
from poolhouse.models.families.qwen import QWEN2, QWEN3

FAMILIES: tuple[Family, ...] = (
    *(BERT, ROBERTA),
    *(LLAMA, LLAMA_BIDIRECTIONAL, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3),
)


def family_of(model_type: str) -> Family | None:
    """The family that serves this `model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


__all__ = ["FAMILIES", "Family", "family_of"]
