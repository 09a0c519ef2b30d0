"""Rules by which a late-interaction model reads queries and documents: markers, lengths, expansion, skipped tokens.

Source: Khattab and Zaharia 2020, ColBERT (arXiv 2004.12832), and its successors' files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextRules:
    """How queries, or documents, are read.

    marker: a token inserted after the first one; "" for none.
    length: longer texts are cut to so many tokens, the marker and special ones included; None: the model's limit.
    skipped: tokens that are read but get no vector (punctuation). only: ids of the tokens that get one; () for all.
    """

    marker: str = ""
    length: int | None = None
    skipped: tuple[str, ...] = ()
    only: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Expansion:
    """Query expansion: queries are filled up with mask tokens, which get vectors too.

    length: tokens to fill up to. attended: whether other tokens attend to them; they attend to the text in any case.
    tokens: names of the mask token; the first that the tokenizer has is taken.
    """

    length: int
    attended: bool
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LateInteraction:
    """Query and document rules of a model. mean: a score is the mean over query vectors instead of their sum."""

    query: TextRules
    document: TextRules
    expansion: Expansion | None = None
    mean: bool = False


@dataclass(frozen=True, slots=True)
class ListwiseTokens:
    """Tokens whose vectors a listwise reranker compares: one stands behind each document, one behind the query."""

    document_token: str
    query_token: str
