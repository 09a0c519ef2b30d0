"""Tokens: one prompt as the model reads it, how much of it was cut, and where its tokens stand in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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


# What a processor gives of a picture: levels of 0 to 255, or floats.
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Picture:
    """One picture as a model's processor gives it, and what stands for it in a prompt.

    pixels: [patches, features of a patch] for towers that read patches, else [tiles, channels, height, width].
    grid: rows and columns of its patches, before the tower merges any; None for tiles of one size.
    ids: [tokens], what its one placeholder becomes, marks around it included.
    filled: [tokens], which of these are replaced by the tower's rows, in order; there are as many rows.
    extent: rows and columns of the cells of the picture that its rows stand for, line by line; None where these are no grid.
    Positions of three axes count them.
    cells: [lines, columns], which of its rows stands for each cell of the picture, where tiles have them in another order.
    more: what the tower of a transformers model reads beside pixels, by the name of its argument; arrays whose first
    dimension goes over pictures or tiles.
    """

    pixels: Pixels
    ids: Ids
    filled: Flags
    grid: tuple[int, int] | None = None
    extent: tuple[int, int] | None = None
    cells: Ids | None = None
    more: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that the tower gives."""
        return int(np.count_nonzero(self.filled))

    @property
    def nbytes(self) -> int:
        """Memory of its pixels."""
        return self.pixels.nbytes + sum(array.nbytes for array in self.more.values())

    @property
    def patches(self) -> int:
        """Rows that the tower runs over; of tiles, which say no patches, those that it gives."""
        return self.rows if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def answered(self) -> Picture:
        """Where it stands in a prompt, without what a tower reads."""
        return Picture(self.pixels[:0].copy(), self.ids, self.filled, self.grid, self.extent, self.cells)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """The pictures of one prompt, in its order.

    filled: [tokens] of the prompt, which are replaced by the towers' rows. axes: [3, tokens], the positions of each
    token in time, down and across (M-RoPE); None where positions are plain.
    """

    pictures: tuple[Picture, ...]
    filled: Flags
    axes: Ids | None = None

    @property
    def patches(self) -> int:
        """Rows that the tower runs over."""
        return sum(picture.patches for picture in self.pictures)


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """Where the parts of a prompt stand that holds a text and labels to find in it.

    labels: [labels, 2], the first token that stands for each label and the one after its last.
    words: [words, 2], the same for each word of the text; none where the text is not read by words.
    bounds: [words, 2], where each word stands in the caller's text, in characters.
    points: [points], further tokens that the model's head reads.
    first_word: the number of the first word in the whole text, of a prompt that is a window of it.
    apart: whether labels are found each by itself, so that parts with different ones may overlap.
    threshold: what is found has a higher score.
    """

    labels: Ids
    words: Ids
    bounds: Ids
    points: Ids
    first_word: int = 0
    apart: bool = False
    threshold: float = 0.5


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
    pictures: those that the prompt shows; None for text alone.
    marks: where labels and words stand, of a prompt that holds labels.
    """

    ids: Ids
    types: Ids | None = None
    original_tokens: int = 0
    original_is_estimate: bool = False
    skip: int = 0
    offsets: Offsets | None = None
    attended: int | None = None
    kept: Flags | None = None
    pictures: Pictures | None = None
    marks: Marks | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def truncated(self) -> bool:
        return self.original_tokens > len(self.ids)

    @property
    def answered(self) -> Tokens:
        """The tokens as an answer keeps them: where pictures stand, and no more, so that the memory of these goes."""
        if self.pictures is None:
            return self
        shown = tuple(picture.answered for picture in self.pictures.pictures)
        return replace(self, pictures=Pictures(shown, self.pictures.filled))


@dataclass(frozen=True, slots=True, eq=False)
class ShortTexts:
    """Texts without special care: which ones of many, their ids end to end, how many each has, and had before it was cut."""

    places: Sequence[int]
    ids: Ids
    lengths: Sequence[int]
    originals: Sequence[int]
