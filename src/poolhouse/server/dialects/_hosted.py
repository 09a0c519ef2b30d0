"""Hosted APIs: the embed and rerank that Cohere, Jina, Voyage and others share, in their forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ValidationError

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnknownModel, UnsupportedTask
from poolhouse.inputs.content import Content, TextOrContent, from_base64
from poolhouse.inputs.prompts import Prompt, parse_texts
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams, PruningParams
from poolhouse.plans import scoring
from poolhouse.server.call import Call
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._pairs import Pairs, Scored, score
from poolhouse.server.engines import Engines
from poolhouse.server.wire import encoding
from poolhouse.server.wire.errors import Failure
from poolhouse.tasks import Task
from poolhouse.vectors.precision import Precision

# How hosted APIs name the numbers of a vector; base64 is of float32.
EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
# The fields of other media that an item may have, in place of a text or a picture.
_OTHER_MEDIA = ("pdf", "video", "audio")
_TRUNCATION_SIDES: dict[str | None, Literal["left", "right"]] = {"START": "left", "END": "right"}


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """How texts are cut and pooled.

    input_type: a query, a document, or the name of a prompt. truncate: the end that a long text loses; None is the one
    that the model's tokenizer cuts, NONE refuses the text. max_tokens: those of a text; None is the model's limit.
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
        refuse = self.truncate == "NONE"
        limit = -1 if self.max_tokens is None else self.max_tokens
        return PoolingParams(
            dimensions=self.dimensions,
            use_activation=self.use_activation,
            truncate_prompt_tokens=None if refuse else limit,
            truncation_side=_TRUNCATION_SIDES.get(self.truncate),
            overflow="error" if refuse else None,
        )


async def embed(
    call: Call,
    contents: Sequence[TextOrContent],
    options: EmbedOptions,
    *,
    task: Task = "embed",
    parameter: str = "input",
) -> list[Answer]:
    """An answer per item; see `requests` and `Call.answers` for what may be raised.

    parameter: the field of the items, for messages.
    """
    return await call.answers(requests(call, contents, options, task, parameter), f"{parameter}[{{}}]".format)


def requests(
    call: Call, contents: Sequence[TextOrContent], options: EmbedOptions, task: Task = "embed", parameter: str = "input"
) -> list[EngineRequest]:
    """A request per item, each a text or texts and pictures.

    Raises:
        UnsupportedTask: the model has no vectors of that kind. InvalidRequest: no item, or too many.
    """
    facts = call.engine.facts
    if task not in facts.tasks:
        raise UnsupportedTask(
            f"The model `{facts.name}` has no {task} vectors; its tasks: {list(facts.tasks)}.", "model"
        )
    if not contents:
        raise InvalidRequest(f"{parameter} must hold at least one text.", parameter)
    call.engines.check_items(len(contents), parameter)
    params = options.params
    return [
        EngineRequest(
            Prompt.of(content),
            task,
            params,
            max_tokens=options.max_tokens if options.truncate == "NONE" else None,
            input_type=options.input_type,
            priority=options.priority,
        )
        for content in contents
    ]


async def rerank(
    call: Call,
    query: TextOrContent,
    documents: Sequence[TextOrContent],
    *,
    parameter: str = "documents",
    truncate: bool = True,
    max_tokens_per_doc: int | None = None,
    use_activation: bool | None = None,
    priority: int = 0,
    prune: object = None,
) -> Scored:
    """A score per document; long ones are cut, unless `truncate` says no, or read in windows where they are pruned.

    parameter: the field of the documents, for messages. prune: which sentences stay; see `PruningParams.parse`.
    """
    if not documents:
        raise InvalidRequest(f"{parameter} must hold at least one text.", parameter)
    facts = call.engine.facts
    if max_tokens_per_doc is not None:
        max_tokens_per_doc = min(max_tokens_per_doc, facts.max_tokens)
    params = PoolingParams(
        # Cosines and MaxSim have no activation to leave out.
        use_activation=use_activation if "classify" in facts.tasks else None,
        truncate_prompt_tokens=-1 if truncate else None,
        overflow=None if truncate else "error",
        max_tokens_per_doc=max_tokens_per_doc,
    )
    pairs = Pairs([query], documents, ("query", parameter))
    options = scoring.ScoreOptions(params, prune=PruningParams.parse(prune))
    return await score(call, pairs, options, priority=priority)


