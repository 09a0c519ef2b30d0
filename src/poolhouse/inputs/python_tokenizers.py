"""PythonTokenizer: a tokenizer of transformers that is Python code, with the methods of the tokenizers library.

ESM, PhoBERT, Japanese BERT and others have such classes, which the tokenizers library cannot express. They are slower,
take one text at a time, and most return no offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import tokenizers

from poolhouse.errors import CheckpointError, InvalidRequest

# Ids that no token has: they stand for the texts that special tokens are put around.
_FIRST, _SECOND = -1, -2


@dataclass(frozen=True, slots=True)
class PythonEncoding:
    """Tokens of one text, as `tokenizers.Encoding` has them. name: of the tokenizer's class."""

    ids: list[int]
    special_tokens_mask: list[int]
    name: str

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Unknown.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest(
            f"Where tokens stand in a text is not known: {self.name} of this model is Python code that does not say. "
            "What needs it (spans, words, late chunking, cutting one side of a templated pair) is not possible.",
            "prompt",
        )

    @property
    def word_ids(self) -> list[int | None]:
        """Unknown too; see `offsets`."""
        return [None for _ in self.offsets]


class PythonTokenizer:
    """A tokenizer without a backend of the tokenizers library.

    Raises:
        CheckpointError: one whose inputs are more than its tokens with special ones around them.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs
        self._lock = Lock()
        self.name = type(theirs).__name__
        # In place of the library's model; of its attributes, this one has `unk_token`.
        self.model = theirs
        self._head, self._tail = self._ends()
        self._check()

    def encode(self, text: str, add_special_tokens: bool = True) -> PythonEncoding:
        """Tokens of one text."""
        with self._lock:
            content = self._theirs.convert_tokens_to_ids(self._theirs.tokenize(text))
        if not add_special_tokens:
            return PythonEncoding(content, [0] * len(content), self.name)
        mask = [*[1] * len(self._head), *[0] * len(content), *[1] * len(self._tail)]
        return PythonEncoding([*self._head, *content, *self._tail], mask, self.name)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[PythonEncoding]:
        """Tokens of each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    encode_batch_fast = encode_batch

    def around(self, texts: int, special: bool) -> tuple[list[int], list[int], list[int | None]]:
        """Ids and types of one text or two, of a token each, and to which text each token belongs (None: special)."""
        first, second = [_FIRST], [_SECOND] if texts == 2 else None
        if special:
            ids = list(self._theirs.build_inputs_with_special_tokens(first, second))
            types = list(self._theirs.create_token_type_ids_from_sequences(first, second))
        else:
            ids, types = [*first, *(second or ())], []
        owners = [{_FIRST: 0, _SECOND: 1}.get(token) for token in ids]
        return ids, types if len(types) == len(ids) else [0] * len(ids), owners

    def no_padding(self) -> None:
        """Nothing is padded unless requested."""

    no_truncation = no_padding

    def get_vocab(self) -> Mapping[str, int]:
        """Ids by entry."""
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        vocabulary: Mapping[str, int] = self._theirs.get_vocab()
        return vocabulary

    def get_vocab_size(self) -> int:
        """Entries, added tokens included."""
        return len(self._theirs)

    def get_added_tokens_decoder(self) -> Mapping[int, tokenizers.AddedToken]:
        """Added tokens by id."""
        added: Mapping[int, tokenizers.AddedToken] = self._theirs.added_tokens_decoder
        return added

    def token_to_id(self, token: str) -> int | None:
        """The id of an entry; None where there is none."""
        return self.get_vocab().get(token)

    def id_to_token(self, token: int) -> str | None:
        """The entry of an id; None where there is none."""
        found = self._theirs.convert_ids_to_tokens(token)
        return found if isinstance(found, str) else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        with self._lock:
            text: str = self._theirs.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def _ends(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text."""
        ids, _, owners = self.around(1, special=True)
        if owners.count(0) != 1:
            raise CheckpointError(f"{self.name} is not supported: it does not give a text once among special tokens.")
        index = owners.index(0)
        return ids[:index], ids[index + 1 :]

    def _check(self) -> None:
        """Compare the ids of a text with those that the class itself returns."""
        entries = map(self.id_to_token, range(min(200, self.get_vocab_size())))
        text = " ".join(entry for entry in entries if entry and entry.isprintable())
        try:
            expected = list(self._theirs(text)["input_ids"])
        except Exception as error:
            raise CheckpointError(f"{self.name} does not tokenise a plain text: {error}") from error
        if self.encode(text).ids != expected:
            raise CheckpointError(
                f"{self.name} is not supported: it makes inputs otherwise than by special tokens around its tokens."
            )
