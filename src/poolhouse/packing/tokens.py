"""Tokens: one prompt as the model reads it, how much of it was cut, and where its tokens stand in the text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """Where each token stands in the text that the caller gave, in characters.

    bounds: [tokens, 2], its first character and the one after its last; (0, 0) for special tokens.
    words: [tokens], the number of its word; -1 for special tokens and those of a prefix.
    special: [tokens], whether the tokenizer added it around the text.
    """

    bounds: Ids
    words: Ids
    special: npt.NDArray[np.bool_]

    def take(self, kept: Ids) -> Offsets:
        return Offsets(self.bounds[kept], self.words[kept], self.special[kept])


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Token ids of one prompt, and how much of it was cut.

    ids: [tokens], special tokens included.
    types: [tokens] token types (segment ids), or None where all are 0.
    original_tokens: how many tokens the prompt had before it was cut, special tokens included.
    original_is_estimate: the prompt was far over the limit, so its rest was counted by characters.
    skip: leading tokens that pooling leaves out (an instruction, for `include_prompt: false`).
    offsets: where the tokens stand in the text, where the request asked for it.
    attended: how many leading tokens are attended to; the rest only looks on (mask tokens behind a query). None: all.
    kept: [tokens], whether a token gets a row of its own in token tasks; None: all do.
    """

    ids: Ids
    types: Ids | None = None
    original_tokens: int = 0
    original_is_estimate: bool = False
    skip: int = 0
    offsets: Offsets | None = None
    attended: int | None = None
    kept: Flags | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def truncated(self) -> bool:
        return self.original_tokens > len(self.ids)
