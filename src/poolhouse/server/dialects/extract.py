"""Extract: the parts of texts that fit labels of the request (/v1/extract), and GLiNER's own server (/gliner).

One text that cannot be read has an error in its place, and the others are answered. /gliner names no model: the first that
extracts, answers. Source of it: gliner 0.2.29.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired

from pydantic import Field
from pydantic.config import JsonDict
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer, Request, entities_of
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.labels import labels_of
from poolhouse.inputs.prompts import Prompt
from poolhouse.params import PoolingParams
from poolhouse.server.call import Call
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import LABEL_NAMES, Common, Many, Strict
from poolhouse.server.dialects.openai import List
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire import encoding, errors
from poolhouse.server.wire.contract import Cut, Errors
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure

_DESCRIBED: JsonDict = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
_SETS: JsonDict = {"type": "array", "items": {"anyOf": [LABEL_NAMES, _DESCRIBED]}, "minItems": 1}
LABELS_SCHEMA: JsonDict = {"anyOf": [LABEL_NAMES, _DESCRIBED, _SETS]}
_LABELS = (
    "What to look for: names, or names with descriptions where the model reads these; or a list of either per text."
)


class ExtractFields(Common):
    """The body of POST /v1/extract."""

    input: str | Many[str] = Field(description="A text, or several.")
    labels: Any = Field(description=_LABELS, json_schema_extra=LABELS_SCHEMA)
    threshold: float = Field(0.5, ge=0, le=1, description="What is found has a higher score.")
    flat: bool = Field(True, description="Entities do not overlap; false lets one lie within another.")
    multi_label: bool = Field(False, description="The same part of a text may have several labels.")
    overflow: Literal["error", "truncate", "chunk"] | None = Field(
        None, description="Texts over the limit: chunk, the default, reads windows of it; or cut, or refuse it."
    )


class GlinerFields(Strict):
    """The body of POST /gliner."""

    text: str | Many[str] = Field(description="A text, or several.")
    labels: Any = Field(description=_LABELS, json_schema_extra=LABELS_SCHEMA)
    threshold: float = Field(0.5, ge=0, le=1)
    flat_ner: bool = True
    multi_label: bool = False
    relations: Many[str] | None = Field(None, description="Refused: no relations are found here.")
    relation_threshold: float | None = Field(None, description="Without effect.")
    adapter_id: str | None = Field(None, description="An adapter of the model.")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is looked for. labels: unchecked. params: how texts over the limit are read."""

    labels: object
    threshold: float = 0.5
    flat: bool = True
    multi_label: bool = False
    params: PoolingParams = PoolingParams()
    adapter: str | None = None
    priority: int = 0

    def requests(self, texts: Sequence[str]) -> list[Request]:
        """A request for each text.

        Raises:
            InvalidRequest: labels that are none.
        """
        parsed = labels_of(self.labels, len(texts), self.threshold, self.flat, self.multi_label)
        return [
            Request(Prompt(text), "extract", self.params, adapter=self.adapter, priority=self.priority, labels=labels)
            for text, labels in zip(texts, parsed, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in each text, or what is wrong with it. answers: of those that were read."""

    items: Sequence[Sequence[Part] | InvalidRequest]
    cuts: Sequence[dict[str, bool | int]]
    answers: Sequence[Answer]


async def find(call: Call, texts: Sequence[str], wanted: Wanted, field: str) -> Found:
    """The entities of each text; one that cannot be read has an error in its place, unless none can be.

    field: of the texts, for messages.

    Raises:
        UnsupportedTask: the model finds no labels of requests. InvalidRequest: labels, or no text can be read.
    """
    facts = call.engine.facts
    if "extract" not in facts.tasks:
        raise UnsupportedTask(
            f"The model `{facts.name}` does not extract by labels of a request; its tasks: {list(facts.tasks)}.",
            "model",
        )
    call.engines.check_items(len(texts), field)
    requests = wanted.requests(texts)
    results = await call.each(requests, f"{field}[{{}}]".format)
    items = [
        one if isinstance(one, InvalidRequest) else parts(request, one)
        for request, one in zip(requests, results, strict=True)
    ]
    cuts = [{} if isinstance(one, InvalidRequest) else _replies.cut(one) for one in results]
    return Found(items, cuts, [one for one in results if not isinstance(one, InvalidRequest)])


def parts(request: Request, answer: Answer) -> list[Part]:
    """What was found in a text, as GLiNER writes it."""
    return [
        {"start": one.start, "end": one.end, "text": one.text, "label": one.label, "score": one.score}
        for one in entities_of(request, answer)
    ]


async def extract(call: Call, fields: ExtractFields) -> Response:
    """The parts of each input that fit one of the labels: label, score, and where they stand in characters."""
    await call.use(fields.model)
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    params = fields.params(overflow=fields.overflow)
    wanted = Wanted(
        fields.labels,
        fields.threshold,
        fields.flat,
        fields.multi_label,
        params,
        adapter=fields.adapter,
        priority=fields.priority,
    )
    found = await find(call, texts, wanted, "input")
    head = call.list_head("extract", fields.request_id)

    def render() -> bytes:
        data = [
            {"index": index, **_entities_or_error(item), **cut}
            for index, (item, cut) in enumerate(zip(found.items, found.cuts, strict=True))
        ]
        return encoding.render(head, data, {"usage": _replies.usage(found.answers)})

    return await call.write(render, found.answers)


def _entities_or_error(item: Sequence[Part] | InvalidRequest) -> dict[str, object]:
    if isinstance(item, InvalidRequest):
        return {"entities": [], "error": {"message": str(item), "param": item.parameter}}
    return {"entities": item}


async def gliner(call: Call, fields: GlinerFields) -> Response:
    """The entities of a text, or a list of them for a list of texts."""
    await call.use(call.engines.first(lambda facts: "extract" in facts.tasks))
    if fields.relations:
        raise InvalidRequest("relations: this server finds entities, no relations.", "relations")
    alone = isinstance(fields.text, str)
    texts = [fields.text] if isinstance(fields.text, str) else fields.text
    wanted = Wanted(
        fields.labels, fields.threshold, fields.flat_ner, fields.multi_label, adapter=fields.adapter_id or None
    )
    found = await find(call, texts, wanted, "text")

    def render() -> bytes:
        replies = [
            {"entities": [], "error": str(item)} if isinstance(item, InvalidRequest) else {"entities": item}
            for item in found.items
        ]
        return dumps(replies[0] if alone else replies)

    return await call.write(render, found.answers)


def shape(failure: Failure) -> Response:
    """GLiNER's error body: the message alone."""
    return errors.as_json(failure, {"error": failure.message})


class Part(TypedDict):
    """A part of a text, in characters, and the label that it fits."""

    start: int
    end: int
    text: str
    label: str
    score: float


class Problem(TypedDict):
    """Why a text was not read."""

    message: str
    param: str | None


class Extracted(Cut):
    """What was found in an input, in order; or why it was not read."""

    index: int
    entities: list[Part]
    error: NotRequired[Problem]


class ExtractReply(List):
    """The reply of /v1/extract."""

    data: list[Extracted]


class GlinerReply(TypedDict):
    """What was found in a text; or why it was not read."""

    entities: list[Part]
    error: NotRequired[str]


class Error(TypedDict):
    """An error in the shape of GLiNER's server."""

    error: str


DIALECTS: tuple[Dialect, ...] = (
    Dialect("labels", (Route("POST", "/v1/extract", extract, ExtractFields, (ExtractReply,), others=("/extract",)),)),
    Dialect(
        "gliner",
        (Route("POST", "/gliner", gliner, GlinerFields, (GlinerReply, list[GlinerReply])),),
        shape,
        (Errors(Error),),
        owns=("/gliner",),
    ),
)
