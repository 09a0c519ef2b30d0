"""Late chunking: the whole text is read in one pass, then each chunk is the mean of its tokens' vectors.

So every chunk knows its context. Source: Günther et al. 2024, "Late Chunking"; texts over the model's limit are read in
windows, the paper's "long late chunking":

    tokens   [CLS] prefix | 1 1 1 2 2 3 3 3 3 4 4 | [SEP]   numbers: chunks
    window   [CLS] prefix | 1 1 1 2 2 3 3 3 3     | [SEP]   embeds the chunks 1, 2 and 3
    window   [CLS] prefix |     1 2 2 3 3 3 3 4 4 | [SEP]   embeds the chunk 4; what is before it is its context
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.offsets import anchors_of
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import Array, EmbeddedChunk, LateChunk, LateChunkingMetadata
from poolhouse.packing.tokens import Ids, Tokens
from poolhouse.params import LateChunkingParams

# The characters of a chunk: the first, and the one after the last.
Span = Sequence[int]


@dataclass(frozen=True, slots=True)
class Chunking:
    """Where to cut, in one of three ways, and how windows overlap.

    size: tokens of a chunk. spans: per text, (start, end) characters of each chunk.
    separator: a text or pattern that stands between chunks.
    overlap: tokens before a window's first chunk that are read again as its context; None: an eighth of the limit.
    """

    size: int | None = None
    spans: Sequence[Sequence[Span]] | None = None
    separator: str | re.Pattern[str] | None = None
    overlap: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chunked:
    """A text's chunks; tokens: of the whole text. windows: in how many passes it was read."""

    chunks: list[EmbeddedChunk]
    tokens: Tokens
    windows: int


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPlan:
    """Requests to run, and how their answers, in that order, become chunks per text."""

    requests: list[Request]
    finish: Callable[[Sequence[Answer]], list[Chunked]]


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """A text cut up: chunks as ranges of characters and of content tokens, and the windows that hold them."""

    text: str
    tokens: Tokens
    characters: list[tuple[int, int]]
    ranges: list[tuple[int, int]]
    windows: list[Request]


def plan(engine: PoolingEngine, requests: Sequence[Request], chunking: Chunking) -> ChunkPlan:
    """Windows to run for these texts, each an `embed` request for a text.

    Raises:
        InvalidRequest: a chunk without tokens or longer than the model reads at once; ids instead of texts.
    """
    _check(chunking, len(requests))
    all_tokens = engine.tokenize([replace(request, offsets=True) for request in requests])
    cuts = [
        _cut(request, tokens, chunking, index, engine.facts.max_tokens)
        for index, (request, tokens) in enumerate(zip(requests, all_tokens, strict=True))
    ]

    def finish(answers: Sequence[Answer]) -> list[Chunked]:
        rows: Iterator[Array] = (row for answer in answers for row in answer.array)
        return [Chunked(list(_chunks(cut, rows)), cut.tokens, len(cut.windows)) for cut in cuts]

    return ChunkPlan([window for cut in cuts for window in cut.windows], finish)


def fixed_chunks(params: LateChunkingParams, tokens: Tokens) -> LateChunkingMetadata:
    """What each row of an answer to these parameters stands for; the tokens know their offsets."""
    assert tokens.offsets is not None
    spans = params.spans(len(tokens))
    starts, ends = tokens.offsets.bounds.T
    # Special tokens and those of a prefix stand nowhere in the text.
    anywhere = ends > starts
    first = np.minimum.reduceat(np.where(anywhere, starts, np.iinfo(np.int64).max), spans[:, 0])
    last = np.maximum.reduceat(np.where(anywhere, ends, 0), spans[:, 0])
    parts = zip(map(tuple, spans.tolist()), first.tolist(), last.tolist(), strict=True)
    chunks = [LateChunk(span, (start, end) if end else None) for span, start, end in parts]
    return LateChunkingMetadata(params.chunk_size, len(tokens), chunks)


def _chunks(cut: _Cut, rows: Iterator[Array]) -> Iterator[EmbeddedChunk]:
    for (start, end), (first, last) in zip(cut.characters, cut.ranges, strict=True):
        yield EmbeddedChunk(next(rows), cut.text[start:end], start, end, last - first)


