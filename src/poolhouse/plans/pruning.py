"""Pruning: the score of a query and a document, and the sentences of the document that stay, from the same passes.

A model gives each token of the document a probability to be kept; the tokens of a sentence decide together. A document
that does not fit beside its query is read in windows that end with sentences, each beside the whole query:

    document    s1 s1 s1 s2 s2 s3 s3 s3 s3 s4
    window      [CLS] query [SEP] s1 s1 s1 s2 s2 [SEP]     a score, and a probability for each token
    window      [CLS] query [SEP] s3 s3 s3 s3 s4 [SEP]     the score of the pair is the best of these

Sources: Provence (Chirkova et al. 2025, arXiv 2501.16214), and hotchpotch/open_provence, whose rule for several windows
this is.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InputTooLong, InvalidRequest, UnsupportedTask
from poolhouse.inputs.limits import Limit, too_many_tokens
from poolhouse.inputs.offsets import anchors_of, white_space
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.sentences import Given, check_given, given_sentences, sentences
from poolhouse.outputs import Sentence
from poolhouse.packing.tokens import Flags, Ids, Tokens
from poolhouse.params import PoolingParams, PruningParams
from poolhouse.tasks import PruningHead
from poolhouse.vectors.entities import probabilities

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A pair's score and what is left of its document. answers: of its windows."""

    score: float
    answers: tuple[Answer, ...]
    text: str
    sentences: tuple[Sentence, ...]
    compression: float


@dataclass(frozen=True, slots=True, eq=False)
class PruningPlan:
    """Requests to run, and how their answers, in that order, become documents.

    pairs: for each request the number of its pair.
    """

    requests: list[Request]
    finish: Callable[[Sequence[Answer]], list[Pruned]]
    pairs: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Document:
    """A text, its tokens, and its sentences as ranges of characters and of tokens, [sentences, 2] both."""

    text: str
    ids: Ids
    characters: Ids
    ranges: Ids


def plain_query(query: str) -> str:
    """A query as Provence was trained on them: small letters, no punctuation, single blanks."""
    return " ".join(query.lower().translate(_PUNCTUATION).split())


def plan(
    engine: PoolingEngine,
    queries: Sequence[str],
    documents: Sequence[str],
    params: PoolingParams,
    pruning: PruningParams,
) -> PruningPlan:
    """Windows to run for these pairs, 1:N or N:N.

    Raises:
        UnsupportedTask: the model does not prune. InvalidRequest: texts or options that do not fit.
    """
    head = engine.facts.pruning
    if head is None:
        raise UnsupportedTask(
            f"{engine.facts.name} has no head for pruning, so prune is not possible; models that have one: Provence, "
            "XProvence, OpenProvence.",
            "prune",
        )
    limit = _limit(engine, params)
    if head.plain_query:
        queries = [plain_query(query) for query in queries]
    asked = _by_text(engine, queries, "data_1", offsets=False)
    own = [_cut(asked[query].ids, params.max_tokens_per_query, limit.side) for query in queries]
    own = own * len(documents) if len(own) == 1 else own
    read = _documents(engine, documents, pruning.sentences)
    params = params.for_pooler()
    requests: list[Request] = []
    pairs: list[int] = []
    offset = len(head.parts[0]) + len(head.parts[1])
    places: list[list[tuple[int, int]]] = []
    for index, (query, document) in enumerate(zip(own, read, strict=True)):
        room = _room(limit, head, query, document.ids, index)
        windows = list(_windows(document, room))
        for begin, end in windows:
            requests.append(_request(head, query, document.ids[begin:end], params))
        pairs += [index] * len(windows)
        places.append([(offset + len(query), offset + len(query) + end - begin) for begin, end in windows])

    def finish(answers: Sequence[Answer]) -> list[Pruned]:
        rest = iter(answers)
        default = "token_classify" in engine.facts.activated
        activated = default if params.use_activation is None else params.use_activation
        return [
            _pruned(document, [next(rest) for _ in bounds], bounds, head, pruning, activated)
            for document, bounds in zip(read, places, strict=True)
        ]

    return PruningPlan(requests, finish, pairs)


def _limit(engine: PoolingEngine, params: PoolingParams) -> Limit:
    """How long a window may be.

    Raises:
        InvalidRequest: a limit that would leave sentences unread.
    """
    if params.truncate_prompt_tokens not in (None, -1) or params.max_tokens_per_doc is not None:
        name = "truncate_prompt_tokens" if params.max_tokens_per_doc is None else "max_tokens_per_doc"
        raise InvalidRequest(
            f"{name} beside prune: documents are read whole, in windows where they are long; leave it out.", name
        )
    return engine.limit(params)


def _by_text(engine: PoolingEngine, texts: Sequence[str], parameter: str, offsets: bool) -> Mapping[str, Tokens]:
    """The tokens of each different text, without special tokens.

    Raises:
        InvalidRequest: naming the first text that has none.
    """
    different = list(dict.fromkeys(texts))
    requests = [
        Request(Prompt(text), "classify", prompt_name="", add_special_tokens=False, offsets=offsets)
        for text in different
    ]
    try:
        return dict(zip(different, engine.tokenize(requests), strict=True))
    except InvalidRequest:
        for request in requests:
            try:
                engine.tokenize([request])
            except InvalidRequest as error:
                assert request.prompt.text is not None
                place = texts.index(request.prompt.text)
                raise type(error)(f"{parameter}[{place}]: {error}", parameter, error.value) from None
        raise


