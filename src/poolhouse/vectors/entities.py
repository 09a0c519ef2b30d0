"""Entities: labelled parts of a text, from the label probabilities of its tokens, or from scored spans of its words.

Source of the strategies for tokens: transformers' token-classification pipeline. Labels, scores and offsets are the same, except
that white space at the ends of an entity is left out, and so are entities of white space alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.outputs import Array, Entity
from poolhouse.packing.tokens import Ids, Offsets

Strategy = Literal["none", "simple", "first", "average", "max"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Consecutive tokens or words: index of the likeliest label, its score, first character and the one after the last."""

    label: Ids
    score: Array
    start: Ids
    end: Ids


def parse_strategy(name: str) -> Strategy:
    """The strategy of that name; raises InvalidRequest where there is none."""
    for strategy in STRATEGIES:
        if name == strategy:
            return strategy
    raise InvalidRequest(
        f"Unknown aggregation_strategy: {name!r}. Strategies: {list(STRATEGIES)}.{did_you_mean(str(name), STRATEGIES)}",
        "aggregation_strategy",
        name,
    )


def entities(
    text: str,
    scores: Array,
    offsets: Offsets,
    labels: Mapping[int, str],
    strategy: Strategy = "simple",
    ignored: Collection[str] = ("O",),
) -> list[Entity]:
    """The entities of a text, in order; labels in `ignored` are left out.

    none: every token by itself. simple: neighbours of one label. first, average, max: the parts of a word agree first, on
    the label of its first token, of the mean, or of its surest token.

    scores: [tokens, labels] probabilities. offsets: of the same tokens. labels: names; "LABEL_3" where there is none.
    """
    content = offsets.words >= 0
    if not content.any():
        return []
    names = [labels.get(index, f"LABEL_{index}") for index in range(scores.shape[1])]
    parts = _parts(scores[content], offsets.bounds[content], offsets.words[content], strategy)
    if strategy != "none":
        parts = _grouped(parts, names)
        names = [name.split("-", 1)[-1] for name in names]
    ignored_labels = [index for index, name in enumerate(names) if name in ignored]
    kept = np.flatnonzero(~np.isin(parts.label, ignored_labels))
    found = (_entity(text, names, parts, index) for index in kept.tolist())
    return [entity for entity in found if entity.text]


def probabilities(logits: Array) -> Array:
    """The softmax of each row."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


def _parts(scores: Array, offsets: Ids, words: Ids, strategy: Strategy) -> _Parts:
    """A part per token, or per word."""
    if strategy in ("none", "simple"):
        return _Parts(scores.argmax(axis=1), scores.max(axis=1), offsets[:, 0], offsets[:, 1])
    first = np.flatnonzero(np.diff(words, prepend=-1))
    last = np.append(first[1:], len(words)) - 1
    if strategy == "first":
        scores = scores[first]
    elif strategy == "average":
        scores = _means(scores, first, last)
    else:
        scores = scores[_surest(scores.max(axis=1), first, last)]
    return _Parts(scores.argmax(axis=1), scores.max(axis=1), offsets[first, 0], offsets[last, 1])


def _surest(best: Array, first: Ids, last: Ids) -> Ids:
    """The token of each word with the largest score, the first of equals. best: [tokens]."""
    largest = np.repeat(np.maximum.reduceat(best, first), last - first + 1)
    tokens = np.where(best == largest, np.arange(len(best)), len(best))
    return np.minimum.reduceat(tokens, first)


def _means(values: Array, first: Ids, last: Ids) -> Array:
    """The mean of each run of rows."""
    sums: Array = np.add.reduceat(values, first, axis=0)
    return sums / (last - first + 1).astype(np.float32)[:, None]


def _grouped(parts: _Parts, names: list[str]) -> _Parts:
    """Neighbours of one label as one part; a B- label always begins one."""
    tags = [name[2:] if name.startswith(("B-", "I-")) else name for name in names]
    tag = np.unique(tags, return_inverse=True)[1][parts.label]
    opens: npt.NDArray[np.bool_] = np.array([name.startswith("B-") for name in names])[parts.label]
    first = np.flatnonzero(opens | (np.diff(tag, prepend=-1) != 0))
    last = np.append(first[1:], len(tag)) - 1
    score = _means(parts.score[:, None], first, last)[:, 0]
    return _Parts(parts.label[first], score, parts.start[first], parts.end[last])


def _entity(text: str, names: list[str], parts: _Parts, index: int) -> Entity:
    start, end = int(parts.start[index]), int(parts.end[index])
    found = text[start:end]
    start += len(found) - len(found.lstrip())
    found = found.strip()
    return Entity(names[parts.label[index]], float(parts.score[index]), start, start + len(found), found)


def fitting(found: Array, flat: bool, multi_label: bool, apart: bool = False) -> Ids:
    """The numbers of the found spans that fit together, by their first words.

    The best goes first, and what does not fit to those before it is left out (GLiNER, Zaratiana et al. 2024):

        text      The Bank of England raised rates
        found         [Bank of England]  organisation .9
                              [England]  place        .7
                  [The Bank]             organisation .6
        flat          [Bank of England]                       nothing overlaps
        else          [Bank of England], [England]            one may lie within another

    found: [found, 4], each one's first and last word, the number of its label, its score. Windows may find a span twice.
    flat, multi_label: see `poolhouse.inputs.labels.Labels`. apart: whether only spans of one label must fit together.
    """
    best = np.argsort(-found[:, 3], kind="stable")
    first, last, label = found[best, :3].astype(np.int64).T
    # What two windows found counts once, with the higher score.
    place = (first * (last.max(initial=0) + 1) + last) * (label.max(initial=0) + 1) + label
    once = np.sort(np.unique(place, return_index=True)[1])
    best, first, last = best[once], first[once], last[once]
    if apart:
        # The words of each label lie behind those of the label before.
        moved = label[once] * (last.max(initial=0) + 1)
        first, last = first + moved, last + moved
    pick = _flat if flat else _nested
    kept = best[np.fromiter(pick(first.tolist(), last.tolist(), multi_label), np.int64)]
    ordered: Ids = kept[np.argsort(found[kept, 0], kind="stable")]
    return ordered


def _flat(first: list[int], last: list[int], multi_label: bool) -> Iterator[int]:
    """The numbers of spans that overlap no better one. first, last: of the best span first."""
    taken = bytearray(max(last, default=-1) + 1)
    whole: set[tuple[int, int]] = set()
    for number, (begin, end) in enumerate(zip(first, last, strict=True)):
        if taken.find(1, begin, end + 1) < 0:
            taken[begin : end + 1] = b"\1" * (end + 1 - begin)
            whole.add((begin, end))
        elif not multi_label or (begin, end) not in whole:
            continue
        yield number


def _nested(first: list[int], last: list[int], multi_label: bool) -> Iterator[int]:
    """The numbers of spans that cross no better one: of two, one may lie within the other."""
    words = max(last, default=-1) + 1
    # Of what was chosen: the furthest end of what begins at a word, and the nearest begin of what ends there.
    ends, begins = [-1] * words, [words] * words
    whole: set[tuple[int, int]] = set()
    for number, (begin, end) in enumerate(zip(first, last, strict=True)):
        if (begin, end) in whole:
            if multi_label:
                yield number
            continue
        if max(ends[begin + 1 : end + 1], default=-1) > end or min(begins[begin:end], default=words) < begin:
            continue
        whole.add((begin, end))
        ends[begin], begins[end] = max(ends[begin], end), min(begins[end], begin)
        yield number
