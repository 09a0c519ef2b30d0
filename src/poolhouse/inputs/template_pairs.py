"""Rendered pairs: two texts in a score template, tokenised; where a pair is too long, its document is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tokenizers

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.inputs.limits import CHARACTERS_PER_TOKEN, SURPLUS, Limit
from poolhouse.inputs.prompts import Prompt, check_ids, is_unicode
from poolhouse.inputs.python_tokenizers import PythonTokenizer
from poolhouse.inputs.templates.score import SEAM, ScoreTemplate
from poolhouse.packing.tokens import Ids, Tokens

# Vocabulary entries that are tried as documents, where the tokenizer has no digits.
_MAX_FILLERS = 2000


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair whose texts are cut to their own limits.

    cut: tokens that these limits took. lost: tokens of the document, about, that were cut early since none could be kept.
    """

    prompt: Prompt
    query: str
    document: str
    limit: Limit
    cut: int = 0
    lost: int = 0

    @property
    def template(self) -> ScoreTemplate:
        assert self.prompt.template is not None
        return self.prompt.template

    def pieces(self, document: str | None = None) -> list[str]:
        """The parts of the prompt, which are tokenised one by one. document: another than the pair's own."""
        shown = self.document if document is None else document
        return self.template.render(self.query, shown, self.prompt.prefix).split(SEAM)


