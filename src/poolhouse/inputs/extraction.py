"""Extraction prompts: labels before a text that is split into words, as GLiNER and GLiNER2 read them.

    tokens   [CLS] <<ENT>> person <<ENT>> place <<SEP>> The Bank of Eng ##land raised rates [SEP]
    labels         *              *
    words                                               1   2    3  4          5      6

A text of more words or tokens than the model reads at once is read in windows, each behind the same labels. They overlap,
so that what is found lies whole in one of them.

Sources: the libraries gliner and gliner2 (Zaratiana et al. 2024, "GLiNER", and 2025, "GLiNER2").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.inputs.labels import Labels
from poolhouse.inputs.limits import Limit, too_many_tokens
from poolhouse.inputs.prompts import is_unicode
from poolhouse.inputs.tokenizer import Tokenizer, Words
from poolhouse.packing.tokens import Ids, Marks, Tokens

# Sets of labels whose tokens are kept.
_KEPT_SETS = 256
# Tokens of a text that a prompt must have room for beside its labels.
_LEAST_ROOM = 16
_SENTENCE_ENDS = (".", "!", "?")


class WordRules(Protocol):
    """What models differ in that read texts by words.

    words: finds the words of a text. lower_case: whether these are lower-cased. stop: what ends a text that has no mark of a
    sentence's end; "" for nothing.
    max_words: the most of one window. widest: words of the longest part that can be found; None without a limit.
    special: whether the tokenizer's special tokens stand around it all. apart: whether labels are found each by itself, so
    that parts with different ones may overlap. required: tokens that the vocabulary must have, with their ids if known.
    """

    @property
    def words(self) -> re.Pattern[str]: ...
    @property
    def lower_case(self) -> bool: ...
    @property
    def stop(self) -> str: ...
    @property
    def max_words(self) -> int: ...
    @property
    def widest(self) -> int | None: ...
    @property
    def special(self) -> bool: ...
    @property
    def apart(self) -> bool: ...
    @property
    def required(self) -> dict[str, int | None]: ...

    def prompt(self, labels: Labels) -> list[str]:
        """What stands before a text, by words."""
        ...

    def marked(self, bounds: Ids) -> tuple[Ids, Ids]:
        """The tokens of labels in the tokens of a prompt, [labels, 2], and further ones that the head reads.

        bounds: [words of the prompt, 2], the first token of each and the one after its last.
        """
        ...


@dataclass(frozen=True, slots=True)
class GlinerRules:
    """How a GLiNER reads texts; see `WordRules`.

    label_token, end_token: what stands before each label, and behind all. label_id: the id of label_token.
    at_name: whether a label's vector is that of the first token of its name.
    """

    words: re.Pattern[str]
    label_token: str
    end_token: str
    label_id: int | None
    at_name: bool
    max_words: int
    widest: int | None

    describes = False
    windows = True
    lower_case = False
    stop = ""
    special = True
    apart = False

    @property
    def required(self) -> dict[str, int | None]:
        return {self.label_token: self.label_id}

    def tokens(self, tokenizer: Tokenizer, max_tokens: int) -> WordTokens:
        """What makes its prompts.

        Raises:
            CheckpointError: the tokenizer lacks the token that marks labels, or has it under another id.
        """
        return WordTokens(self, tokenizer, max_tokens)

    def prompt(self, labels: Labels) -> list[str]:
        """What stands before a text: `<<ENT>> person <<ENT>> place <<SEP>>`."""
        return [*(word for name in labels.names for word in (self.label_token, name)), self.end_token]

    def marked(self, bounds: Ids) -> tuple[Ids, Ids]:
        """The tokens of labels, [labels, 2]."""
        begins = bounds[1:-1:2] if self.at_name else bounds[:-1:2]
        return np.stack((begins[:, 0], bounds[1:-1:2, 1]), axis=1), np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class SchemaRules:
    """How a GLiNER2 reads texts, behind a schema of one task, `entities`; see `WordRules`."""

    words: re.Pattern[str]
    max_words: int
    widest: int | None

    describes = True
    windows = True
    lower_case = True
    stop = "."
    special = False
    apart = True

    @property
    def required(self) -> dict[str, int | None]:
        return dict.fromkeys(("[P]", "[E]", "[SEP_TEXT]", "[DESCRIPTION]"))

    def tokens(self, tokenizer: Tokenizer, max_tokens: int) -> WordTokens:
        """What makes its prompts; raises as that of `GlinerRules`."""
        return WordTokens(self, tokenizer, max_tokens)

    def prompt(self, labels: Labels) -> list[str]:
        """What stands before a text: `( [P] entities [DESCRIPTION] a: what ( [E] a [E] b ) ) [SEP_TEXT]`.

        Where one label is described all are, as in the library.
        """
        described = zip(labels.names, labels.descriptions, strict=False)
        task = "entities" + "".join(f" [DESCRIPTION] {name}: {text}" for name, text in described)
        names = (word for name in labels.names for word in ("[E]", name))
        return ["(", "[P]", task, "(", *names, ")", ")", "[SEP_TEXT]"]

    def marked(self, bounds: Ids) -> tuple[Ids, Ids]:
        """The tokens of labels, [labels, 2], and that of the task."""
        return np.stack((bounds[4:-3:2, 0], bounds[5:-3:2, 1]), axis=1), bounds[1, :1]


class WordTokens:
    """Makes prompts of texts and labels; safe from several threads at once."""

    def __init__(self, rules: WordRules, tokenizer: Tokenizer, max_tokens: int) -> None:
        for token, wanted in rules.required.items():
            found = tokenizer.id_of(token)
            if found is None or wanted not in (None, found):
                raise CheckpointError(
                    f"Labels of this model are marked by the token {token!r}{'' if wanted is None else f' of id {wanted}'}; its "
                    f"tokenizer has {'no such token' if found is None else f'it as {found}'}."
                )
        self._rules, self._tokenizer, self._max_tokens = rules, tokenizer, max_tokens
        nothing = np.zeros(0, np.int64)
        self._head, self._tail = tokenizer.special_around if rules.special else (nothing, nothing)
        self._beginning = lru_cache(_KEPT_SETS)(self._read)

    def encode(
        self, texts: Sequence[str], labels: Sequence[Labels], limits: Sequence[Limit]
    ) -> list[Tokens | InvalidRequest]:
        """The tokens of each text behind its labels, with marks, or an error for it alone."""
        results: dict[int, Tokens | InvalidRequest] = {}
        waiting: list[tuple[int, _Beginning, Ids, int]] = []
        words: list[list[str]] = []
        for index, (text, own) in enumerate(zip(texts, labels, strict=True)):
            try:
                beginning = self._beginning(Labels(own.names, own.descriptions))
                if not is_unicode(text):
                    raise InvalidRequest("The text cannot be tokenised: it is no valid Unicode.", "prompt")
                cut = limits[index].cut
                bounds = [match.span() for match in self._rules.words.finditer(text)]
                count = len(bounds)
                if cut is not None and count > self._rules.max_words:
                    most = self._rules.max_words
                    bounds = bounds[:most] if limits[index].side == "right" else bounds[-most:]
            except InvalidRequest as error:
                results[index] = error
            else:
                read = [text[first:last] for first, last in bounds]
                if self._rules.lower_case:
                    read = [word.lower() for word in read]
                if self._rules.stop and not text.endswith(_SENTENCE_ENDS):
                    # It is read, but is no part of the text.
                    read.append(self._rules.stop)
                    bounds.append((len(text), len(text)))
                waiting.append((index, beginning, np.array(bounds, dtype=np.int64).reshape(-1, 2), count))
                words.append(read)
        for (index, beginning, ends, count), found in zip(waiting, self._tokenizer.words(words), strict=True):
            try:
                results[index] = self._joined(beginning, ends, count, found, labels[index], limits[index])
            except InvalidRequest as error:
                results[index] = error
        return [results[index] for index in range(len(texts))]

    def windows(self, tokens: Tokens) -> Sequence[Tokens]:
        """The prompts of a text; one where it fits."""
        marks = tokens.marks
        assert marks is not None
        words, most = marks.words, self._rules.max_words
        if not len(words) or (len(tokens) <= self._max_tokens and len(words) <= most):
            return (tokens,)
        head, tail = tokens.ids[: words[0, 0]], tokens.ids[words[-1, 1] :]
        room = self._max_tokens - len(head) - len(tail)
        found: list[Tokens] = []
        begin = end = 0
        while end < len(words):
            full = int(np.searchsorted(words[:, 1], words[begin, 0] + room, "right"))
            end = max(min(full, begin + most), begin + 1)
            own = words[begin:end] - words[begin, 0]
            # A single word may be longer than all that fits.
            ids = np.concatenate((head, tokens.ids[words[begin, 0] : words[end - 1, 1]][:room], tail))
            moved = replace(
                marks,
                words=np.minimum(own, room) + len(head),
                bounds=marks.bounds[begin:end],
                first_word=begin,
            )
            found.append(Tokens(ids, original_tokens=len(ids), marks=moved))
            # A part lies whole in one window, if windows are twice as long as parts.
            shared = max((self._rules.widest or 1) - 1, (end - begin) // 8)
            begin = max(end - min(shared, (end - begin) // 2), begin + 1)
        return found

    def _read(self, labels: Labels) -> _Beginning:
        """What stands before every text with these labels.

        Raises:
            InvalidRequest: no tokens, or too many.
        """
        prompt = self._rules.prompt(labels)
        (words,) = self._tokenizer.words([prompt])
        if isinstance(words, InvalidRequest):
            raise InvalidRequest(str(words).replace("The text", "A label"), "labels")
        missing = np.setdiff1d(np.arange(len(prompt)), words.numbers)
        if len(missing):
            name = prompt[int(missing[0])]
            raise InvalidRequest(f"The label {name!r} has no token in this model's vocabulary.", "labels", name)
        marked, points = self._rules.marked(bounds_of(words))
        taken, head = len(words.ids) + len(self._head) + len(self._tail), len(self._head)
        if taken + _LEAST_ROOM > self._max_tokens:
            raise InvalidRequest(
                f"The {len(labels.names)} labels take {taken} of the {self._max_tokens} tokens that this model reads at "
                "once, which leaves no room for a text; ask for fewer labels at a time.",
                "labels",
            )
        return _Beginning(np.concatenate((self._head, words.ids)), marked + head, points + head)

    def _joined(
        self,
        beginning: _Beginning,
        bounds: Ids,
        count: int,
        words: Words | InvalidRequest,
        labels: Labels,
        limit: Limit,
    ) -> Tokens:
        """The prompt of a text. bounds: of the words that were read. count: words of the whole text.

        Raises:
            InvalidRequest: a text that cannot be tokenised, or is too long and may not be cut.
        """
        if isinstance(words, InvalidRequest):
            raise words
        ids, around = words.ids, len(beginning.ids) + len(self._tail)
        own = bounds_of(words)
        # The rest is as long by words.
        original, cut = around + round(len(ids) * max(count / max(len(bounds), 1), 1)), limit.cut
        estimated = count > len(bounds)
        # A word may have no tokens: control characters, of some vocabularies.
        bounds = bounds[words.numbers[own[:, 0]]]
        if cut is None:
            if limit.max_uncut_tokens is not None and original > limit.max_uncut_tokens:
                raise too_many_tokens(limit.max_uncut_tokens, original)
        elif around + len(ids) > cut:
            room = cut - around
            kept = own[:, 1] <= room if limit.side == "right" else own[:, 0] >= len(ids) - room
            own, bounds = own[kept], bounds[kept]
            first, last = (int(own[0, 0]), int(own[-1, 1])) if len(own) else (0, 0)
            ids, own = ids[first:last], own - first
        return Tokens(
            np.concatenate((beginning.ids, ids, self._tail)),
            original_tokens=original,
            original_is_estimate=estimated,
            marks=Marks(
                beginning.labels,
                own + len(beginning.ids),
                bounds,
                beginning.points,
                apart=self._rules.apart,
                threshold=labels.threshold,
            ),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Beginning:
    """The tokens of labels, special ones before them included, and where each label stands."""

    ids: Ids
    labels: Ids
    points: Ids


def bounds_of(words: Words) -> Ids:
    """[words, 2], the first token of each word that has tokens, and the one after its last."""
    edges = np.flatnonzero(np.diff(words.numbers, prepend=-1, append=-1))
    return np.stack((edges[:-1], edges[1:]), axis=1)
