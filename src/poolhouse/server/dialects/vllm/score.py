"""Score: vLLM's /score, and its reply at /rerank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NotRequired

import orjson
from pydantic import Field, StrictFloat
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.content import TextOrContent
from poolhouse.inputs.prompts import parse_texts
from poolhouse.inputs.templates.score import score_template
from poolhouse.params import PruningParams
from poolhouse.plans import scoring
from poolhouse.server.call import Call
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import PRUNE, Common, Many, check_chat_template, processor_options
from poolhouse.server.dialects._pairs import Pairs, Scored, pruned, score
from poolhouse.server.dialects._replies import TokenCounts
from poolhouse.server.dialects.openai import List
from poolhouse.server.engines import Engines
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Cut, Pruned

_TEXTS = "A text, {text}, {content: [text and image_url parts]}, or a list of them."
# The names of the queries and of the documents; the first are vLLM's latest.
PAIR_NAMES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


class PairFields(Common):
    """What /score and /rerank have in common."""

    max_tokens_per_query: int = Field(0, ge=0, description="Cut queries to this many tokens; 0 does not.")
    max_tokens_per_doc: int = Field(0, ge=0, description="Cut documents to this many tokens; 0 does not.")
    instruction: str | None = Field(None, description="What makes a document fit, for models that read one.")
    chat_template: str | None = Field(None, description="Refused unless --trust-request-chat-template.")
    chat_template_kwargs: dict[str, object] | None = None
    mode: str | None = Field(
        None,
        description="Which answers are compared: dense, sparse, colbert, or several (weighted); none: the model's.",
    )
    weights: Many[StrictFloat] | None = Field(
        None, description="Of the dense, sparse and colbert scores in such a mode."
    )
    prune: object = PRUNE

    def options(self, engines: Engines) -> scoring.ScoreOptions:
        """How the pairs are scored.

        Raises:
            InvalidRequest: naming the field.
        """
        check_chat_template(engines, self.chat_template)
        params = self.params(
            max_tokens_per_query=self.max_tokens_per_query or None, max_tokens_per_doc=self.max_tokens_per_doc or None
        )
        template = None if self.chat_template is None else score_template(self.chat_template)
        weights = None if self.weights is None else tuple(self.weights)
        variables = self.chat_template_kwargs or {}
        return scoring.ScoreOptions(
            params, self.instruction, template, variables, self.mode, weights, prune=PruningParams.parse(self.prune)
        )

    def refuse_limits_beyond(self, max_tokens: int) -> None:
        """Raise InvalidRequest for a limit of queries or documents that is not below the model's."""
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if getattr(self, name) >= max_tokens:
                raise InvalidRequest(
                    f"{name} must be below the model's limit of {max_tokens} tokens, got {getattr(self, name)}.",
                    name,
                    getattr(self, name),
                )


class ScoreFields(PairFields):
    """The body of POST /score; queries and documents, by any of four pairs of names."""

    queries: object = Field(None, description=_TEXTS)
    documents: object = Field(None, description=_TEXTS)
    items: object = Field(None, description="Another name for documents.")
    data_1: object = Field(None, description="Another name for queries.")
    data_2: object = Field(None, description="Another name for documents.")
    text_1: object = Field(None, description="Another name for queries.")
    text_2: object = Field(None, description="Another name for documents.")

    def pairs(self) -> Pairs:
        """The queries and documents, under the names that they came by.

        Raises:
            InvalidRequest: none of these pairs of names, several, or no texts.
        """
        present = [pair for pair in PAIR_NAMES if all(getattr(self, name) is not None for name in pair)]
        if len(present) != 1:
            ways = ", ".join(" and ".join(pair) for pair in PAIR_NAMES)
            raise InvalidRequest(f"Give the two sides to score in one way: {ways}.", "queries")
        queries, documents = present[0]
        return Pairs(
            parse_texts(getattr(self, queries), queries),
            parse_texts(getattr(self, documents), documents),
            (queries, documents),
        )


