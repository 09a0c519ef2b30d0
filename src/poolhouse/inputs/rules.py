"""Sides: what a late-interaction model makes of queries and of documents.

Source: Khattab and Zaharia 2020, ColBERT (arXiv 2004.12832), and its successors' files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the texts of one side are read.

    marker: a token put behind the first one; "" for none.
    length: most tokens, the marker and special ones included, longer texts being cut; None: the model's limit.
    skipped: words whose tokens are read but get no vector (punctuation). only: ids of the tokens that get one, or all.
    """

    marker: str = ""
    length: int | None = None
    skipped: tuple[str, ...] = ()
    only: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Expansion:
    """Queries are filled up with mask tokens, which get vectors of their own.

    length: tokens to fill up to. attended: whether tokens attend to them; they attend to the text in any case.
    tokens: words of the mask token, the first that the tokenizer knows is taken.
    """

    length: int
    attended: bool
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LateInteraction:
    """Both sides of a model, what queries are filled up with, and whether a score is a mean over query vectors."""

    query: TextRules
    document: TextRules
    expansion: Expansion | None = None
    mean: bool = False
