"""Limit: how long a prompt may be, and how its tokens are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.packing.tokens import Ids


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a prompt may be, what to do when it is longer, and how its tokens are made.

    max_tokens: the model's limit, special tokens included. keep: cut to this many; -1 means max_tokens.
    side: "right" drops the end, "left" the beginning. overflow applies where `keep` is None.
    max_prompt_tokens: another limit of what is not cut; with overflow "chunk" the only one.
    max_query_tokens, max_document_tokens: what each side of a pair is cut to first, special tokens not counted.
    lower_case: None leaves it to the tokenizer. offsets: say where in the text each token stands.
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
        """The most tokens of a prompt, or None where any number is taken."""
        return self.max_prompt_tokens if self.overflow == "chunk" else self.max_pass_tokens

    @property
    def max_pass_tokens(self) -> int:
        """The most tokens of a prompt that is read in one pass."""
        return self.max_tokens if self.max_prompt_tokens is None else min(self.max_tokens, self.max_prompt_tokens)

    @property
    def cut(self) -> int | None:
        """Tokens to cut to, or None where nothing is to be cut.

        Raises:
            InvalidRequest: more than the model takes.
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
    return InputTooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains at least {limit + 1} input "
        "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt, "
        "or cut it with truncate_prompt_tokens=-1.",
        "input_tokens",
        found,
    )


def too_many_characters(limit: int, found: int, most: int) -> InputTooLong:
    return InputTooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {found} characters "
        f"(more than {most} characters, which is the upper bound for {limit} input tokens). Please reduce the length of "
        "the input prompt, or cut it with truncate_prompt_tokens=-1.",
        "input_text",
        found,
    )


# A text is cut to about this many characters per token wanted before it is tokenised; more when that was too few.
CHARACTERS_PER_TOKEN = 8
# Tokens that a shortened text must have beyond those kept, so that the cut cannot have changed the kept ones.
SURPLUS = 32


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What is tokenised of a text: all of it, or the part that decides the tokens kept.

    text: lower-cased where that was asked. raw: before that. start: the place of its first character in the text.
    whole: characters of the text.
    """

    text: str
    raw: str
    start: int
    whole: int

    @property
    def shortened(self) -> bool:
        return len(self.raw) < self.whole

    def offsets(self, found: Ids) -> Ids:
        """Offsets in `text` as offsets in the whole text: [tokens, 2] to [tokens, 2]."""
        if len(self.text) != len(self.raw) and len(self.raw):
            # Lower-casing makes two characters of some.
            origin = np.repeat(np.arange(len(self.raw)), [len(character.lower()) for character in self.raw])
            first = origin[np.minimum(found[:, 0], len(origin) - 1)]
            last = np.where(found[:, 1] > found[:, 0], origin[found[:, 1] - 1] + 1, first)
            found = np.stack((first, last), axis=1)
        return found + self.start


def excerpt(text: str, characters: int | None, side: str, lower: Callable[[str], str] | None) -> Excerpt:
    """At most about so many characters from one end, cut at white space where some is near; None takes all.

    lower: what lower-cases, where that is asked.
    """
    start, end = (0, len(text)) if characters is None else _bounds(text, characters, side)
    raw = text[start:end]
    return Excerpt(raw if lower is None else lower(raw), raw, start, len(text))


def _bounds(text: str, characters: int, side: str) -> tuple[int, int]:
    if len(text) <= 2 * characters:
        return 0, len(text)
    if side == "right":
        space = text.rfind(" ", characters - 200, characters)
        return 0, space if space > 0 else characters
    start = len(text) - characters
    space = text.find(" ", start, start + 200)
    return space if space > 0 else start, len(text)
