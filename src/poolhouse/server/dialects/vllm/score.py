"""vLLM's /score and /rerank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field, StrictFloat

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import parse_texts
from poolhouse.inputs.templates.score import score_template
from poolhouse.plans import scoring
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import Common, Many, body_schema, check_chat_template
from poolhouse.server.dialects._pairs import Scored, Sides, score
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router

_SIDE = "A text, {text}, {content: [text parts]}, or a list of them."
# Each spelling of the two sides; the first is vLLM's latest.
SPELLINGS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


class PairFields(Common):
    """What /score and /rerank have in common."""

    max_tokens_per_query: int = Field(0, ge=0, description="Cut queries to this many tokens; 0 does not.")
    max_tokens_per_doc: int = Field(0, ge=0, description="Cut documents to this many tokens; 0 does not.")
    instruction: str | None = Field(None, description="What makes a document fit, for models that read one.")
    chat_template: str | None = Field(None, description="Refused unless --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = None
    mode: str | None = Field(
        None,
        description="Which answers are compared: dense, sparse, colbert, or several (weighted); none: the model's.",
    )
    weights: Many[StrictFloat] | None = Field(
        None, description="Of the dense, sparse and colbert scores in such a mode."
    )

    def asked(self, serving: Serving) -> scoring.Asked:
        """What is asked beside the texts.

        Raises:
            InvalidRequest: naming the field.
        """
        check_chat_template(serving, self.chat_template)
        params = self.params(
            max_tokens_per_query=self.max_tokens_per_query or None, max_tokens_per_doc=self.max_tokens_per_doc or None
        )
        template = None if self.chat_template is None else score_template(self.chat_template)
        weights = None if self.weights is None else tuple(self.weights)
        variables = self.chat_template_kwargs or {}
        return scoring.Asked(params, self.instruction, template, variables, self.mode, weights)

    def refuse_limits_beyond(self, most: int) -> None:
        """Raise InvalidRequest for a side's limit that is none, since the model reads no more than `most` tokens."""
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if getattr(self, name) >= most:
                raise InvalidRequest(
                    f"{name} must be below the model's limit of {most} tokens, got {getattr(self, name)}.",
                    name,
                    getattr(self, name),
                )


class ScoreFields(PairFields):
    """The body of POST /score; one pair of sides, in any of four spellings."""

    queries: Any = Field(None, description=_SIDE)
    documents: Any = Field(None, description=_SIDE)
    items: Any = Field(None, description="Another word for documents.")
    data_1: Any = Field(None, description="Another word for queries.")
    data_2: Any = Field(None, description="Another word for documents.")
    text_1: Any = Field(None, description="Another word for queries.")
    text_2: Any = Field(None, description="Another word for documents.")

    def sides(self) -> Sides:
        """The two sides, under the names that they came by.

        Raises:
            InvalidRequest: not one spelling, or no texts.
        """
        given = [pair for pair in SPELLINGS if all(getattr(self, name) is not None for name in pair)]
        if len(given) != 1:
            ways = ", ".join(" and ".join(pair) for pair in SPELLINGS)
            raise InvalidRequest(f"Give the two sides to score in one way: {ways}.", "queries")
        ours, theirs = given[0]
        return Sides(parse_texts(getattr(self, ours), ours), parse_texts(getattr(self, theirs), theirs), (ours, theirs))


class RerankFields(PairFields):
    """The body of POST /rerank."""

    query: Any = Field(description="A text, {text}, or {content: [text parts]}.")
    documents: Any = Field(description=_SIDE)
    top_n: int = Field(0, ge=0, description="How many of the best to give; 0 gives all.")
    return_documents: bool = Field(True, description="Whether results hold their documents.")

    def cut_to(self, most: int) -> None:
        """Take a limit beyond what the model reads for that: Cohere's clients send 4096, and want documents cut."""
        if self.max_tokens_per_doc >= most and self.truncate_prompt_tokens is None:
            self.truncate_prompt_tokens = -1
        self.max_tokens_per_doc = min(self.max_tokens_per_doc, most)
        self.max_tokens_per_query = min(self.max_tokens_per_query, most)

    def sides(self) -> Sides:
        """The query, and the documents.

        Raises:
            InvalidRequest: naming the field.
        """
        if isinstance(self.query, list):
            raise InvalidRequest("query must be one text; /score takes several.", "query")
        return Sides(parse_texts(self.query, "query"), parse_texts(self.documents, "documents"))


def router(serving: Serving) -> APIRouter:
    routes = direct_router("scores")

    @routes.post("/score", openapi_extra=body_schema(ScoreFields))
    @routes.post("/v1/score", include_in_schema=False)
    async def score_pairs(http: Request) -> Response:
        """A score per pair: one query with one or many documents, or as many queries as documents."""
        return await answer_score(serving, http, await serving.read(http, ScoreFields))

    return routes


async def answer_score(serving: Serving, http: Request, fields: ScoreFields) -> Response:
    """The reply to a body of /score."""
    engine = serving.engine(fields.model)
    fields.refuse_limits_beyond(engine.facts.max_tokens)
    sides, asked = fields.sides(), fields.asked(serving)
    scored = await score(serving, http, engine, sides, asked, adapter=fields.adapter, priority=fields.priority)
    body = {
        **_replies.head("score", http, fields.request_id, engine.facts.name),
        "data": [
            {"index": index, "object": "score", "score": one.score} | _replies.cut_of_pair(one.answers)
            for index, one in enumerate(scored.scores)
        ],
        "usage": _replies.usage(scored.answers),
    }
    return await _replies.write(serving, lambda: orjson.dumps(body), scored.answers)


async def answer_rerank(
    serving: Serving, http: Request, fields: RerankFields, more: Callable[[Scored], dict[str, Any]] | None = None
) -> Response:
    """The reply to a body of /rerank. more: what is said beside the results, where something is."""
    engine = serving.engine(fields.model)
    fields.cut_to(engine.facts.max_tokens)
    sides, asked = fields.sides(), fields.asked(serving)
    scored = await score(serving, http, engine, sides, asked, adapter=fields.adapter, priority=fields.priority)
    tokens = _replies.tokens_of(scored.answers)
    body = {
        "id": _replies.reply_id("score", http, fields.request_id),
        "model": engine.facts.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": [_result(place, sides.documents, scored, fields) for place in scored.ranked(fields.top_n)],
        **({} if more is None else more(scored)),
    }
    return await _replies.write(serving, lambda: orjson.dumps(body), scored.answers)


def _result(place: int, documents: Sequence[str], scored: Scored, fields: RerankFields) -> dict[str, Any]:
    result: dict[str, Any] = {"index": place}
    if fields.return_documents:
        result["document"] = {"text": documents[place], "multi_modal": None}
    one = scored.scores[place]
    return {**result, "relevance_score": one.score, **_replies.cut_of_pair(one.answers)}
