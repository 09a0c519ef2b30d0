"""Late interaction: the rules by which a model reads queries and documents, and tokens by these rules.

Source: Khattab and Zaharia 2020, ColBERT (arXiv 2004.12832), and its successors' files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from poolhouse.errors import CheckpointError
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Flags, Ids, Offsets, Tokens


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


class LateInteractionTokens:
    """Applies the query and document rules of one model to tokens.

    max_tokens: the model's limit.

    Raises:
        CheckpointError: the tokenizer lacks a marker or the mask token.
    """

    def __init__(self, rules: LateInteraction, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._rules = {"query": _RuleIds(rules.query, tokenizer), "document": _RuleIds(rules.document, tokenizer)}
        self._fill = None if rules.expansion is None else _mask_token(rules.expansion, tokenizer)
        self._fill_to = 0 if rules.expansion is None else min(rules.expansion.length, max_tokens)
        self._attended = rules.expansion is not None and rules.expansion.attended

    def limit(self, limit: Limit, role: Role) -> Limit:
        """The limit of the text alone: a text over the length of its rules is cut, as in the reference, and reported."""
        rules = self._rules[role]
        marked = rules.marker is not None
        if rules.length is None and not marked:
            return limit
        max_tokens = limit.max_pass_tokens if rules.length is None else min(limit.max_pass_tokens, rules.length)
        if limit.keep is None or limit.keep == -1:
            # Rules without a length leave it to the limit what is done with longer texts.
            if rules.length is None and limit.cut is None:
                return replace(limit, max_tokens=limit.max_tokens - marked)
            return replace(limit, keep=max(max_tokens - marked, 0))
        if limit.keep > limit.max_pass_tokens:
            return limit
        return replace(limit, keep=max(min(limit.keep, max_tokens) - marked, 0))

    def finished(self, tokens: Tokens, role: Role, special: bool) -> Tokens:
        """The tokens of a text with the marker and the mask tokens that its rules add.

        special: whether the text has special tokens; the marker comes after the first.
        """
        rules = self._rules[role]
        ids, offsets, text = tokens.ids, tokens.offsets, len(tokens.ids)
        position = min(int(special), text)
        if rules.marker is not None:
            ids = np.insert(ids, position, rules.marker)
            offsets = None if offsets is None else _with_marker(offsets, position)
            text += 1
        fill = self._fill_to - text if role == "query" and self._fill is not None else 0
        if fill > 0:
            ids = np.concatenate((ids, np.full(fill, self._fill, dtype=np.int64)))
            offsets = None if offsets is None else _with_fill(offsets, fill)
        added = len(ids) - len(tokens.ids)
        types = tokens.types
        if types is not None and added:
            marked = types if rules.marker is None else np.insert(types, position, 0)
            types = np.concatenate((marked, np.zeros(len(ids) - len(marked), dtype=np.int64)))
        return replace(
            tokens,
            ids=ids,
            types=types,
            offsets=offsets,
            original_tokens=tokens.original_tokens + added,
            skip=tokens.skip + (rules.marker is not None) if tokens.skip else 0,
            # A text of nothing but mask tokens has nothing else to attend to.
            attended=text if fill > 0 and text > 0 and not self._attended else None,
            kept=rules.kept(ids),
        )


class _RuleIds:
    """The rules of queries, or of documents, with ids of the tokenizer."""

    def __init__(self, rules: TextRules, tokenizer: Tokenizer) -> None:
        self.length = rules.length
        self.marker = tokenizer.id_of(rules.marker) if rules.marker else None
        if rules.marker and self.marker is None:
            raise CheckpointError(
                f"Texts of this late-interaction model are marked by the token {rules.marker!r}, "
                "which its tokenizer does not have."
            )
        # A name that is no token would be the unknown token, and unknown tokens are not skipped.
        ids = (tokenizer.id_of(token) for token in rules.skipped)
        self._skipped = np.array(sorted({token for token in ids if token is not None}), dtype=np.int64)
        self._only = np.array(rules.only, dtype=np.int64)

    def kept(self, ids: Ids) -> Flags | None:
        """[tokens], whether each gets a vector; None where all do."""
        if not len(self._skipped) and not len(self._only):
            return None
        kept = ~np.isin(ids, self._skipped)
        if len(self._only):
            kept &= np.isin(ids, self._only)
        return None if kept.all() else kept


def _mask_token(expansion: Expansion, tokenizer: Tokenizer) -> int:
    found = next((known for token in expansion.tokens if (known := tokenizer.id_of(token)) is not None), None)
    if found is None:
        raise CheckpointError(
            f"Queries of this late-interaction model are filled up with one of {list(expansion.tokens)}, "
            "but its tokenizer has none of them."
        )
    return found


def _with_marker(offsets: Offsets, position: int) -> Offsets:
    return Offsets(
        np.insert(offsets.bounds, position, 0, axis=0),
        np.insert(offsets.words, position, -1),
        np.insert(offsets.special, position, True),
    )


def _with_fill(offsets: Offsets, count: int) -> Offsets:
    bounds = np.concatenate((offsets.bounds, np.zeros((count, 2), dtype=np.int64)))
    words = np.concatenate((offsets.words, np.full(count, -1, dtype=np.int64)))
    return Offsets(bounds, words, np.concatenate((offsets.special, np.ones(count, dtype=np.bool_))))
