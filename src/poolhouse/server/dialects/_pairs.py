"""What routes that score pairs share: texts in, scores and their order out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from fastapi import Request

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.plans import scoring
from poolhouse.server.engines import Serving

# Texts of more characters are planned, and vectors of more numbers compared, beside the event loop.
_MANY_CHARACTERS = 200_000
_MANY_NUMBERS = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A score per pair, in order, and every answer that they were made of, each once."""

    scores: list[scoring.Score]
    answers: list[Answer]

    def ranked(self, top_n: int | None = None) -> list[int]:
        """Places of the best scores, best first, equal ones in order; None or 0 gives all."""
        order = np.argsort([-score.score for score in self.scores], kind="stable")
        return [int(place) for place in order[: top_n or None]]


@dataclass(frozen=True, slots=True)
class Sides:
    """Queries and documents, and what the caller calls them, for messages."""

    queries: Sequence[str]
    documents: Sequence[str]
    names: tuple[str, str] = ("query", "documents")

    def place(self, requests: int) -> Callable[[int], str]:
        """Where the text of a request stands: requests of documents come last, where each text has its own."""
        lead = requests - len(self.documents)
        query, documents = self.names
        if lead < 0:
            return lambda _: documents
        return lambda index: query if index < lead else f"{documents}[{index - lead}]"

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """An error of the plan, which speaks of data_1 and data_2, in the caller's words."""
        named = dict(zip(("data_1", "data_2"), self.names, strict=True)).get(error.parameter or "", error.parameter)
        return type(error)(str(error), named, error.value)


async def score(
    serving: Serving,
    http: Request,
    engine: PoolingEngine,
    sides: Sides,
    asked: scoring.Asked,
    *,
    adapter: str | None = None,
    priority: int = 0,
) -> Scored:
    """Scores of these pairs, 1:1, 1:N or N:N.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.plans.scoring.plan`. Otherwise see `Serving.answers`.
    """
    queries, documents = sides.queries, sides.documents
    serving.check_items(len(documents), sides.names[1])
    many = sum(map(len, documents)) > _MANY_CHARACTERS
    try:
        if many or engine.facts.listwise is not None:
            plan = await asyncio.to_thread(scoring.plan, engine, queries, documents, asked)
        else:
            plan = scoring.plan(engine, queries, documents, asked)
    except InvalidRequest as error:
        raise sides.renamed(error) from None
    requests = [replace(request, adapter=adapter, priority=priority) for request in plan.requests]
    answers = await serving.answers(http, engine, requests, sides.place(len(requests)))
    if sum(answer.array.size for answer in answers) > _MANY_NUMBERS:
        scores = await asyncio.to_thread(plan.finish, answers)
    else:
        scores = plan.finish(answers)
    return Scored(scores, answers)
