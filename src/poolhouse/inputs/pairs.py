"""Pairs of texts joined as the tokenizer joins them; a text that stands in many pairs is tokenised once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.tokens import Ids, Tokens

Encode = Callable[[Sequence[Prompt], Sequence[Limit]], list[Tokens | InvalidRequest]]


@dataclass(frozen=True, slots=True, eq=False)
class PairTemplate:
    """What a tokenizer puts around and between two texts, and the token types it gives to each of the five parts."""

    head: Ids
    middle: Ids
    tail: Ids
    types: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, native: Any) -> PairTemplate:
        """The template of a tokenizer of the tokenizers library, seen by joining two words."""
        encoding = native.encode("a", "a")
        sides = encoding.sequence_ids
        ids, types = np.array(encoding.ids, dtype=np.int64), encoding.type_ids
        first, second = ([place for place, side in enumerate(sides) if side == number] for number in (0, 1))
        if not first or not second:
            return PLAIN
        bounds = (0, first[0], first[-1] + 1, second[0], second[-1] + 1, len(ids))
        parts = [ids[start:end] for start, end in pairwise(bounds)]
        kinds = [types[start] if start < end else 0 for start, end in pairwise(bounds)]
        return cls(parts[0], parts[2], parts[4], (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]))

    @property
    def special_tokens(self) -> int:
        return len(self.head) + len(self.middle) + len(self.tail)

    def join(self, first: Ids, second: Ids) -> tuple[Ids, Ids | None]:
        """Ids of the pair, and its token types; None where all are 0."""
        parts = (self.head, first, self.middle, second, self.tail)
        types = np.repeat(np.array(self.types), [len(part) for part in parts]) if any(self.types) else None
        return np.concatenate(parts), types


_NOTHING: Ids = np.empty(0, dtype=np.int64)
# Two texts end to end, as tokenizers without special tokens join them.
PLAIN = PairTemplate(_NOTHING, _NOTHING, _NOTHING, (0, 0, 0, 0, 0))


def encode_pairs(
    encode: Encode, template: PairTemplate, prompts: Sequence[Prompt], limits: Sequence[Limit]
) -> list[Tokens | InvalidRequest]:
    """Tokens of each pair, or the error that it alone gets.

    encode: the tokenizer's, for single texts.
    """
    sides: dict[tuple[str, str, Limit], int] = {}
    places: list[tuple[int, int]] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        assert prompt.text is not None
        assert prompt.pair is not None
        alone = _of_one_side(limit)
        first = sides.setdefault((prompt.text, prompt.prefix, alone), len(sides))
        places.append((first, sides.setdefault((prompt.pair, "", alone), len(sides))))
    encoded = encode([Prompt(text, None, prefix) for text, prefix, _ in sides], [limit for _, _, limit in sides])
    results: list[Tokens | InvalidRequest] = []
    for (first, second), limit in zip(places, limits, strict=True):
        try:
            results.append(_joined(encoded[first], encoded[second], template, limit))
        except InvalidRequest as error:
            results.append(error)
    return results


def _of_one_side(limit: Limit) -> Limit:
    """A side is cut only where the pair could not hold it anyway."""
    return Limit(limit.max_tokens + 1, keep=-1, side=limit.side, add_special_tokens=False, lower_case=limit.lower_case)


def _joined(
    first: Tokens | InvalidRequest, second: Tokens | InvalidRequest, template: PairTemplate, limit: Limit
) -> Tokens:
    """The pair within its limits.

    Raises:
        InvalidRequest: a side that is invalid. InputTooLong: naming how long each side is.
    """
    for side in (first, second):
        if isinstance(side, InvalidRequest):
            raise side
    assert isinstance(first, Tokens)
    assert isinstance(second, Tokens)
    if not limit.add_special_tokens:
        template = PLAIN
    query = _cut(first.ids, limit.max_query_tokens, limit.side)
    document = _cut(second.ids, limit.max_document_tokens, limit.side)
    keep = limit.cut
    room = (limit.within if keep is None else keep) - template.special_tokens
    if len(query) + len(document) > room:
        if keep is None:
            raise _too_long(first, second, limit, template)
        if room < 2:
            raise InvalidRequest(
                f"truncate_prompt_tokens={keep} leaves no room beside the {template.special_tokens} special tokens.",
                "truncate_prompt_tokens",
                keep,
            )
        if limit.max_document_tokens is not None and len(query) < room:
            # Who limits documents wants the query whole; vLLM has it so.
            most = len(query), room - len(query)
        else:
            most = _longest_first(len(query), len(document), room)
        query, document = (_cut(ids, size, limit.side) for ids, size in zip((query, document), most, strict=True))
    ids, types = template.join(query, document)
    return Tokens(
        ids,
        types,
        original_tokens=first.original_tokens + second.original_tokens + template.special_tokens,
        original_is_estimate=first.original_is_estimate or second.original_is_estimate,
    )


def _cut(ids: Ids, size: int | None, side: str) -> Ids:
    if size is None or len(ids) <= size:
        return ids
    return ids[:size] if side == "right" else ids[len(ids) - size :]


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths that fit, taken from the longer side first, as the tokenizers library does."""
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def _too_long(first: Tokens, second: Tokens, limit: Limit, template: PairTemplate) -> InputTooLong:
    lengths = {
        "query": min(first.original_tokens, limit.max_query_tokens or first.original_tokens),
        "document": min(second.original_tokens, limit.max_document_tokens or second.original_tokens),
    }
    longer = max(lengths, key=lambda side: lengths[side])
    total = sum(lengths.values()) + template.special_tokens
    field = "max_tokens_per_query" if longer == "query" else "max_tokens_per_doc"
    return InputTooLong(
        f"This model's maximum context length is {limit.within} tokens. However, your pair contains {total} input "
        f"tokens: the query has {lengths['query']}, the document {lengths['document']}, and "
        f"{template.special_tokens} are special. Shorten the {longer}, cut it with {field}, or cut the pair with "
        "truncate_prompt_tokens=-1.",
        "input_tokens",
        total,
    )
