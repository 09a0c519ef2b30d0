"""Pairs: two texts joined as the tokenizer joins them; a text of many pairs is tokenised once."""

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
# (tokens of the first text, of the second, room for both) -> the lengths that they are cut to.
Shorten = Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """The special tokens around a text, or around and between two texts, and token types.

    parts: ids before, between and after the texts; one array more than texts. part_types: a type for each of these ids.
    text_types: the type of each text's tokens.
    """

    parts: tuple[Ids, ...]
    part_types: tuple[Ids, ...]
    text_types: tuple[int, ...]

    @classmethod
    def of(cls, native: tokenizers.Tokenizer | PythonTokenizer, texts: int, special: bool = True) -> Template:
        """The template of a tokenizer for one text or two.

        The post-processor is asked for what it puts around texts of one token each. These are tokens of a stand-in, so it
        does not matter what the tokenizer's own vocabulary is.

        Raises:
            CheckpointError: a post-processor that leaves out, repeats or reorders texts.
        """
        if isinstance(native, PythonTokenizer):
            ids, types, owners = native.around(texts, special)
        else:
            stand_in = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
            if native.post_processor is not None:
                stand_in.post_processor = native.post_processor
            encoding = stand_in.encode("x", "x" if texts == 2 else None, add_special_tokens=special)
            ids, types, owners = encoding.ids, encoding.type_ids, encoding.sequence_ids
        indices = [index for index, owner in enumerate(owners) if owner is not None]
        order = [owners[index] for index in indices]
        if order != list(range(texts)):
            raise CheckpointError(
                "The tokenizer's post-processor does not give each text once and in order, which is not supported: "
                f"of {texts} texts it makes the order {order}."
            )
        bounds = list(pairwise([-1, *indices, len(ids)]))
        return cls(
            tuple(np.array(ids[start + 1 : end], dtype=np.int64) for start, end in bounds),
            tuple(np.array(types[start + 1 : end], dtype=np.int64) for start, end in bounds),
            tuple(types[index] for index in indices),
        )

    @property
    def head(self) -> Ids:
        """Special tokens before the first text."""
        return self.parts[0]

    @property
    def tail(self) -> Ids:
        """Special tokens after the last text."""
        return self.parts[-1]

    @property
    def around(self) -> set[int]:
        """The special tokens that there are."""
        return {token for part in self.parts for token in part.tolist()}

    @cached_property
    def special_tokens(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.parts))

    @cached_property
    def highest_type(self) -> int:
        """The largest token type."""
        return max((*self.text_types, *(int(types.max()) for types in self.part_types if len(types))))

    def without_types(self) -> Template:
        """The same with all types 0."""
        return replace(
            self, part_types=tuple(map(np.zeros_like, self.part_types)), text_types=(0,) * len(self.text_types)
        )

    def of_pairs(self) -> Template:
        """A template of one text as one of two, with what stands behind the text between them too, and no types."""
        parts = (self.head, self.tail, self.tail)
        return Template(parts, tuple(map(np.zeros_like, parts)), (0, 0))

    def join(self, *texts: Ids) -> Ids:
        """Ids of the whole prompt."""
        return np.concatenate([part for pair in zip(self.parts, texts, strict=False) for part in pair] + [self.tail])

    def types(self, *lengths: int) -> Ids | None:
        """Token types of a prompt with texts of so many tokens; None where all are 0."""
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
    """Tokens of each pair, or an error for it alone.

    encode: tokenises single texts. templates: without special tokens, and with them.
    """
    # Each different text with its prefix and limit, and its index; then the two indices of each pair.
    texts: dict[tuple[str, str, Limit], int] = {}
    indices: list[tuple[int, int]] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        assert prompt.text is not None
        assert prompt.pair is not None
        alone = _limit_of_one(limit)
        first = texts.setdefault((prompt.text, prompt.prefix, alone), len(texts))
        indices.append((first, texts.setdefault((prompt.pair, "", alone), len(texts))))
    encoded = encode([Prompt(text, None, prefix) for text, prefix, _ in texts], [limit for _, _, limit in texts])
    results: list[Tokens | InvalidRequest] = []
    for (first, second), limit in zip(indices, limits, strict=True):
        try:
            template = templates[limit.add_special_tokens]
            results.append(_joined(encoded[first], encoded[second], template, shorten, limit))
        except InvalidRequest as error:
            results.append(error)
    return results


def _limit_of_one(limit: Limit) -> Limit:
    """The limit of one text of a pair: it is cut only where the pair could not hold all of it anyway."""
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
        InvalidRequest: an invalid text. InputTooLong: naming how long each text is.
    """
    for tokens in (first, second):
        if isinstance(tokens, InvalidRequest):
            raise tokens
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
            # Where documents have a limit, the query stays whole, as in vLLM.
            sizes = len(query), room - len(query)
        else:
            sizes = shorten(len(query), len(document), room)
        query, document = (_cut(ids, size, limit.side) for ids, size in zip((query, document), sizes, strict=True))
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
    """Lengths that fit: the longer text is cut first, as in the tokenizers library."""
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def longest_first_of_python(first: int, second: int, room: int) -> tuple[int, int]:
    """The same as in transformers' Python tokenizers, where the other text may keep the odd token."""
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
    longer = max(lengths, key=lambda name: lengths[name])
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
