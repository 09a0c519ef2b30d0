"""What the dialects of hosted APIs (Cohere, Jina, Voyage) share: inputs of several forms in, vectors in several forms out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import Request
from pydantic import ValidationError

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnknownModel, UnsupportedTask
from poolhouse.inputs.prompts import Prompt, parse_texts
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.plans import scoring
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._pairs import Scored, Sides, score
from poolhouse.server.engines import Serving
from poolhouse.server.wire import encoding
from poolhouse.server.wire.errors import Failure
from poolhouse.tasks import Task
from poolhouse.vectors.precision import Precision

# How hosted APIs name the numbers of a vector; base64 is of float32.
Kind = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


def as_bad_request(failure: Failure) -> Failure:
    """The failure with the statuses of these APIs: an unknown model is a bad request too, and no 404."""
    return replace(failure, status=400) if isinstance(failure.error, UnknownModel) else failure


def with_their_statuses(failure: Failure) -> Failure:
    """`as_bad_request`, and wrong fields are a 422, as FastAPI has it."""
    return replace(failure, status=422) if isinstance(failure.error, ValidationError) else as_bad_request(failure)


_SIDES: dict[str, Literal["left", "right"]] = {"START": "left", "END": "right"}


@dataclass(frozen=True, slots=True)
class Wish:
    """How vectors are wanted.

    input_type: a query, a document, or the name of a prompt. truncate: which end a long text loses; None is the one that
    the model's tokenizer cuts.
    """

    input_type: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    max_tokens: int | None = None
    priority: int = 0

    @property
    def params(self) -> PoolingParams:
        """How to cut and pool."""
        most = -1 if self.max_tokens is None else self.max_tokens
        return PoolingParams(
            dimensions=self.dimensions,
            use_activation=self.use_activation,
            truncate_prompt_tokens=None if self.truncate == "NONE" else most,
            truncation_side=_SIDES.get(self.truncate or ""),
            overflow="error" if self.truncate == "NONE" else None,
        )


async def embed(
    serving: Serving,
    http: Request,
    engine: PoolingEngine,
    texts: Sequence[str],
    wish: Wish,
    *,
    task: Task = "embed",
    parameter: str = "input",
) -> list[Answer]:
    """An answer per text; see `requests` and `Serving.answers` for what may be raised."""
    asked = requests(serving, engine, texts, wish, task, parameter)
    return await serving.answers(http, engine, asked, f"{parameter}[{{}}]".format)


def requests(
    serving: Serving, engine: PoolingEngine, texts: Sequence[str], wish: Wish, task: Task, parameter: str
) -> list[EngineRequest]:
    """A request per text.

    Raises:
        UnsupportedTask: the model has no vectors of that kind. InvalidRequest: no text, or too many.
    """
    if task not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model `{engine.facts.name}` has no {task} vectors; its tasks: {list(engine.facts.tasks)}.", "model"
        )
    if not texts:
        raise InvalidRequest(f"{parameter} must hold at least one text.", parameter)
    serving.check_items(len(texts), parameter)
    params = wish.params
    return [
        EngineRequest(
            Prompt(text),
            task,
            params,
            max_tokens=wish.max_tokens if wish.truncate == "NONE" else None,
            input_type=wish.input_type,
            priority=wish.priority,
        )
        for text in texts
    ]


def vectors(arrays: Sequence[Array], kind: Kind, engine: PoolingEngine, field: str) -> list[Any]:
    """The vectors in that form, ready for JSON.

    Raises:
        InvalidRequest: vectors that the form cannot hold; naming `field`.
    """
    if kind == "base64":
        return written(arrays, "float32", "base64", engine, field)
    return written(arrays, "float32" if kind == "float" else kind, "float", engine, field)


def written(
    arrays: Sequence[Array], precision: Precision, form: Literal["float", "base64"], engine: PoolingEngine, field: str
) -> list[Any]:
    """The vectors in that precision, as numbers or as little-endian memory in base64; see `vectors`."""
    how = encoding.Encoding(form, precision, "little", engine.facts.calibration)
    return [encoding.value(array, form) for array in encoding.encode(arrays, how, field)]


async def rerank(
    serving: Serving,
    http: Request,
    engine: PoolingEngine,
    query: str,
    documents: Sequence[str],
    *,
    truncate: bool = True,
    max_tokens_per_doc: int | None = None,
    use_activation: bool | None = None,
    priority: int = 0,
) -> Scored:
    """A score per document; long ones are cut, unless `truncate` says no."""
    if not documents:
        raise InvalidRequest("documents must hold at least one text.", "documents")
    if max_tokens_per_doc is not None:
        max_tokens_per_doc = min(max_tokens_per_doc, engine.facts.max_tokens)
    scores_labels = "classify" in engine.facts.tasks
    params = PoolingParams(
        # Cosines and MaxSim have no activation to leave out.
        use_activation=use_activation if scores_labels else None,
        truncate_prompt_tokens=-1 if truncate else None,
        overflow=None if truncate else "error",
        max_tokens_per_doc=max_tokens_per_doc,
    )
    sides = Sides([query], documents, ("query", "documents"))
    return await score(serving, http, engine, sides, scoring.Asked(params), priority=priority)


def texts_of(given: Any, parameter: str) -> list[str]:
    """Texts that stand bare, or as {text}, one or several.

    Raises:
        InvalidRequest: an item of another form, such as a picture.
    """
    for index, item in enumerate(given if isinstance(given, list) else [given]):
        for medium in ("image", "image_url", "image_base64", "pdf", "video", "audio"):
            if isinstance(item, Mapping) and medium in item:
                raise InvalidRequest(
                    f"{parameter}[{index}] is an {medium}; the models of this server read texts.", parameter
                )
    return parse_texts(given, parameter)


def search_units(documents: int) -> int:
    """Cohere's: one per hundred documents."""
    return math.ceil(documents / 100)


def arrays_of(answers: Sequence[Answer]) -> list[Array]:
    return [answer.array for answer in answers]


def warnings_of(answers: Sequence[Answer]) -> list[str]:
    """What a caller should know of what was cut; no words where nothing was."""
    cut = _replies.truncated_of(answers)
    return [f"{cut} of {len(answers)} inputs were longer than the limit, and cut."] if cut else []
