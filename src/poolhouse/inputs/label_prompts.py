"""Label prompts: one text and its labels, each behind a mark, as GLiClass reads them.

    labels first    [CLS] <<LABEL>> good <<LABEL>> bad <<SEP>> the text [SEP]
    text first      [CLS] the text <<LABEL>> good <<LABEL>> bad <<SEP>> [SEP]

A text is tokenised with the mark that stands beside it, so that both parts have the tokens that they have in the whole: some
tokenizers treat the ends of what they are given in a way of their own. Labels are tokenised once for many texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from poolhouse.errors import CheckpointError, InputTooLong, InvalidRequest
from poolhouse.inputs.labels import Labels
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Ids, Marks, Tokens

LABEL, SEPARATOR = "<<LABEL>>", "<<SEP>>"
_NONE = np.zeros((0, 2), np.int64)
# Sets of labels whose tokens are kept.
_KEPT_SETS = 64


@dataclass(frozen=True, slots=True)
class LabelPrompts:
    """How a model reads labels with a text, as its files say.

    labels_first: whether they stand before the text. whole: whether a label is the mean of all its tokens, not one of them.
    mark: whether its mark is one of them, or the first. text_alone: whether the text's vector leaves the labels out.
    label_id, separator_id: tokens of the marks.
    """

    labels_first: bool
    whole: bool
    mark: bool
    text_alone: bool
    label_id: int
    separator_id: int

    describes = False
    windows = False

    def tokens(self, tokenizer: Tokenizer, max_tokens: int) -> LabelPromptTokens:
        """What makes prompts of texts and labels.

        Raises:
            CheckpointError: the tokenizer has other ids for the marks.
        """
        for name, wanted in ((LABEL, self.label_id), (SEPARATOR, self.separator_id)):
            found = tokenizer.id_of(name)
            if found != wanted:
                raise CheckpointError(f"config.json says that {name} is token {wanted}; the tokenizer has {found}.")
        return LabelPromptTokens(self, tokenizer)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The labels of a prompt. ids: of them and their marks. marks: where each label's mark stands among these."""

    ids: Ids
    marks: Ids