def _documents(engine: PoolingEngine, texts: Sequence[str], given: Sequence[Given] | None) -> list[_Document]:
    """The documents and their sentences; equal ones are read once unless their sentences are given."""
    if given is not None:
        check_given(given, len(texts))
    tokens = _by_text(engine, texts, "data_2", offsets=True)
    known: dict[str, _Document] = {}
    found: list[_Document] = []
    for index, text in enumerate(texts):
        if given is not None:
            found.append(_document(text, tokens[text], given_sentences(text, given[index], index)))
            continue
        if text not in known:
            known[text] = _document(text, tokens[text], sentences(text))
        found.append(known[text])
    return found


def _document(text: str, tokens: Tokens, characters: Ids) -> _Document:
    """A token belongs to the sentence that its first character stands in."""
    if tokens.offsets is None:
        raise UnsupportedTask(
            "Pruning needs the offsets of tokens, which this model's tokenizer does not know.", "prune"
        )
    anchors = np.maximum.accumulate(anchors_of(text, tokens.offsets.bounds)) if len(tokens) else tokens.ids
    return _Document(text, tokens.ids, characters, np.searchsorted(anchors, characters).astype(np.int64))


def _cut(ids: Ids, most: int | None, side: str) -> Ids:
    if most is None or len(ids) <= most:
        return ids
    return ids[:most] if side == "right" else ids[-most:]


def _room(limit: Limit, head: PruningHead, query: Ids, document: Ids, index: int) -> int:
    """How many tokens of a document a window has beside the query.

    Raises:
        InputTooLong: none, or a document over the limit of whole prompts.
    """
    special = sum(map(len, head.parts))
    whole = special + len(query) + len(document)
    if limit.max_prompt_tokens is not None and whole > limit.max_prompt_tokens:
        raise too_many_tokens(limit.max_prompt_tokens, whole)
    room = limit.max_pass_tokens - special - len(query)
    if room < 1:
        raise InputTooLong(
            f"The query has {len(query)} tokens, which leaves no room for documents[{index}] within the model's "
            f"{limit.max_pass_tokens}, {special} of which are special. Shorten the query, or cut it with "
            "max_tokens_per_query.",
            "input_tokens",
            len(query),
        )
    return room


def _windows(document: _Document, room: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens: all at once where they fit, else as many sentences as fit; a longer sentence is divided."""
    count, begin = len(document.ids), 0
    bounds = document.ranges[:, 0]
    while count - begin > room:
        last = int(np.searchsorted(bounds, begin + room, "right")) - 1
        end = int(bounds[last]) if last >= 0 else 0
        end = end if end > begin else begin + room
        yield begin, end
        begin = end
    yield begin, count


def _request(head: PruningHead, query: Ids, document: Ids, params: PoolingParams) -> Request:
    before, between, behind = (np.array(part, dtype=np.int64) for part in head.parts)
    ids = np.concatenate((before, query, between, document, behind))
    return Request(Prompt(None, ids), "classify", params, prompt_name="", further=("token_classify",))


def _pruned(
    document: _Document,
    answers: Sequence[Answer],
    bounds: Sequence[tuple[int, int]],
    head: PruningHead,
    pruning: PruningParams,
    activated: bool,
) -> Pruned:
    """The document of these windows. bounds: where it stands in each. activated: rows are probabilities, no logits."""
    rows = [answer.further["token_classify"][begin:end] for answer, (begin, end) in zip(answers, bounds, strict=True)]
    labels = np.concatenate(rows)
    keep = (labels if activated or not len(labels) else probabilities(labels))[:, 1]
    threshold = head.threshold if pruning.threshold is None else pruning.threshold
    means = _means(keep, document.ranges)
    votes = (pruning.rule or head.rule) == "votes"
    kept = (_means(keep > threshold, document.ranges) if votes else means) > threshold
    if pruning.keep_first and kept.any():
        kept[0] = True
    text = _kept_text(document, kept)
    parts = zip(document.characters.tolist(), means.tolist(), kept.tolist(), strict=True)
    return Pruned(
        max(float(answer.array[0]) for answer in answers),
        tuple(answers),
        text,
        tuple(Sentence(start, end, mean, stays) for (start, end), mean, stays in parts),
        1 - len(text) / len(document.text) if document.text else 0.0,
    )


def _means(values: npt.NDArray[Any], ranges: Ids) -> npt.NDArray[np.float64]:
    """[sentences]: the mean over each range; 0 for one without tokens."""
    sums = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    first, last = ranges.T
    means: npt.NDArray[np.float64] = (sums[last] - sums[first]) / np.maximum(last - first, 1)
    return means


def _kept_text(document: _Document, kept: Flags) -> str:
    """The sentences that stay, each with the white space behind it."""
    text, (starts, ends) = document.text, document.characters.T
    solid = np.append(np.flatnonzero(~white_space(text)), len(text))
    following = np.append(starts[1:], len(text))
    behind = np.minimum(solid[np.searchsorted(solid, ends)], following)
    return "".join(text[start:end] for start, end in zip(starts[kept].tolist(), behind[kept].tolist(), strict=True))
