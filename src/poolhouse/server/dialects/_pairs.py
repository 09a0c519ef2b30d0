"""Pairs: queries and documents in, scores and their order out, for every route that scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import numpy as np

from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.content import TextOrContent
from poolhouse.plans import scoring
from poolhouse.server.call import Call
from poolhouse.server.dialects._fields import with_options
from poolhouse.server.wire.contract import Pruned, SentenceReply

# Texts of more characters are planned, and vectors of more numbers compared, beside the event loop.
_MANY_CHARACTERS = 200_000
_MANY_NUMBERS = 200_000


@dataclass(frozen=True, slots=True)
class Pairs:
    """The queries and documents to score, 1:1, 1:N or N:N, and what the caller calls them, for messages."""

    queries: Sequence[TextOrContent]
    documents: Sequence[TextOrContent]
    names: tuple[str, str] = ("query", "documents")

    def location(self, requests: int, windows: Sequence[int] | None = None) -> Callable[[int], str]:
        """Where the text of a request stands in the body; where each text has a request, documents come last.

        windows: the pair of each request, where a pair may have several.
        """
        if windows is not None:
            return lambda index: f"{self.names[1]}[{windows[index]}]"
        queries = requests - len(self.documents)
        query, documents = self.names
        if queries < 0:
            return lambda _: documents
        return lambda index: query if index < queries else f"{documents}[{index - queries}]"

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """An error of the plan, which speaks of data_1 and data_2, with the caller's names."""
        named = dict(zip(("data_1", "data_2"), self.names, strict=True)).get(error.parameter or "", error.parameter)
        text = str(error).replace(f"{error.parameter}[", f"{named}[", 1)
        return type(error)(text, named, error.value)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A score per pair, in order, and every answer that they were made of, each once."""

    scores: list[scoring.Score]
    answers: list[Answer]

    def ranked(self, top_n: int | None = None) -> list[int]:
        """Indices of the best scores, best first, equal ones in order; None or 0 gives all."""
        order = np.argsort([-score.score for score in self.scores], kind="stable")
        return [int(index) for index in order[: top_n or None]]

    def best(self, top_n: int | None = None) -> list[tuple[int, float]]:
        """`ranked`, each index with its score."""
        return [(index, self.scores[index].score) for index in self.ranked(top_n)]


def pruned(score: scoring.Score) -> Pruned:
    """The fields of a document that was pruned; none of others."""
    found = score.pruned
    if found is None:
        return {}
    sentences = [cast("SentenceReply", asdict(sentence)) for sentence in found.sentences]
    return {"pruned_text": found.text, "compression": found.compression, "sentences": sentences}


async def score(
    call: Call,
    pairs: Pairs,
    options: scoring.ScoreOptions,
    *,
    adapter: str | None = None,
    priority: int = 0,
    processor_options: Mapping[str, object] | None = None,
) -> Scored:
    """The score of each pair. processor_options: how large pictures are read.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.plans.scoring.plan`. Otherwise see `Call.answers`.
    """
    engine, queries, documents = call.engine, pairs.queries, pairs.documents
    call.engines.check_items(len(documents), pairs.names[1])
    many = sum(len(document) for document in documents if isinstance(document, str)) > _MANY_CHARACTERS
    try:
        if many or engine.facts.listwise is not None or options.prune is not None:
            plan = await asyncio.to_thread(scoring.plan, engine, queries, documents, options)
        else:
            plan = scoring.plan(engine, queries, documents, options)
    except InvalidRequest as error:
        raise pairs.renamed(error) from None
    requests = [
        replace(
            request,
            prompt=with_options(request.prompt, processor_options or {}),
            adapter=adapter,
            priority=priority,
        )
        for request in plan.requests
    ]
    answers = await call.answers(requests, pairs.location(len(requests), plan.pairs))
    if options.prune is not None or sum(answer.array.size for answer in answers) > _MANY_NUMBERS:
        scores = await asyncio.to_thread(plan.finish, answers)
    else:
        scores = plan.finish(answers)
    return Scored(scores, answers)
