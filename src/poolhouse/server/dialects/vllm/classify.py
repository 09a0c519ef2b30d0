"""Classify: labels of texts (/classify), and entities within them (/classify_tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.plans import zero_shot
from poolhouse.server.call import Call
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import LABEL_NAMES, Inputs, Many
from poolhouse.server.dialects.openai import List
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire import encoding
from poolhouse.server.wire.contract import Cut, Vector
from poolhouse.vectors.entities import Strategy, entities


class ClassifyFields(Inputs):
    """The body of POST /classify."""

    # Checked by the plan, as inputs are by parse_prompts.
    labels: object = Field(
        None,
        description="What the inputs may be, for zero-shot classifiers: a list for all, or one for each.",
        json_schema_extra={
            "anyOf": [LABEL_NAMES, {"type": "array", "items": LABEL_NAMES, "minItems": 1}, {"type": "null"}]
        },
    )
    multi_label: bool = Field(False, description="Each label is true or false by itself; else one of them is true.")
    hypothesis_template: str | None = Field(
        None, description='With {} for the label, for models of entailment; none: "This example is {}."'
    )


class ClassifyTokensFields(Inputs):
    """The body of POST /classify_tokens."""

    aggregation_strategy: Strategy = Field(
        "simple", description="none: tokens by themselves; simple: neighbours of one label; else words agree first."
    )
    ignore_labels: Many[str] = Field(["O"], description="Labels that are no entity.")


async def classify(call: Call, fields: ClassifyFields) -> Response:
    """The likeliest label of each input, and the probability of every label."""
    engine = await call.use(fields.model)
    if "classify" not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model does not support Classification API. Supported tasks: {list(engine.facts.tasks)}", "model"
        )
    if fields.labels is not None:
        return await _by_labels(call, fields)
    if fields.multi_label or fields.hypothesis_template is not None:
        raise InvalidRequest("multi_label and hypothesis_template are for labels; give labels too.", "labels")
    answers = await call.answers(fields.requests(call.engines, "classify", fields.params()))
    head = call.list_head("classify", fields.request_id)
    items = [_labelled(index, answer, engine) for index, answer in enumerate(answers)]
    return await call.write(lambda: encoding.render(head, items, {"usage": _replies.usage(answers)}), answers)


async def _by_labels(call: Call, fields: ClassifyFields) -> Response:
    """The same for the labels of the request, in their order."""
    texts = fields.requests(call.engines, "classify", fields.params())
    for index, text in enumerate(texts):
        zero_shot.check_text(text.prompt, f"input[{index}]")
    options = zero_shot.LabelOptions(fields.multi_label, fields.use_activation is not False, fields.hypothesis_template)
    plan = zero_shot.plan(call.engine, fields.labels, len(texts), options)
    most = call.settings.max_client_batch_size
    if plan.total > most:
        raise InvalidRequest(
            f"The labels of the inputs make {plan.total} pairs; one request may hold {most} (--max-client-batch-size).",
            "labels",
        )
    requests = list(plan.requests(texts))
    answers = await call.answers(requests, lambda index: f"input[{plan.text_of(index)}]")
    head = call.list_head("classify", fields.request_id)

    def render() -> bytes:
        items = [
            {
                "index": index,
                "label": text.label,
                "probs": text.array,
                "num_classes": len(text.array),
                **_replies.cut_of_pair(text.answers),
            }
            for index, text in enumerate(plan.finish(answers))
        ]
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await call.write(render, answers)


async def classify_tokens(call: Call, fields: ClassifyTokensFields) -> Response:
    """The entities of each input: label, score, and where they stand in characters."""
    engine = await call.use(fields.model)
    if "token_classify" not in engine.facts.tasks or not engine.facts.label_names:
        raise UnsupportedTask(
            f"The model has no labels for tokens. Supported tasks: {list(engine.facts.tasks)}",
            "model",
            engine.facts.name,
        )
    # Entities are read from probabilities, whatever the model's default is.
    requests = fields.requests(call.engines, "token_classify", replace(fields.params(), use_activation=True))
    if any(request.prompt.text is None for request in requests):
        raise InvalidRequest("Entities are parts of a text; token ids and pictures have none.", "input")
    answers = await call.answers([replace(request, offsets=True) for request in requests])
    texts = [request.prompt.text or "" for request in requests]
    head = call.list_head("classify-tokens", fields.request_id)

    def render() -> bytes:
        items = [
            {"index": index, "entities": _entities(text, answer, engine, fields)} | _replies.cut(answer)
            for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await call.write(render, answers)


def _labelled(index: int, answer: Answer, engine: PoolingEngine) -> dict[str, object]:
    label = engine.facts.label_names.get(int(answer.array.argmax()))
    probs = np.ascontiguousarray(answer.array)
    return {"index": index, "label": label, "probs": probs, "num_classes": len(probs), **_replies.cut(answer)}


def label_names(engine: PoolingEngine) -> list[str]:
    """The name of each label; as in transformers, LABEL_0 and so on where the checkpoint has no names."""
    return [engine.facts.label_names.get(index, f"LABEL_{index}") for index in range(engine.facts.labels)]


def ranked_labels(answer: Answer, names: Sequence[str]) -> list[dict[str, object]]:
    """Every label with its score, the likeliest first, as TEI and Infinity write them."""
    order = np.argsort(-answer.array, kind="stable").tolist()
    return [{"score": float(answer.array[index]), "label": names[index]} for index in order]


def _entities(
    text: str, answer: Answer, engine: PoolingEngine, fields: ClassifyTokensFields
) -> Sequence[dict[str, object]]:
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


class Labelled(Cut):
    """The likeliest label of an input, and the probability of every label."""

    index: int
    label: str | None
    probs: Vector
    num_classes: int


class ClassifyReply(List):
    """The reply of /classify."""

    data: list[Labelled]


class Entity(TypedDict):
    """A span of a text, in characters."""

    label: str
    score: float
    text: str
    start: int
    end: int


class Entities(Cut):
    """The entities of an input."""

    index: int
    entities: list[Entity]


class ClassifyTokensReply(List):
    """The reply of /classify_tokens."""

    data: list[Entities]


DIALECT = Dialect(
    "labels",
    (
        Route("POST", "/classify", classify, ClassifyFields, (ClassifyReply,), others=("/v1/classify",)),
        Route("POST", "/classify_tokens", classify_tokens, ClassifyTokensFields, (ClassifyTokensReply,)),
    ),
)
