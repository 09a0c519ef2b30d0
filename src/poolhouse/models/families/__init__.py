"""The native families: one file each, listed here."""

from __future__ import annotations

from poolhouse.models.families.bert import BERT, ROBERTA
from poolhouse.models.families.family import Family

FAMILIES: tuple[Family, ...] = (BERT, ROBERTA)


def family_of(model_type: str) -> Family | None:
    """The family that serves this `model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


__all__ = ["FAMILIES", "Family", "family_of"]