def contents_of(engines: Engines, value: object, parameter: str) -> list[TextOrContent]:
    """What each of one or several items holds; see `content_of`.

    Raises:
        InvalidRequest: as there, and more items than one request may hold.
    """
    items = value if isinstance(value, list) else [value]
    engines.check_items(len(items), parameter)
    return [
        item if type(item) is str else content_of(item, f"{parameter}[{index}]", parameter)
        for index, item in enumerate(items)
    ]


def content_of(item: object, path: str, parameter: str) -> TextOrContent:
    """A text, bare or as {text}; a picture, as {image}; or {content: [parts]}.

    path: where the item stands in the body. parameter: the field of the items.

    Raises:
        InvalidRequest: an item of another form, such as a sound, or one that is a text and a picture.
    """
    if isinstance(item, Mapping):
        for medium in _OTHER_MEDIA:
            if medium in item:
                raise InvalidRequest(f"{path} is an {medium}; texts and pictures are read here.", parameter)
        if item.get("image") is not None:
            if item.get("text") is not None:
                raise InvalidRequest(f"{path} has text and image; give one of them.", parameter)
            return picture(item["image"], f"{path}.image")
    elif not isinstance(item, str):
        raise InvalidRequest(f"{path} must be a text, {{text}} or {{image}}.", parameter)
    return parse_texts(item, path)[0]


def picture(source: object, path: str) -> Content:
    """An item that is a picture: a URL, a data URI, or base64 alone.

    Raises:
        InvalidRequest: no text.
    """
    if not isinstance(source, str) or not source:
        raise InvalidRequest(f"{path} must be a URL, a data URI or base64.", path)
    return Content((from_base64(source, path),))


def pictures(engines: Engines, sources: Sequence[object], parameter: str) -> list[Content]:
    """`picture` of each, if they are not more than one request may hold."""
    engines.check_items(len(sources), parameter)
    return [picture(source, f"{parameter}[{index}]") for index, source in enumerate(sources)]


def with_text(pictures: Iterable[Content], text: str | None) -> Content:
    """Pictures, and a text behind them where there is one."""
    parts = [part for one in pictures for part in one.parts]
    return Content((*parts, text) if text else tuple(parts))


def arrays_of(answers: Sequence[Answer]) -> list[Array]:
    """The vectors, or matrices, of answers."""
    return [answer.array for answer in answers]


def vectors(
    call: Call, arrays: Sequence[Array], kind: EmbeddingType, field: str, *, in_base64: bool = False
) -> list[encoding.Numbers | str]:
    """The vectors in that form, ready for JSON; base64 is of little-endian memory.

    field: the field that chose the form, for messages. in_base64: the memory of any kind.

    Raises:
        InvalidRequest: vectors that the form cannot hold.
    """
    precision: Precision
    if kind == "base64":
        precision, in_base64 = "float32", True
    else:
        precision = "float32" if kind == "float" else kind
    form: encoding.EncodingFormat = "base64" if in_base64 else "float"
    how = encoding.Encoding(form, precision, "little", call.engine.facts.calibration)
    return [encoding.value(array, form) for array in encoding.encode(arrays, how, field)]


def embedding_objects(
    embeddings: Sequence[encoding.Numbers | str], answers: Sequence[Answer]
) -> Iterator[dict[str, object]]:
    """The items of a list of embeddings, with what was cut of each input; see `vectors`."""
    for index, (embedding, answer) in enumerate(zip(embeddings, answers, strict=True)):
        yield {"object": "embedding", "embedding": embedding, "index": index, **_replies.cut(answer)}


def as_bad_request(failure: Failure) -> Failure:
    """The failure with the statuses of these APIs: an unknown model is a bad request too, and no 404."""
    return replace(failure, status=400) if isinstance(failure.error, UnknownModel) else failure


def with_their_statuses(failure: Failure) -> Failure:
    """`as_bad_request`, and wrong fields are a 422, as FastAPI has it."""
    return replace(failure, status=422) if isinstance(failure.error, ValidationError) else as_bad_request(failure)
