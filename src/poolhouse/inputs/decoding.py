"""Decoding: ids to the text that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import models

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import check_ids
from poolhouse.inputs.python_tokenizers import PythonTokenizer
from poolhouse.tokens import Ids

# What transformers' clean_up_tokenization_spaces replaces, in its order.
_CLEANER = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


class Decoder:
    """The way back from ids.

    clean_up: take away spaces before punctuation, as the tokenizer's config may want; BPE keeps its own spaces, and is
    left alone as transformers does. vocabulary_size: ids from here on are refused.
    """

    def __init__(self, native: tokenizers.Tokenizer | PythonTokenizer, clean_up: bool, vocabulary_size: int) -> None:
        self._native = native
        self._cleans = clean_up and not isinstance(native.model, models.BPE)
        self._vocabulary_size = vocabulary_size

    def text(self, ids: Sequence[int] | Ids, skip_special_tokens: bool = False) -> str:
        """The text of ids.

        Raises:
            InvalidRequest: an id out of the vocabulary.
        """
        text = self._native.decode(self._checked(ids), skip_special_tokens=skip_special_tokens)
        for found, cleaner in _CLEANER if self._cleans else ():
            text = text.replace(found, cleaner)
        return text

    def strings(self, ids: Sequence[int] | Ids) -> list[str]:
        """The vocabulary entry of each id; "" where the model has a vector for an id without one.

        Raises:
            InvalidRequest: an id out of the vocabulary.
        """
        return [self._native.id_to_token(token) or "" for token in self._checked(ids)]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(token for token, added in self._native.get_added_tokens_decoder().items() if added.special)

    def _checked(self, ids: Sequence[int] | Ids) -> list[int]:
        try:
            checked: list[int] = (found := np.asarray(ids, dtype=np.int64)).tolist()
        except OverflowError:
            raise InvalidRequest("A token id is out of vocabulary", "tokens") from None
        check_ids(found, self._vocabulary_size, "tokens")
        return checked
