"""Sentences: where those of a text begin and end, by their marks, without a model or data of a language; or as given.

The pieces are the text: each takes the white space behind it, and nothing is left out.

| ends a sentence | unless |
|---|---|
| a blank line, or a line break before an item of a list | |
| the marks of scripts that need no space behind them: 。！？ । ؟ ۔ ። ։ ។ and their kin | a quotation that goes on (」と) |
| . ! ? … with white space behind them | a small letter follows, or the dot is one of an abbreviation |
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from poolhouse.errors import InvalidRequest
from poolhouse.packing.tokens import Ids

# A caller's sentences of one text: texts, or (start, end) characters.
Given = Sequence[str | Sequence[int]]

_CLOSERS = r"\"'”’»›)\]}」』）】》〉"
_ALONE = "。！？｡．।॥؟۔።፧፨։။។៕᠃᠉‼⁇⁈⁉"
_END = re.compile(
    rf"(?P<line>\n[^\S\n]*\n\s*|\n(?=[^\S\n]*(?:[-*•‣◦▪]|\d{{1,3}}[.)])[^\S\n]))"
    rf"|(?P<alone>[{_ALONE}]+(?P<closed>[{_CLOSERS}]*)\s*)"
    # From the first of several marks on: a million dots are looked at once.
    rf"|(?P<spaced>(?<![.!?…])(?P<mark>[.!?…]++)[{_CLOSERS}]*+(?:\s+|\Z))"
)
# The word that a dot ends, without what opens before it.
_WORD = re.compile(r"[^\s(\[{\"'“‘«‹„¿¡]*\Z")
_LONGEST_WORD = 24
_QUOTATION_GOES_ON = ("と", "って", "という")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")

# Words whose dot ends no sentence. Those that often stand at the end of one (etc, inc, ltd, co, jr) are not here.
_ABBREVIATIONS = frozenset(
    """
    adm al approx asst bgen bros brig bzw ca capt cf cmdr col comdr cpl dept dipl dott dr drs evtl exc excmo gen geb ggf
    gov gral hon hr hrn inkl lt maj messrs mlle mlles mme mmes mr mrs ms msgr mt mx pfc ph phd prof profs pvt rep rev sen
    sgt sig sogen sog sr sra srta st str supt ud uds univ vda vgl viz vs zzgl ул им проф акад гр тыс млн млрд руб стр рис табл
    jan feb apr jun jul aug sep sept oct nov dec
    """.split()  # noqa: SIM905
)
# These only where a number follows.
_NUMBERED = frozenset(
    """
    abs art bd ch chap eq ex fig figs ref no nos nr núm num p pp par pg pos sec tab vol гл п с ст
    """.split()  # noqa: SIM905
)


def sentences(text: str) -> Ids:
    """[sentences, 2]: the first character of each, and the one after its last; together they are the whole text."""
    ends: list[int] = []
    begin = 0
    for found in _END.finditer(text):
        end = found.end()
        blank = found["line"] is not None and not text[begin:end].strip()
        if blank or not _ends(text, found, begin):
            continue
        ends.append(end)
        begin = end
    if begin < len(text):
        # What is blank belongs to what is before it.
        if ends and not text[begin:].strip():
            ends[-1] = len(text)
        else:
            ends.append(len(text))
    bounds = np.array([0, *ends], dtype=np.int64)
    return np.stack((bounds[:-1], bounds[1:]), axis=1)


def _ends(text: str, found: re.Match[str], begin: int) -> bool:
    """Whether these marks end the sentence that begins there."""
    end = found.end()
    if end == len(text) or found["line"] is not None:
        return True
    if found["alone"] is not None:
        return not (found["closed"] and text.startswith(_QUOTATION_GOES_ON, end))
    if text[end].islower():
        return False
    return found["mark"] != "." or not _abbreviates(text, found.start(), begin, text[end])


def _abbreviates(text: str, dot: int, begin: int, following: str) -> bool:
    """Whether a dot belongs to the word before it. following: the first character behind it that is no white space."""
    matched = _WORD.search(text, max(begin, dot - _LONGEST_WORD), dot)
    word = "" if matched is None else matched[0]
    if word.isdecimal():
        # The number of an item.
        return len(word) < 4 and not text[begin : dot - len(word)].strip()
    if len(word) == 1:
        return word.isupper() and word != "I"
    known = word.lower()
    return known in _ABBREVIATIONS or (known in _NUMBERED and following.isdigit()) or bool(_DOTTED.fullmatch(word))


def check_given(given: object, texts: int) -> None:
    """Raise InvalidRequest for anything but a list of sentences for each of so many texts."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not all(map(_is_list, given)):
        found = "another value"
    elif len(given) != texts:
        found = f"{len(given)} lists"
    else:
        return
    raise InvalidRequest(
        f"prune: sentences must hold a list of sentences for each of the {texts} documents, got {found}.", "prune"
    )


def given_sentences(text: str, given: Given, index: int) -> Ids:
    """The caller's sentences of documents[index] as `sentences` gives them, each behind the one before it.

    Raises:
        InvalidRequest: one that is not there.
    """
    spans = np.zeros((len(given), 2), dtype=np.int64)
    behind = 0
    for number, one in enumerate(given):
        where = f"prune: sentences[{index}][{number}]"
        if isinstance(one, str):
            start = text.find(one, behind)
            if start < 0 or not one:
                raise InvalidRequest(
                    f"{where} is {one!r}, which does not stand in documents[{index}] behind the sentence before it.",
                    "prune",
                )
            span = start, start + len(one)
        else:
            span = _span(one)
            if not behind <= span[0] < span[1] <= len(text):
                raise InvalidRequest(
                    f"{where} is {one!r}; a sentence is a text, or (start, end) with {behind} <= start < end <= "
                    f"{len(text)}, characters of its document behind the sentence before it.",
                    "prune",
                )
        spans[number] = span
        behind = span[1]
    return spans


def _span(value: Sequence[int]) -> tuple[int, int]:
    if _is_list(value) and len(value) == 2 and all(type(bound) is int for bound in value):
        return value[0], value[1]
    return -1, -1


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