class RerankFields(PairFields):
    """The body of POST /rerank."""

    query: object = Field(description="A text, {text}, or {content: [text and image_url parts]}.")
    documents: object = Field(description=_TEXTS)
    top_n: int = Field(0, ge=0, description="How many of the best to give; 0 gives all.")
    return_documents: bool = Field(True, description="Whether results hold their documents.")

    def cut_to(self, max_tokens: int) -> None:
        """Lower limits to the model's: Cohere's clients send 4096, and want documents cut."""
        if self.max_tokens_per_doc >= max_tokens:
            if PruningParams.parse(self.prune) is not None:
                self.max_tokens_per_doc = 0  # read whole, in windows
            elif self.truncate_prompt_tokens is None:
                self.truncate_prompt_tokens = -1
        self.max_tokens_per_doc = min(self.max_tokens_per_doc, max_tokens)
        self.max_tokens_per_query = min(self.max_tokens_per_query, max_tokens)

    def pairs(self) -> Pairs:
        """The query, and the documents.

        Raises:
            InvalidRequest: naming the field.
        """
        if isinstance(self.query, list):
            raise InvalidRequest("query must be one text; /score takes several.", "query")
        return Pairs(parse_texts(self.query, "query"), parse_texts(self.documents, "documents"))


async def score_pairs(call: Call, fields: ScoreFields) -> Response:
    """A score per pair: one query with one or many documents, or as many queries as documents."""
    engine = await call.use(fields.model)
    fields.refuse_limits_beyond(engine.facts.max_tokens)
    scored = await _score(call, fields, fields.pairs())
    body = {
        **call.list_head("score", fields.request_id),
        "data": [
            {"index": index, "object": "score", "score": one.score} | pruned(one) | _replies.cut_of_pair(one.answers)
            for index, one in enumerate(scored.scores)
        ],
        "usage": _replies.usage(scored.answers),
    }
    return await call.write(lambda: orjson.dumps(body), scored.answers)


async def rerank(
    call: Call, fields: RerankFields, more: Callable[[Scored], Mapping[str, object]] | None = None
) -> Response:
    """Documents by how well they answer a query, best first. more: further fields of the reply."""
    engine = await call.use(fields.model)
    fields.cut_to(engine.facts.max_tokens)
    pairs = fields.pairs()
    scored = await _score(call, fields, pairs)
    documents = _echoes(fields.documents, pairs.documents) if fields.return_documents else None
    body = {
        "id": call.reply_id("score", fields.request_id),
        "model": engine.facts.name,
        "usage": _replies.token_counts(scored.answers),
        "results": [_result(index, documents, scored) for index in scored.ranked(fields.top_n)],
        **({} if more is None else more(scored)),
    }
    return await call.write(lambda: orjson.dumps(body), scored.answers)


async def _score(call: Call, fields: PairFields, pairs: Pairs) -> Scored:
    return await score(
        call,
        pairs,
        fields.options(call.engines),
        adapter=fields.adapter,
        priority=fields.priority,
        processor_options=processor_options(fields.mm_processor_kwargs),
    )


def _echoes(given: object, documents: Sequence[TextOrContent]) -> list[RankedDocument]:
    """The documents as replies show them: texts, or the parts that were given where they hold a picture."""
    items = given if isinstance(given, list) else [given]
    return [
        {"text": document, "multi_modal": None}
        if isinstance(document, str)
        else {"text": None, "multi_modal": item["content"]}
        for item, document in zip(items, documents, strict=True)
    ]


def _result(index: int, documents: Sequence[RankedDocument] | None, scored: Scored) -> dict[str, object]:
    result: dict[str, object] = {"index": index}
    if documents is not None:
        result["document"] = documents[index]
    one = scored.scores[index]
    return {**result, "relevance_score": one.score, **pruned(one), **_replies.cut_of_pair(one.answers)}


class Score(Cut, Pruned):
    """The score of a pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreReply(List):
    """The reply of /score."""

    data: list[Score]


class RankedDocument(TypedDict):
    """A document of the request: a text, or the parts of one with pictures."""

    text: str | None
    multi_modal: list[object] | None


class Ranked(Cut, Pruned):
    """A document's index and score."""

    index: int
    document: NotRequired[RankedDocument]
    relevance_score: float


class RerankReply(TypedDict):
    """The reply of /rerank, best first."""

    id: str
    model: str
    usage: TokenCounts
    results: list[Ranked]


DIALECT = Dialect("scores", (Route("POST", "/score", score_pairs, ScoreFields, (ScoreReply,), others=("/v1/score",)),))
