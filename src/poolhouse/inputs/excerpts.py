"""Excerpts: the part of a text that decides which tokens are kept, so that a huge text costs no more than a full one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from poolhouse.tokens import Ids

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
        """Places in `text` as places in the whole text: [tokens, 2] to [tokens, 2]."""
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
