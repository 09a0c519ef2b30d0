"""Limits: how long a prompt may be, and the early cut of texts that are far longer.

The early cut: a text of megabytes is not tokenised to keep 512 tokens. It is cut to an excerpt first, and the tokens that
are kept are those of the whole text:

    text       |===============================================================| whole
    excerpt    |==============================| CHARACTERS_PER_TOKEN * (keep + SURPLUS) characters, ends at a blank
    tokens     [CLS] t t t t t t t t t t t t t t u u u u u u [SEP]
                     kept: at most `keep`        surplus: at least SURPLUS, dropped with everything after it

  * Where a blank lies within 200 characters of the cut, the text is cut there. Words are tokenised one by one, so whole
    words have the same tokens in the excerpt and in the text.
  * Where none does, the cut is inside a run of over 200 characters. A token depends on its word, and in a long word on
    the few characters around it; every kept token is at least SURPLUS tokens away from the cut. (For WordPiece, a word
    of more than 100 characters is one unknown token, cut or not.)
  * Where an excerpt has fewer than keep + SURPLUS tokens, one four times as long is taken (`Tokenizer._long_enough`).

What keeps the end of a text (side "left") is cut likewise at its beginning. A text that is refused for its length is cut
early too: `keep` is then the limit that it exceeds. tests/inputs/test_tokenizer.py compares with the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.packing.tokens import Ids


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a prompt may be, what to do when it is longer, and options of its tokens.

    max_tokens: what the model reads in one pass, special tokens included. keep: cut to this many; -1 means max_tokens.
    side: "right" drops the end, "left" the beginning. overflow: applies where `keep` is None.
    max_prompt_tokens: a further limit of what is not cut; with overflow "chunk" the only one.
    max_query_tokens, max_document_tokens: what each text of a pair is cut to first, special tokens not counted.
    lower_case: None leaves it to the tokenizer. offsets: whether to return where each token stands in the text.
    """

    max_tokens: int
    keep: int | None = None
    side: Literal["left", "right"] = "right"
    overflow: Literal["error", "truncate", "chunk"] = "error"
    add_special_tokens: bool = True
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    max_prompt_tokens: int | None = None
    lower_case: bool | None = None
    offsets: bool = False

    @property
    def max_uncut_tokens(self) -> int | None:
        """The most tokens of a prompt that is not cut; None where there is no limit."""
        return self.max_prompt_tokens if self.overflow == "chunk" else self.max_pass_tokens

    @property
    def max_pass_tokens(self) -> int:
        """The most tokens that are read in one pass."""
        return self.max_tokens if self.max_prompt_tokens is None else min(self.max_tokens, self.max_prompt_tokens)

    @property
    def cut(self) -> int | None:
        """Tokens to cut to; None where nothing is to be cut.

        Raises:
            InvalidRequest: more tokens than the model reads.
        """
        if self.keep is None:
            return self.max_pass_tokens if self.overflow == "truncate" else None
        if self.max_uncut_tokens is not None and self.keep > self.max_uncut_tokens:
            raise InvalidRequest(
                "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
                "truncate_prompt_tokens",
                self.keep,
            )
        return self.max_pass_tokens if self.keep == -1 else self.keep


def too_many_tokens(limit: int, found: int) -> InputTooLong:
    """The error for a prompt of too many tokens."""
    return InputTooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains at least {limit + 1} input "
        "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt, "
        "or cut it with truncate_prompt_tokens=-1.",
        "input_tokens",
        found,
    )


def too_many_characters(limit: int, found: int, max_characters: int) -> InputTooLong:
    """The error for a text that is too long whatever its tokens are."""
    return InputTooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {found} characters "
        f"(more than {max_characters} characters, which is the upper bound for {limit} input tokens). Please reduce the length of "
        "the input prompt, or cut it with truncate_prompt_tokens=-1.",
        "input_text",
        found,
    )


# Characters of an excerpt for each token that is wanted of it.
CHARACTERS_PER_TOKEN = 8
# Tokens that an excerpt must have beyond those kept.
SURPLUS = 32


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The part of a text that is tokenised: all of it, or what decides the kept tokens.

    text: lower-cased where requested. raw: before that. start: the index of its first character in the whole text.
    whole: characters of the whole text.
    """

    text: str
    raw: str
    start: int
    whole: int

    @property
    def shortened(self) -> bool:
        return len(self.raw) < self.whole

    def offsets(self, found: Ids) -> Ids:
        """Offsets in `text` as offsets in the whole text; [tokens, 2] both."""
        if len(self.text) != len(self.raw) and len(self.raw):
            # Lower case of some characters is two characters.
            origin = np.repeat(np.arange(len(self.raw)), [len(character.lower()) for character in self.raw])
            first = origin[np.minimum(found[:, 0], len(origin) - 1)]
            last = np.where(found[:, 1] > found[:, 0], origin[found[:, 1] - 1] + 1, first)
            found = np.stack((first, last), axis=1)
        return found + self.start


def excerpt(
    text: str, characters: int | None, side: str, lower: Callable[[str], str] | None, exactly: bool = False
) -> Excerpt:
    """The excerpt of at most about so many characters from one end; None takes all.

    lower: lower-cases a text, where requested. exactly: so many characters, wherever that cuts.
    """
    if characters is None:
        start, end = 0, len(text)
    elif exactly:
        start, end = (0, min(characters, len(text))) if side == "right" else (max(0, len(text) - characters), len(text))
    else:
        start, end = _bounds(text, characters, side)
    raw = text[start:end]
    return Excerpt(raw if lower is None else lower(raw), raw, start, len(text))


def _bounds(text: str, characters: int, side: str) -> tuple[int, int]:
    """First character and the one after the last, at a blank where one is near."""
    if len(text) <= 2 * characters:
        return 0, len(text)
    if side == "right":
        space = text.rfind(" ", characters - 200, characters)
        return 0, space if space > 0 else characters
    start = len(text) - characters
    space = text.find(" ", start, start + 200)
    return space if space > 0 else start, len(text)