def _cut(request: Request, tokens: Tokens, chunking: Chunking, index: int, limit: int) -> _Cut:
    text = request.prompt.text
    assert text is not None
    assert tokens.offsets is not None
    content = np.flatnonzero(tokens.offsets.words >= 0)
    if not len(content):
        return _Cut(text, tokens, [], [], [])
    offsets = tokens.offsets.bounds[content]
    anchors = anchors_of(text, offsets)
    if chunking.size is not None:
        bounds = _bounds(anchors, chunking.size)
        ranges = list(pairwise(bounds))
        characters = [(int(anchors[first]), int(offsets[last - 1, 1])) for first, last in ranges]
    else:
        spans = _separated(text, chunking.separator) if chunking.spans is None else chunking.spans[index]
        characters = [_checked(span, text, index) for span in spans]
        ranges = [_range(span, anchors, text) for span in characters]
    windows = list(_windows(request, tokens.ids, content, ranges, limit, chunking.overlap))
    return _Cut(text, tokens, characters, ranges, windows)


def _windows(
    request: Request, ids: Ids, content: Ids, ranges: list[tuple[int, int]], limit: int, overlap: int | None
) -> Iterator[Request]:
    """The whole text where it fits, else windows of whole chunks; each has the special tokens and prefix of the text."""
    lead, tail = ids[: content[0]], ids[content[-1] + 1 :]
    inner = ids[content[0] : content[-1] + 1]
    room = limit - len(lead) - len(tail)
    overlap = limit // 8 if overlap is None else overlap
    for first, last in ranges:
        if last - first > room:
            raise InvalidRequest(
                f"A chunk has {last - first} tokens, but the model reads at most {room} at once beside special tokens; "
                "make chunks smaller.",
                "chunks",
                last - first,
            )
    taken = 0
    while taken < len(ranges):
        first, last = ranges[taken]
        base = min(max(0, first - overlap, last - room), max(0, len(inner) - room))
        fits = taken
        while fits < len(ranges) and base <= ranges[fits][0] and ranges[fits][1] <= base + room:
            fits += 1
        spans = np.array(ranges[taken:fits], dtype=np.int64) - base + len(lead)
        window = np.concatenate((lead, inner[base : base + room], tail))
        # The text is cut already, and ids carry their prefix.
        yield Request(Prompt(None, window), request.task, request.params.for_pooler(), "", spans=spans)
        taken = fits


def _bounds(anchors: Ids, size: int) -> list[int]:
    """Bounds of chunks of at most `size` tokens, none within a character that has several tokens."""
    whole = np.append(np.flatnonzero(np.diff(anchors, prepend=-1)), len(anchors))
    bounds = [0]
    while bounds[-1] < len(anchors):
        last = int(whole[np.searchsorted(whole, bounds[-1] + size, "right") - 1])
        bounds.append(last if last > bounds[-1] else min(bounds[-1] + size, len(anchors)))
    return bounds


def _range(span: tuple[int, int], anchors: Ids, text: str) -> tuple[int, int]:
    """The tokens that begin within a span of characters."""
    first, last = np.searchsorted(anchors, span).tolist()
    if first == last:
        raise InvalidRequest(f"The chunk {span} ({text[slice(*span)]!r}) holds no token.", "chunks")
    return first, last


def _separated(text: str, separator: str | re.Pattern[str] | None) -> list[tuple[int, int]]:
    """What stands between separators, without what is blank."""
    pattern = separator if isinstance(separator, re.Pattern) else re.compile(re.escape(separator or ""))
    bounds = [0, *(bound for found in pattern.finditer(text) for bound in found.span()), len(text)]
    spans = zip(bounds[::2], bounds[1::2], strict=True)
    return [(start, end) for start, end in spans if text[start:end].strip()]


def _checked(span: Span, text: str, index: int) -> tuple[int, int]:
    try:
        start, end = map(int, span)
    except (TypeError, ValueError):
        start, end = -1, -1
    if not 0 <= start < end <= len(text):
        raise InvalidRequest(
            f"chunks[{index}] holds {span!r}; a chunk is (start, end) with 0 <= start < end <= {len(text)}, the characters "
            "of its text.",
            "chunks",
        )
    return start, end


def _check(chunking: Chunking, texts: int) -> None:
    ways = (chunking.size, chunking.spans, chunking.separator)
    if sum(way is not None for way in ways) != 1:
        raise InvalidRequest("Give one of chunk_size, chunks and separator.", "chunk_size")
    if chunking.size is not None and chunking.size < 1:
        raise InvalidRequest(f"chunk_size must be at least 1, got {chunking.size}.", "chunk_size", chunking.size)
    if chunking.spans is not None and len(chunking.spans) != texts:
        raise InvalidRequest(f"chunks has {len(chunking.spans)} lists for {texts} texts; give one per text.", "chunks")
    if chunking.separator == "":
        raise InvalidRequest("separator must not be empty.", "separator")
    if chunking.overlap is not None and chunking.overlap < 0:
        raise InvalidRequest(f"overlap must not be negative, got {chunking.overlap}.", "overlap", chunking.overlap)