class RenderedPairs:
    """The tokenizer of rendered pairs.

    encode: texts to ids, with special tokens or without. special: the special tokens before and after a text.
    lower_case: whether to lower-case where a limit leaves it to the tokenizer. lower: lower-cases a text.
    known_ids: larger ids are refused, and this one too; None where the model knows all ids.
    """

    def __init__(
        self,
        native: tokenizers.Tokenizer | PythonTokenizer,
        encode: Callable[[list[str], bool], list[Ids | InvalidRequest]],
        special: tuple[Ids, Ids],
        lower_case: bool,
        lower: Callable[[str], str],
        known_ids: int | None,
    ) -> None:
        self._native = native
        self._encode = encode
        self._special = special
        self._lower_case = lower_case
        self._lower = lower
        self._known_ids = known_ids

    def encode(self, prompts: Sequence[Prompt], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """Tokens of each pair, or an error for it alone."""
        results: list[Tokens | InvalidRequest | None] = [None] * len(prompts)
        pairs: dict[int, tuple[_Pair, list[str]]] = {}
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            try:
                pair = self._shortened(prompt, limit)
                pairs[index] = (pair, self._pieces(pair))
            except InvalidRequest as error:
                results[index] = error
        encoded = iter(self._encode([piece for _, pieces in pairs.values() for piece in pieces], False))
        for index, (pair, pieces) in pairs.items():
            parts = [next(encoded) for _ in pieces]
            try:
                results[index] = self._within_limit(pair, self._joined(pair, parts))
            except InvalidRequest as error:
                results[index] = error
        return [result for result in results if result is not None]

    def cut_text(self, text: str, tokens: int, side: str) -> tuple[str, int]:
        """The part of a text with at most so many tokens, and about how many tokens the rest has.

        side: "right" drops the end, "left" the beginning.
        """
        characters = CHARACTERS_PER_TOKEN * (tokens + SURPLUS)
        while True:
            part = text[:characters] if side == "right" else text[-characters:]
            offsets = self._offsets(part)
            if len(offsets) > tokens or len(part) == len(text):
                break
            characters *= 4
        if len(offsets) <= tokens:
            return text, 0
        lost = max(round(len(offsets) * len(text) / len(part)) - tokens, 1)
        return (part[: offsets[tokens - 1][1]] if side == "right" else part[offsets[-tokens][0] :]), lost

    def content(self, texts: Sequence[str]) -> list[Ids | InvalidRequest]:
        """Ids of texts without special tokens."""
        return self._encode([self._lower(text) for text in texts] if self._lower_case else list(texts), False)

    def _lowers(self, limit: Limit) -> bool:
        return self._lower_case if limit.lower_case is None else limit.lower_case

    def _pieces(self, pair: _Pair, document: str | None = None) -> list[str]:
        """The parts of the prompt, lower-cased where requested. document: another than the pair's own."""
        pieces = pair.pieces(document)
        return [self._lower(piece) for piece in pieces] if self._lowers(pair.limit) else pieces

    def _shortened(self, prompt: Prompt, limit: Limit) -> _Pair:
        """The pair with each text cut to its own limit, and a document far over the limit to what could be kept of it."""
        assert prompt.text is not None
        assert prompt.pair is not None
        query, document, keep = prompt.text, prompt.pair, limit.cut
        if self._lowers(limit):
            query, document = self._lower(query), self._lower(document)
        cut = lost = 0
        if limit.max_query_tokens is not None:
            query, cut = self.cut_text(query, limit.max_query_tokens, limit.side)
        if limit.max_document_tokens is not None:
            document, more = self.cut_text(document, limit.max_document_tokens, limit.side)
            cut += more
        max_tokens = (limit.max_tokens + 1 if keep is None else keep) + SURPLUS
        if len(document) > 2 * CHARACTERS_PER_TOKEN * max_tokens:
            document, lost = self.cut_text(document, max_tokens, limit.side)
        return _Pair(prompt, query, document, limit, cut, lost)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token stands in a text."""
        try:
            return self._native.encode(text, add_special_tokens=False).offsets
        except InvalidRequest:
            raise
        except Exception as error:  # the library may raise any exception
            why = str(error) if is_unicode(text) else "it is no valid Unicode."
            raise InvalidRequest(f"The text cannot be tokenised: {why}", "prompt") from error

    def _joined(self, pair: _Pair, parts: Sequence[Ids | InvalidRequest]) -> Ids:
        ids: list[Ids] = []
        for part in parts:
            if isinstance(part, InvalidRequest):
                raise part
            ids.append(part)
        if pair.template.special_tokens and pair.limit.add_special_tokens:
            head, tail = self._special
            ids = [head, *ids, tail]
        joined = np.concatenate(ids)
        if self._known_ids is not None:
            check_ids(joined, self._known_ids)
        return joined

    def _within_limit(self, pair: _Pair, ids: Ids) -> Tokens:
        """The prompt within its limits.

        Raises:
            InputTooLong: naming how long each text is.
        """
        limit, keep = pair.limit, pair.limit.cut
        whole = len(ids) + pair.lost
        if whole <= (limit.max_tokens if keep is None else keep):
            return Tokens(ids, original_tokens=whole + pair.cut)
        if keep is None:
            raise self._too_long(pair, whole)
        head, tail = self._frame(pair)
        if len(head) + len(tail) >= keep:
            raise InputTooLong(
                f"The query and the template take {len(head) + len(tail)} of the {keep} tokens and leave no room for the "
                "document. Shorten the query, or cut it with max_tokens_per_query.",
                "max_tokens_per_query",
                len(head) + len(tail),
            )
        if limit.side == "right":
            ids = np.concatenate((ids[: keep - len(tail)], tail))
        else:
            ids = np.concatenate((head, ids[len(ids) - (keep - len(head)) :]))
        return Tokens(ids, original_tokens=whole + pair.cut, original_is_estimate=pair.lost > 0)

    def _frame(self, pair: _Pair) -> tuple[Ids, Ids]:
        """The tokens before and after the document: those that two prompts with different documents share."""
        first, second = (
            self._joined(pair, self._encode(self._pieces(pair, filler), False)) for filler in self._fillers
        )
        return first[: _shared(first, second)], first[len(first) - _shared(first[::-1], second[::-1]) :]

    @cached_property
    def _fillers(self) -> tuple[str, str]:
        """Two documents without a token in common: what their prompts share is of the template and the query."""
        entries = sorted(self._native.get_vocab().values())[:_MAX_FILLERS]
        tried: list[tuple[str, set[int]]] = []
        for text in ("0", "1 2 3 4", *(self._native.decode([entry]).strip() for entry in entries)):
            ids = self._encode([text], False)[0]
            own = set() if isinstance(ids, InvalidRequest) else set(ids.tolist())
            for other, others in tried:
                if own and others and own.isdisjoint(others):
                    return other, text
            tried.append((text, own))
        return tried[0][0], tried[1][0]

    def _too_long(self, pair: _Pair, total: int) -> InputTooLong:
        lengths = {"query": len(self._offsets(pair.query)), "document": len(self._offsets(pair.document)) + pair.lost}
        longer = max(lengths, key=lambda name: lengths[name])
        about = "about " if pair.lost else ""
        field = "max_tokens_per_query" if longer == "query" else "max_tokens_per_doc"
        return InputTooLong(
            f"This model's maximum context length is {pair.limit.max_tokens} tokens. However, your pair makes "
            f"{about}{total} input tokens: the query has {lengths['query']}, the document {about}{lengths['document']}, "
            f"and the template adds the rest. Shorten the {longer}, cut it with {field}, or cut the document with "
            "truncate_prompt_tokens=-1.",
            "input_tokens",
            total,
        )


def _shared(first: Ids, second: Ids) -> int:
    """How many leading ids two prompts have in common."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