class LabelPromptTokens:
    """Makes the prompts of one model; safe from several threads at once."""

    def __init__(self, rules: LabelPrompts, tokenizer: Tokenizer) -> None:
        self._rules, self._tokenizer = rules, tokenizer
        self._part = lru_cache(_KEPT_SETS)(self._labels)

    def encode(
        self, texts: Sequence[str], labels: Sequence[Labels], limits: Sequence[Limit]
    ) -> list[Tokens | InvalidRequest]:
        """The tokens of each text and its labels, with marks, or an error for it alone; the text is what is cut."""
        results: dict[int, Tokens | InvalidRequest] = {}
        parts: dict[int, _Part] = {}
        rooms: list[Limit] = []
        for index, (own, limit) in enumerate(zip(labels, limits, strict=True)):
            try:
                parts[index] = self._part(own.names)
                rooms.append(self._room(parts[index], limit))
            except InvalidRequest as error:
                parts.pop(index, None)
                results[index] = error
        encoded = self._tokenizer.encode([Prompt(self._beside_mark(texts[index])) for index in parts], rooms)
        for (index, part), tokens, room in zip(parts.items(), encoded, rooms, strict=True):
            try:
                # A limit of the text's own is a wish to cut it.
                may_cut = limits[index].cut is not None or room.keep != room.max_tokens
                results[index] = self._joined(part, tokens, limits[index], may_cut)
            except InvalidRequest as error:
                results[index] = error
        return [results[index] for index in range(len(texts))]

    def windows(self, tokens: Tokens) -> Sequence[Tokens]:
        """The prompt itself: it always fits."""
        return (tokens,)

    def _beside_mark(self, text: str) -> str:
        return SEPARATOR + text if self._rules.labels_first else text + LABEL

    def _labels(self, names: tuple[str, ...]) -> _Part:
        """The tokens of labels.

        Raises:
            InvalidRequest: a label that holds a mark, or cannot be tokenised.
        """
        written = "".join(f"{LABEL}{name}" for name in names) + SEPARATOR
        (tokens,) = self._tokenizer.encode([Prompt(written)], [Limit(0, overflow="chunk", add_special_tokens=False)])
        if isinstance(tokens, InvalidRequest):
            raise InvalidRequest(f"labels: {tokens}", "labels")
        marks = np.flatnonzero(tokens.ids == self._rules.label_id)
        if len(marks) != len(names) or np.count_nonzero(tokens.ids == self._rules.separator_id) != 1:
            raise InvalidRequest(f"labels: {LABEL} and {SEPARATOR} stand between labels, never within.", "labels")
        # Where labels are first, their separator is that before the text.
        return _Part(tokens.ids[:-1] if self._rules.labels_first else tokens.ids, marks)

    def _room(self, part: _Part, limit: Limit) -> Limit:
        """The limit of the text and the mark beside it.

        Raises:
            InputTooLong: labels that leave none.
        """
        most = limit.cut or limit.max_pass_tokens
        # Where the text is first, the mark behind it is no token of its own.
        room = most - len(part.ids) + (not self._rules.labels_first)
        if room <= self._tokenizer.special_tokens + 1:
            raise InputTooLong(
                f"The labels take {len(part.ids)} of {most} tokens and leave no room for a text; give fewer or shorter ones.",
                "labels",
                len(part.ids),
            )
        keep = room
        if limit.max_query_tokens is not None:
            keep = min(room, limit.max_query_tokens + self._tokenizer.special_tokens + 1)
        return Limit(room, keep=keep, side=limit.side)

    def _joined(self, part: _Part, tokens: Tokens | InvalidRequest, limit: Limit, may_cut: bool) -> Tokens:
        """The whole prompt.

        Raises:
            InputTooLong: a text that may not be cut. InvalidRequest: one that cannot be tokenised.
        """
        if isinstance(tokens, InvalidRequest):
            raise tokens
        original = tokens.original_tokens + len(part.ids) - (not self._rules.labels_first)
        if tokens.truncated and not may_cut:
            raise InputTooLong(
                f"This model's maximum context length is {limit.max_pass_tokens} tokens. However, the text and its labels "
                f"contain {'about ' if tokens.original_is_estimate else ''}{original}, of which the labels take "
                f"{len(part.ids)}. Shorten the text, give fewer labels, or cut the text with truncate_prompt_tokens=-1.",
                "input_tokens",
                original,
            )
        head, tail = self._tokenizer.special_ends
        before, text, after = tokens.ids[:head], tokens.ids[head : len(tokens) - tail], tokens.ids[len(tokens) - tail :]
        text, first = self._without_mark(text, tokens.truncated and limit.side == "left"), head
        ids = (before, part.ids, text, after)
        if not self._rules.labels_first:
            ids, first = (before, text, part.ids, after), head + len(text)
        starts = part.marks + first
        end = first + len(part.ids)
        text_start = end if self._rules.labels_first else end - 1
        return Tokens(
            np.concatenate(ids),
            original_tokens=original,
            original_is_estimate=tokens.original_is_estimate,
            skip=text_start if self._rules.text_alone else 0,
            marks=Marks(self._bounds(starts, text_start, sum(map(len, ids))), _NONE, _NONE, _NONE[:, 0]),
        )

    def _without_mark(self, text: Ids, lost_begin: bool) -> Ids:
        """The tokens of a text: with the separator before it, where labels are first; else without the mark behind it.

        Of a text that is cut, the mark behind it is gone, and the room that was left for it is not needed.
        """
        if not self._rules.labels_first:
            return text[:-1]
        return np.concatenate(([self._rules.separator_id], text[1:])) if lost_begin else text

    def _bounds(self, starts: Ids, text_start: int, length: int) -> Ids:
        """[labels, 2]: the first row that stands for a label, and the one after its last."""
        firsts = starts if self._rules.mark else starts + 1
        if not self._rules.whole:
            return np.stack((firsts, firsts + 1), axis=1)
        # Where nothing says where the text begins, the last label goes on to the end, as the model was trained.
        last = text_start if self._rules.text_alone else length
        return np.stack((firsts, np.append(starts[1:], last)), axis=1)
