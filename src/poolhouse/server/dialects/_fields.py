"""Fields that the bodies of several routes share, with vLLM's names and defaults."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from poolhouse.engine.request import Request
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import Conversation, Prompt, images_of, parse_prompts
from poolhouse.params import PoolingParams
from poolhouse.server.engines import Engines
from poolhouse.server.wire.body import without_nulls
from poolhouse.tasks import Task

ItemT = TypeVar("ItemT")
# A list of which only the first wrong item is reported: a report of millions would stop the server for minutes.
Many = Annotated[list[ItemT], Field(fail_fast=True)]


def _counted(value: object, info: ValidationInfo) -> object:
    if isinstance(value, list) and isinstance(info.context, Engines):
        info.context.check_items(len(value), info.field_name or "items")
    return value


# The objects that a request asks about, counted before each is read: that takes seconds for a million.
Items = Annotated[Many[ItemT], BeforeValidator(_counted)]

# vLLM's former names of use_activation.
_FORMER_NAMES = ("normalize", "softmax", "activation")
_TEXT: JsonDict = {"type": "string"}
# Names of labels that a request brings.
LABEL_NAMES: JsonDict = {"type": "array", "items": _TEXT, "minItems": 1}
_IDS: JsonDict = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PAIR: JsonDict = {"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 2}
_URL: JsonDict = {"anyOf": [_TEXT, {"type": "object", "properties": {"url": _TEXT}, "required": ["url"]}]}
_PART: JsonDict = {
    "anyOf": [
        _TEXT,
        {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]},
        {"type": "object", "properties": {"image_url": _URL}, "required": ["image_url"]},
    ]
}
_CONTENT: JsonDict = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_MESSAGE: JsonDict = {
    "type": "object",
    "properties": {"role": _TEXT, "content": {"anyOf": [_CONTENT, {"type": "null"}]}},
    "required": ["role"],
}
_CONVERSATION: JsonDict = {"type": "array", "items": _MESSAGE, "minItems": 1}
_PROMPT: JsonDict = {
    "type": "object",
    "anyOf": [
        {"properties": {"prompt": _TEXT}, "required": ["prompt"]},
        {"properties": {"text": _TEXT, "text_pair": {"type": ["string", "null"]}}, "required": ["text"]},
        {"properties": {"prompt_token_ids": _IDS}, "required": ["prompt_token_ids"]},
        {"properties": {"messages": _CONVERSATION}, "required": ["messages"]},
        {"properties": {"content": _CONTENT}, "required": ["content"]},
    ],
}
_INPUT_FORMS: list[JsonValue] = [
    _TEXT,
    _IDS,
    _PROMPT,
    {"type": "array", "items": {"anyOf": [_TEXT, _IDS, _PAIR, _PROMPT]}, "minItems": 1},
]
INPUT_SCHEMA: JsonDict = {"anyOf": _INPUT_FORMS}
_INPUT_OR_NULL: JsonDict = {"anyOf": [*_INPUT_FORMS, {"type": "null"}]}


# Which sentences of documents stay; checked by PruningParams.parse.
PRUNE = Field(
    None,
    description="Keep the sentences of documents that answer the query, for models with a head for it: a threshold from 0 "
    "to 1, true for the model's own, or an object of threshold, keep_first, sentences and rule.",
    json_schema_extra={
        "anyOf": [
            {"type": "number", "minimum": 0, "maximum": 1},
            {"type": "boolean"},
            {"type": "object"},
            {"type": "null"},
        ]
    },
)


class Nested(BaseModel):
    """An object within a body: its nulls too count as fields left out, as `read_json` does outside."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, value: object) -> object:
        return without_nulls(value) if isinstance(value, dict) else value


