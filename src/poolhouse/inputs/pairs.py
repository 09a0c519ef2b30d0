"""Pairs of texts joined as the tokenizer joins them; a text that stands in many pairs is tokenised once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import tokenizers

from poolhouse.errors import CheckpointError, InputTooLong, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.python_tokenizers import PythonTokenizer
from poolhouse.packing.tokens import Ids, Tokens

Encode = Callable[[Sequence[Prompt], Sequence[Limit]], list[Tokens | InvalidRequest]]
# Lengths of two texts and the room for both -> the lengths that they are cut to.
Shorten = Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """What a tokenizer puts around a text, or around and between two, and the token types that it gives.

    parts: ids before, between and after the texts; one array more than there are texts. part_types: a type for each.
    text_types: the type of each text's tokens.
    """

    parts: tuple[Ids, ...]
    part_types: tuple[Ids, ...]
    text_types: tuple[int, ...]

    @classmethod
    def of(cls, native: tokenizers.Tokenizer | PythonTokenizer, texts: int, special: bool = True) -> Template:
        """The template of a tokenizer for one text or two.

        It is what the post-processor puts around tokens of another tokenizer, which need no alphabet in common.

        Raises:
            CheckpointError: texts that are left out, doubled or turned round.
        """
        if isinstance(native, PythonTokenizer):
            ids, types, sides = native.around(texts, special)
        else:
            stand_in = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
            if native.post_processor is not None:
                stand_in.post_processor = native.post_processor
            encoding = stand_in.encode("x", "x" if texts == 2 else None, add_special_tokens=special)
            ids, types, sides = encoding.ids, encoding.type_ids, encoding.sequence_ids
        places = [place for place, side in enumerate(sides) if side is not None]
        if [sides[place] for place in places] != list(range(texts)):
            raise CheckpointError(
                "The tokenizer's post-processor does not give each text once and in order, which is not supported: "
                f"of {texts} texts it makes the order {[sides[place] for place in places]}."
            )
        bounds = list(pairwise([-1, *places, len(ids)]))
        return cls(
            tuple(np.array(ids[start + 1 : end], dtype=np.int64) for start, end in bounds),
            tuple(np.array(types[start + 1 : end], dtype=np.int64) for start, end in bounds),
            tuple(types[place] for place in places),
        )

    @property
    def head(self) -> Ids:
        """What stands before the first text."""
        return self.parts[0]

    @property
    def tail(self) -> Ids:
        """What stands after the last text."""
        return self.parts[-1]

    @cached_property
    def special_tokens(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def highest_type(self) -> int:
        return max((*self.text_types, *(int(types.max()) for types in self.part_types if len(types))))

    def without_types(self) -> Template:
        """The same with all types 0."""
        return replace(
            self, part_types=tuple(map(np.zeros_like, self.part_types)), text_types=(0,) * len(self.text_types)
        )

    def join(self, *texts: Ids) -> Ids:
        """Ids of the whole prompt."""
        return np.concatenate([part for pair in zip(self.parts, texts, strict=False) for part in pair] + [self.tail])

    def types(self, *lengths: int) -> Ids | None:
        """Token types of a prompt of texts of so many tokens; None where all are 0."""
        if not self.highest_type:
            return None
        types: list[Ids] = []
        for around, kind, length in zip(self.part_types, self.text_types, lengths, strict=False):
            types += [around, np.full(length, kind, dtype=np.int64)]
        return np.concatenate([*types, self.part_types[-1]])


def encode_pairs(
    encode: Encode,
    templates: tuple[Template, Template],
    shorten: Shorten,
    prompts: Sequence[Prompt],
    limits: Sequence[Limit],
) -> list[Tokens | InvalidRequest]:
    """Tokens of each pair, or the error that it alone gets.

    encode: the tokenizer's, for single texts. templates: without special tokens, and with them.
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
            template = templates[limit.add_special_tokens]
            results.append(_joined(encoded[first], encoded[second], template, shorten, limit))
        except InvalidRequest as error:
            results.append(error)
    return results


def _of_one_side(limit: Limit) -> Limit:
    """A side is cut only where the pair could not hold it anyway."""
    return Limit(limit.max_tokens + 1, keep=-1, side=limit.side, add_special_tokens=False, lower_case=limit.lower_case)


def _joined(
    first: Tokens | InvalidRequest,
    second: Tokens | InvalidRequest,
    template: Template,
    shorten: Shorten,
    limit: Limit,
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
    query = _cut(first.ids, limit.max_query_tokens, limit.side)
    document = _cut(second.ids, limit.max_document_tokens, limit.side)
    keep = limit.cut
    room = (limit.max_pass_tokens if keep is None else keep) - template.special_tokens
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
            most = shorten(len(query), len(document), room)
        query, document = (_cut(ids, size, limit.side) for ids, size in zip((query, document), most, strict=True))
    return Tokens(
        template.join(query, document),
        template.types(len(query), len(document)),
        original_tokens=first.original_tokens + second.original_tokens + template.special_tokens,
        original_is_estimate=first.original_is_estimate or second.original_is_estimate,
    )


def _cut(ids: Ids, size: int | None, side: str) -> Ids:
    if size is None or len(ids) <= size:
        return ids
    return ids[:size] if side == "right" else ids[len(ids) - size :]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths that fit, taken from the longer side first, as the tokenizers library does."""
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def longest_first_of_python(first: int, second: int, room: int) -> tuple[int, int]:
    """The same as transformers' Python tokenizers do it, where the other side may keep the odd token."""
    excess = max(first + second - room, 0)
    longer = min(abs(first - second), excess)
    lost = (excess - longer) // 2
    rest = excess - longer - lost
    if first > second:
        return first - longer - lost, second - rest
    return first - lost, second - longer - rest


def _too_long(first: Tokens, second: Tokens, limit: Limit, template: Template) -> InputTooLong:
    lengths = {
        "query": min(first.original_tokens, limit.max_query_tokens or first.original_tokens),
        "document": min(second.original_tokens, limit.max_document_tokens or second.original_tokens),
    }
    longer = max(lengths, key=lambda side: lengths[side])
    total = sum(lengths.values()) + template.special_tokens
    field = "max_tokens_per_query" if longer == "query" else "max_tokens_per_doc"
    return InputTooLong(
        f"This model's maximum context length is {limit.max_pass_tokens} tokens. However, your pair contains {total} input "
        f"tokens: the query has {lengths['query']}, the document {lengths['document']}, and "
        f"{template.special_tokens} are special. Shorten the {longer}, cut it with {field}, or cut the pair with "
        "truncate_prompt_tokens=-1.",
        "input_tokens",
        total,
    )
