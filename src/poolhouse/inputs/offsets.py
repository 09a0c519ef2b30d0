"""Offsets: where each token stands in the caller's text, and to which word it belongs."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import tokenizers

from poolhouse.inputs.limits import Excerpt
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.python_tokenizers import PythonEncoding
from poolhouse.packing.tokens import Ids, Offsets

_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)
_UTF_32 = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"


def offsets_of(
    encoding: tokenizers.Encoding | PythonEncoding,
    excerpt: Excerpt,
    prompt: Prompt,
    marks_words: bool,
    unknown: int | None,
) -> Offsets:
    """The bounds and word of each token.

    marks_words: the tokenizer marks tokens inside a word (WordPiece), so words are its own. Otherwise a token continues
    the word before it unless white space is between them, and an unknown token is a word by itself. This is the rule of
    transformers' token-classification pipeline, which looks for blanks only.
    unknown: the id of the unknown token.
    """
    assert prompt.text is not None
    offsets = excerpt.offsets(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2))
    offsets = np.maximum(offsets - len(prompt.prefix), 0)
    special = np.array(encoding.special_tokens_mask, dtype=np.int64) != 0
    content = ~special
    if prompt.prefix:
        content &= offsets[:, 1] > 0
    offsets[~content] = 0
    continues = _same_word(encoding) if marks_words else _no_space_between(offsets[:, 0], prompt.text)
    if unknown is not None:
        continues &= np.array(encoding.ids) != unknown
    begins = content & ~continues
    if content.any():
        begins[content.argmax()] = True
    return Offsets(offsets, np.where(content, begins.cumsum() - 1, -1), special)


def white_space(text: str) -> npt.NDArray[np.bool_]:
    """[characters], which of them are white space."""
    found: npt.NDArray[np.bool_] = np.isin(
        np.frombuffer(text.encode(_UTF_32, "surrogatepass"), dtype=np.uint32), _SPACES
    )
    return found


def anchors_of(text: str, offsets: Ids) -> Ids:
    """[tokens]: the first character of each that is no white space; a token of nothing else keeps its first."""
    code = white_space(text)
    solid = np.append(np.flatnonzero(~code), len(text))
    found = solid[np.searchsorted(solid, offsets[:, 0])]
    return np.where(found < offsets[:, 1], found, offsets[:, 0])


def _same_word(encoding: tokenizers.Encoding | PythonEncoding) -> npt.NDArray[np.bool_]:
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    same: npt.NDArray[np.bool_] = (words >= 0) & (words == np.concatenate(([-1], words[:-1])))
    return same


def _no_space_between(starts: Ids, text: str) -> npt.NDArray[np.bool_]:
    space = np.concatenate((white_space(text), [False]))
    joined: npt.NDArray[np.bool_] = (starts > 0) & ~space[starts - 1] & ~space[starts]
    return joined
