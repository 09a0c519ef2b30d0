"""Tokens of queries and documents as late-interaction models read them: marked, cut, filled up, some without a vector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from poolhouse.errors import CheckpointError
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.rules import Expansion, LateInteraction, TextRules
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Ids, Offsets, Tokens


class LateInteractionTokens:
    """Makes the tokens of both sides of one model.

    max_tokens: the model's limit.

    Raises:
        CheckpointError: a marker or mask token that the tokenizer does not have.
    """

    def __init__(self, rules: LateInteraction, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._sides = {"query": _Known(rules.query, tokenizer), "document": _Known(rules.document, tokenizer)}
        self._fill = None if rules.expansion is None else _mask_token(rules.expansion, tokenizer)
        self._fill_to = 0 if rules.expansion is None else min(rules.expansion.length, max_tokens)
        self._attended = rules.expansion is not None and rules.expansion.attended

    def limit(self, limit: Limit, role: Role) -> Limit:
        """The limit of the text alone: what is longer than its side is cut, as in the reference, and reported."""
        side = self._sides[role]
        marked = side.marker is not None
        if side.length is None and not marked:
            return limit
        most = limit.max_pass_tokens if side.length is None else min(limit.max_pass_tokens, side.length)
        if limit.keep is None or limit.keep == -1:
            # Without a length of its own, a side leaves it to the limit what is done with longer texts.
            if side.length is None and limit.cut is None:
                return replace(limit, max_tokens=limit.max_tokens - marked)
            return replace(limit, keep=max(most - marked, 0))
        if limit.keep > limit.max_pass_tokens:
            return limit
        return replace(limit, keep=max(min(limit.keep, most) - marked, 0))

    def finished(self, tokens: Tokens, role: Role, special: bool) -> Tokens:
        """The tokens of a text with everything that its side adds.

        special: whether the text has special tokens, behind the first of which the marker stands.
        """
        side = self._sides[role]
        ids, offsets, text = tokens.ids, tokens.offsets, len(tokens.ids)
        if side.marker is not None:
            place = min(int(special), text)
            ids = np.insert(ids, place, side.marker)
            offsets = None if offsets is None else _with_gap(offsets, place)
            text += 1
        fill = self._fill_to - text if role == "query" and self._fill is not None else 0
        if fill > 0:
            ids = np.concatenate((ids, np.full(fill, self._fill, dtype=np.int64)))
            offsets = None if offsets is None else _with_end(offsets, fill)
        added = len(ids) - len(tokens.ids)
        types = tokens.types
        if types is not None and added:
            marked = types if side.marker is None else np.insert(types, place, 0)
            types = np.concatenate((marked, np.zeros(len(ids) - len(marked), dtype=np.int64)))
        return replace(
            tokens,
            ids=ids,
            types=types,
            offsets=offsets,
            original_tokens=tokens.original_tokens + added,
            skip=tokens.skip + (side.marker is not None) if tokens.skip else 0,
            # A text of nothing but mask tokens has nothing else to attend to.
            attended=text if fill > 0 and text > 0 and not self._attended else None,
            kept=side.kept(ids, text),
        )


class _Known:
    """One side in ids of the tokenizer."""

    def __init__(self, side: TextRules, tokenizer: Tokenizer) -> None:
        self.length = side.length
        self.marker = tokenizer.id_of(side.marker) if side.marker else None
        if side.marker and self.marker is None:
            raise CheckpointError(
                f"Texts of this late-interaction model are marked by the token {side.marker!r}, "
                "which its tokenizer does not have."
            )
        # A word that is no token of its own would stand for the unknown token, and no text is skipped for that.
        known = (tokenizer.id_of(word) for word in side.skipped)
        self._skipped = np.array(sorted({token for token in known if token is not None}), dtype=np.int64)
        self._only = np.array(side.only, dtype=np.int64)

    def kept(self, ids: Ids, text: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
        """[tokens], whether each gets a vector; None where all do. text: how many come before mask tokens."""
        if not len(self._skipped) and not len(self._only):
            return None
        kept = ~np.isin(ids, self._skipped)
        if len(self._only):
            kept &= np.isin(ids, self._only)
        return None if kept.all() else kept


def _mask_token(expansion: Expansion, tokenizer: Tokenizer) -> int:
    found = next((known for word in expansion.tokens if (known := tokenizer.id_of(word)) is not None), None)
    if found is None:
        raise CheckpointError(
            f"Queries of this late-interaction model are filled up with one of {list(expansion.tokens)}, "
            "but its tokenizer has none of them."
        )
    return found


def _with_gap(offsets: Offsets, place: int) -> Offsets:
    return Offsets(
        np.insert(offsets.bounds, place, 0, axis=0),
        np.insert(offsets.words, place, -1),
        np.insert(offsets.special, place, True),
    )


def _with_end(offsets: Offsets, count: int) -> Offsets:
    bounds = np.concatenate((offsets.bounds, np.zeros((count, 2), dtype=np.int64)))
    words = np.concatenate((offsets.words, np.full(count, -1, dtype=np.int64)))
    return Offsets(bounds, words, np.concatenate((offsets.special, np.ones(count, dtype=np.bool_))))