class Strict(BaseModel):
    """A body whose values must have the types of its fields; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Lenient(BaseModel):
    """A body of vLLM's: "5" and 5.0 are numbers, "true" and 1 are yes, as shells and templates write them.

    Unknown fields are ignored, as OpenAI's servers do.
    """

    model_config = ConfigDict(extra="ignore", strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and info.field_name in _numbers(cls):
            raise PydanticCustomError("number_type", "Input should be a valid number")
        return value


@cache
def _numbers(fields: type[BaseModel]) -> frozenset[str]:
    """The fields that hold a number."""
    kinds = {name: get_args(field.annotation) or (field.annotation,) for name, field in fields.model_fields.items()}
    return frozenset(name for name, types in kinds.items() if int in types or float in types)


class Common(Lenient):
    """What every route of vLLM understands."""

    model: str | None = Field(None, description="A served model; none takes the first.")
    user: str | None = None
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="Cut prompts to this many tokens; -1 cuts to the model's limit; none refuses longer ones.",
    )
    truncation_side: Literal["left", "right"] | None = None
    padding: Literal["max_length", "do_not_pad"] | None = Field(None, description="Without effect: nothing is padded.")
    use_activation: bool | None = Field(
        None, description="Normalise embeddings, make probabilities of logits; none leaves it to the model."
    )
    adapter: str | None = Field(None, description='An adapter of the model; "" uses none.')
    request_id: str | None = Field(None, max_length=256)
    priority: int = Field(0, ge=-(2**63), lt=2**63, description="Lower ones go first.")
    cache_salt: str | None = Field(None, min_length=1, max_length=1024, description="Without effect.")
    mm_processor_kwargs: dict[str, object] | None = Field(
        None, description="How large pictures are read: min_pixels, max_pixels, size. Other keys are refused."
    )

    @model_validator(mode="before")
    @classmethod
    def _understand_former_names(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        for name in _FORMER_NAMES:
            if body.get(name) is None:
                continue
            warnings.warn(
                f"Parameter `{name}` was renamed; use `use_activation` instead.", DeprecationWarning, stacklevel=1
            )
            if body.get("use_activation") is None:
                body = {**body, "use_activation": body[name]}
        return body

    def params(self, **more: Any) -> PoolingParams:
        """How to cut and pool; more: fields that one route has beside the common ones."""
        return PoolingParams(
            use_activation=self.use_activation,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            **more,
        )


class Inputs(Common):
    """Prompts of one request: texts or token ids, or a conversation."""

    # Checked by parse_prompts: a schema union over thousands of texts would be slower than answering them.
    input: object = Field(
        None,
        description="A text, token ids, a prompt object, or a list of them and of pairs of texts.",
        json_schema_extra=_INPUT_OR_NULL,
    )
    messages: list[object] | None = Field(
        None,
        description="A conversation (or, for embeddings, a list of them) that the chat template renders.",
        json_schema_extra={"anyOf": [_CONVERSATION, {"type": "array", "items": _CONVERSATION}, {"type": "null"}]},
    )
    add_special_tokens: bool | None = Field(None, description="Default: true; false for messages.")
    prompt_name: str | None = Field(None, description='A prompt of the checkpoint ("query"); "" uses none.')
    input_type: str | None = Field(None, description="What the texts are: query, document, or a prompt's name.")
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = Field(None, description="Refused unless --trust-request-chat-template.")
    chat_template_kwargs: dict[str, object] | None = None
    media_io_kwargs: dict[str, object] | None = Field(None, description="Refused: pictures are read as RGB, on white.")

    def prompts(self, engines: Engines) -> list[Prompt]:
        """The prompts, one per text, list of ids, or conversation.

        Raises:
            InvalidRequest: naming the field.
        """
        if self.input is not None and self.messages is not None:
            raise InvalidRequest("Give input or messages, not both.", "messages")
        if not {"input", "messages"} & self.model_fields_set:
            raise InvalidRequest("Give input (texts or token ids) or messages (a conversation).", "input")
        conversations = _conversations(self.input if self.messages is None else self.messages)
        if conversations is None and self.messages is not None:
            raise InvalidRequest("messages must hold messages, each with a role and content.", "messages")
        if conversations is None:
            engines.check_list(self.input, "input")
            prompts = parse_prompts(self.input, "input")
            engines.check_items(len(prompts), "input")
            return prompts
        engines.check_items(len(conversations), "messages")
        check_chat_template(engines, self.chat_template)
        special = bool(self.add_special_tokens)
        return [
            Prompt(
                None,
                conversation=Conversation(
                    conversation,
                    self.add_generation_prompt,
                    self.continue_final_message,
                    self.chat_template,
                    self.chat_template_kwargs or {},
                    special,
                ),
            )
            for conversation in conversations
        ]

    def requests(self, engines: Engines, task: Task, params: PoolingParams) -> list[Request]:
        """One engine request per prompt.

        Raises:
            InvalidRequest: naming the field.
        """
        refuse_media_io(self.media_io_kwargs)
        options = processor_options(self.mm_processor_kwargs)
        special = self.add_special_tokens is not False
        return [
            Request(
                with_options(prompt, options),
                task,
                params,
                prompt_name=self.prompt_name,
                add_special_tokens=special,
                adapter=self.adapter,
                input_type=self.input_type,
                priority=self.priority,
            )
            for prompt in self.prompts(engines)
        ]


# What a request may set of the picture processor, and how many pixels it may ask for: larger pictures are a way to fill
# the memory. It is the limit of Qwen3-VL's own files.
_PROCESSOR_OPTIONS = ("min_pixels", "max_pixels", "size")
_MAX_PIXELS = 4096 * 4096


def processor_options(options: Mapping[str, object] | None) -> Mapping[str, object]:
    """A request's mm_processor_kwargs.

    Raises:
        InvalidRequest: an option that is not for requests, or a size that is none.
    """
    for name, value in (options or {}).items():
        if name not in _PROCESSOR_OPTIONS:
            raise InvalidRequest(
                f"mm_processor_kwargs: '{name}' is not for requests; they may set {', '.join(_PROCESSOR_OPTIONS)}.",
                "mm_processor_kwargs",
            )
        for number in value.values() if name == "size" and isinstance(value, dict) else [value]:
            if type(number) is not int or not 1 <= number <= _MAX_PIXELS:
                raise InvalidRequest(
                    f"mm_processor_kwargs.{name}: a number of pixels is an integer from 1 to {_MAX_PIXELS}.",
                    "mm_processor_kwargs",
                )
    return options or {}


def with_options(prompt: Prompt, options: Mapping[str, object]) -> Prompt:
    """A prompt whose pictures are read with these options of the processor, and with its own over them.

    Raises:
        InvalidRequest: options of its own that are not for requests.
    """
    own = processor_options(prompt.processor_options)
    return replace(prompt, processor_options={**options, **own}) if options and images_of(prompt) else prompt


def refuse_media_io(options: Mapping[str, object] | None) -> None:
    """Raise InvalidRequest for options of how pictures are decoded."""
    if options:
        raise InvalidRequest(
            "media_io_kwargs is not for requests: pictures are read as RGB, what is transparent on white.",
            "media_io_kwargs",
        )


def check_chat_template(engines: Engines, template: str | None) -> None:
    """Raise InvalidRequest for a chat template in a request, unless the server trusts them."""
    if template is not None and not engines.settings.trust_request_chat_template:
        raise InvalidRequest(
            "chat_template of a request is not allowed; the server must be started with --trust-request-chat-template.",
            "chat_template",
        )


def _conversations(value: object) -> list[list[object]] | None:
    """Conversations: of a list of messages one, of a list of such lists several, of anything else none."""
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, dict) and "role" in item for item in value):
        return [value]
    if all(isinstance(item, list) and item and isinstance(item[0], dict) for item in value):
        return list(value)
    return None
