"""/classify: labels of texts; /classify_tokens: entities within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import Inputs, Many, body_schema
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire import encoding
from poolhouse.vectors.entities import Strategy, entities


class ClassifyFields(Inputs):
    """The body of POST /classify."""


class ClassifyTokensFields(Inputs):
    """The body of POST /classify_tokens."""

    aggregation_strategy: Strategy = Field(
        "simple", description="none: tokens by themselves; simple: neighbours of one label; else words agree first."
    )
    ignore_labels: Many[str] = Field(["O"], description="Labels that are no entity.")


def router(serving: Serving) -> APIRouter:
    routes = direct_router("labels")

    @routes.post("/classify", openapi_extra=body_schema(ClassifyFields))
    @routes.post("/v1/classify", include_in_schema=False)
    async def classify(http: Request) -> Response:
        """The likeliest label of each input, and the probability of every label."""
        return await answer_classify(serving, http, await serving.read(http, ClassifyFields))

    @routes.post("/classify_tokens", openapi_extra=body_schema(ClassifyTokensFields))
    async def classify_tokens(http: Request) -> Response:
        """The entities of each input: label, score, and where they stand in characters."""
        return await _answer_tokens(serving, http, await serving.read(http, ClassifyTokensFields))

    return routes


async def answer_classify(serving: Serving, http: Request, fields: ClassifyFields) -> Response:
    """The reply to a body of /classify."""
    engine = serving.engine(fields.model)
    if "classify" not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model does not support Classification API. Supported tasks: {list(engine.facts.tasks)}", "model"
        )
    requests = fields.requests(serving, "classify", fields.params())
    answers = await serving.answers(http, engine, requests)
    head = _replies.head("classify", http, fields.request_id, engine.facts.name)
    items = [_labelled(index, answer, engine) for index, answer in enumerate(answers)]
    return await _replies.write(
        serving, lambda: encoding.render(head, items, {"usage": _replies.usage(answers)}), answers
    )


def _labelled(index: int, answer: Answer, engine: PoolingEngine) -> dict[str, Any]:
    label = engine.facts.label_names.get(int(answer.array.argmax()))
    probs = np.ascontiguousarray(answer.array)
    return {"index": index, "label": label, "probs": probs, "num_classes": len(probs)} | _replies.cut(answer)


def label_names(engine: PoolingEngine) -> list[str]:
    """The name of each label; transformers' stand-ins where the checkpoint names none."""
    return [engine.facts.label_names.get(place, f"LABEL_{place}") for place in range(engine.facts.labels)]


def ranked_labels(answer: Answer, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every label with its score, the likeliest first, as TEI and Infinity write them."""
    order = np.argsort(-answer.array, kind="stable").tolist()
    return [{"score": float(answer.array[place]), "label": names[place]} for place in order]


async def _answer_tokens(serving: Serving, http: Request, fields: ClassifyTokensFields) -> Response:
    engine = serving.engine(fields.model)
    if "token_classify" not in engine.facts.tasks or not engine.facts.label_names:
        raise UnsupportedTask(
            f"The model has no labels for tokens. Supported tasks: {list(engine.facts.tasks)}",
            "model",
            engine.facts.name,
        )
    # Entities are read from probabilities, whatever the model's default is.
    requests = fields.requests(serving, "token_classify", replace(fields.params(), use_activation=True))
    if any(request.prompt.text is None for request in requests):
        raise InvalidRequest("Entities are places in a text; token ids have none.", "input")
    answers = await serving.answers(http, engine, [replace(request, offsets=True) for request in requests])
    texts = [request.prompt.text or "" for request in requests]
    head = _replies.head("classify-tokens", http, fields.request_id, engine.facts.name)

    def render() -> bytes:
        items = [
            {"index": index, "entities": _entities(text, answer, engine, fields)} | _replies.cut(answer)
            for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await _replies.write(serving, render, answers)


def _entities(
    text: str, answer: Answer, engine: PoolingEngine, fields: ClassifyTokensFields
) -> Sequence[dict[str, Any]]:
    offsets = answer.tokens.offsets
    assert offsets is not None
    if len(answer.array) != len(answer.tokens):
        raise UnsupportedTask(
            "Entities need a row per token, but this model pools steps (STEP); use /pooling.", "model"
        )
    found = entities(
        text, answer.array, offsets, engine.facts.label_names, fields.aggregation_strategy, fields.ignore_labels
    )
    return [
        {
            "label": entity.label,
            "score": entity.score,
            "text": entity.text,
            "start": entity.start,
            "end": entity.end,
        }
        for entity in found
    ]
