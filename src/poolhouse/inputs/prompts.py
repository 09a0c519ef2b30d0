"""Prompts: the forms in which callers write them, parsed to one form, and the named prompt of an input type."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict, TypeVar, overload

import numpy as np
import numpy.typing as npt

from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.inputs.content import Content, Image, PictureInput, TextOrContent, is_picture, parse_content, parse_image
from poolhouse.packing.tokens import Ids

if TYPE_CHECKING:
    from poolhouse.inputs.templates.score import ScoreTemplate

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class TextPrompt(TypedDict, total=False):
    """A text in the form of vLLM. text_pair: a second text, which is read together with the first.

    multi_modal_data: the pictures of its placeholders, `{"image": one or a list}`. mm_processor_kwargs: settings of the
    picture processor. multi_modal_uuids: accepted, and changes nothing.
    """

    prompt: Required[str]
    text_pair: str | None
    multi_modal_data: Mapping[str, object] | None
    mm_processor_kwargs: Mapping[str, object] | None
    multi_modal_uuids: Mapping[str, object] | None
    cache_salt: str | None


class PairPrompt(TypedDict, total=False):
    """A text, and a second text if there is one, in the form of transformers."""

    text: Required[str]
    text_pair: str | None
    cache_salt: str | None


class TokensPrompt(TypedDict, total=False):
    """Token ids, special tokens included."""

    prompt_token_ids: Required[TokenIds]
    multi_modal_data: Mapping[str, object] | None
    mm_processor_kwargs: Mapping[str, object] | None
    multi_modal_uuids: Mapping[str, object] | None
    cache_salt: str | None


class MessagesPrompt(TypedDict, total=False):
    """A conversation for the model's chat template; see `poolhouse.inputs.conversations`."""

    messages: Required[Sequence[Mapping[str, object]]]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    chat_template_kwargs: Mapping[str, object] | None
    mm_processor_kwargs: Mapping[str, object] | None


class ContentInput(TypedDict, total=False):
    """A prompt, or a query or document of a score, as a text or as parts; see `poolhouse.inputs.content`.

    mm_processor_kwargs: settings of the picture processor.
    """

    content: Required[str | Sequence[str | Mapping[str, object] | PictureInput]]
    mm_processor_kwargs: Mapping[str, object] | None


# What is one prompt wherever it stands: a text, a picture, or a dict.
_OnePrompt = str | TextPrompt | PairPrompt | TokensPrompt | MessagesPrompt | ContentInput | PictureInput
# One prompt: one of these, a pair of texts, or token ids. See `parse_prompts`.
PromptInput = _OnePrompt | tuple[str, str] | TokenIds
# One prompt or many, as `LLM` takes them. Integers are the token ids of one bare prompt; as a second list type beside
# `Iterable` they would keep mypy from inferring lists of mixed forms.
PromptsInput = _OnePrompt | Iterable[PromptInput | int]


class TextInput(TypedDict):
    """A query or a document of a score."""

    text: str


# A query or a document of a score; one or many of them. See `parse_sides`.
SideInput = str | TextInput | TextPrompt | ContentInput | PictureInput
TextsInput = SideInput | Iterable[SideInput]


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """Messages that a chat template joins to one text; `poolhouse.inputs.conversations` checks and renders them.

    add_generation_prompt: begin an answer after the last message. continue_final_message: leave that one open.
    chat_template: the text of another template, or the name of one of the model's.
    variables: further variables of the template (vLLM's chat_template_kwargs), such as `tools` and `documents`.
    add_special_tokens: whether the tokenizer adds its own around the rendered text.
    """

    messages: object
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    add_special_tokens: bool = False

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures of its messages, in order; none where a message is wrong."""
        if not isinstance(self.messages, list | tuple):
            return ()
        contents = (message.get("content") for message in self.messages if isinstance(message, Mapping))
        found: list[Image] = []
        try:
            for index, content in enumerate(contents):
                if content is not None and not isinstance(content, str):
                    found.extend(parse_content(content, f"messages[{index}].content").images)
        except InvalidRequest:
            return ()
        return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A text or two, token ids of the caller, a conversation, or texts and pictures: exactly one of these.

    ids: [tokens] int64, special tokens included. prefix: a named prompt, put before the text.
    pair: a second text, which the tokenizer joins to the first (a document to a query).
    template: joins the pair instead, bound to the request's instruction and variables.
    conversation: what `text` is rendered from, now or later; it takes no prefix.
    content: texts and pictures, from which the model's own prompt is written; stands for `text`, which is None then.
    images: the pictures of `text`, which has a placeholder for each, in order. content and images never stand together.
    pair_content: the second of a pair with pictures, whose first is `content`.
    instruction: what the model's own prompt is written with (what makes a document fit), where it reads one.
    processor_options: the request's own settings of the picture processor (vLLM's mm_processor_kwargs).
    """

    text: str | None
    ids: Ids | None = None
    prefix: str = ""
    pair: str | None = None
    template: ScoreTemplate | None = None
    conversation: Conversation | None = None
    content: Content | None = None
    images: tuple[Image, ...] = ()
    pair_content: Content | None = None
    instruction: str | None = None
    processor_options: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, content: TextOrContent) -> Prompt:
        """The prompt of one text, or of texts and pictures."""
        return cls(content) if isinstance(content, str) else cls(None, content=content)


def images_of(prompt: Prompt) -> tuple[Image, ...]:
    """The pictures of a prompt, in the order of `Request.pictures`: the caller's.

    Of messages that are wrong there are none; rendering says what is wrong.
    """
    if prompt.images:
        return prompt.images
    if prompt.conversation is not None:
        return prompt.conversation.images if prompt.text is None else ()
    if prompt.content is None:
        return ()
    return (
        prompt.content.images if prompt.pair_content is None else (*prompt.content.images, *prompt.pair_content.images)
    )


def parse_prompts(prompts: object, parameter: str = "prompts", first: int = 0) -> list[Prompt]:
    """A Prompt for each prompt of the caller, in order.

    prompts: `PromptsInput`, unchecked: a text, `{"prompt": text}`, a pair `{"text": text, "text_pair": text}`,
    `{"prompt_token_ids": ids}`, `{"messages": [...]}`, `{"content": [parts]}`, a picture, a list of ids, or many of these
    and of pairs (text, text): a list, an array, a column, or another iterable. A list of two texts is two prompts.
    `{"prompt": text, "multi_modal_data": {"image": one or a list}}` is a text with a placeholder per picture.
    parameter: the caller's name of this argument, for messages. first: the index of its first prompt.

    Raises:
        InvalidRequest: naming the path of the wrong value, and what is accepted there.
    """
    return [
        Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in check_prompts(prompts, parameter, first)
    ]


def check_prompts(prompts: object, parameter: str = "prompts", first: int = 0) -> list[str | Prompt]:
    """`parse_prompts`, where a plain text stays what it is: a `Prompt` takes some times its memory."""
    if isinstance(prompts, str | Mapping) or _is_ids(prompts) or is_picture(prompts):
        return [_parse(prompts, parameter)]
    many = each(prompts, parameter)
    if not isinstance(many, list | tuple):
        many = list(many)
    if _is_ids(many):
        return [_parse(many, parameter)]
    if not many:
        raise InvalidRequest("You must pass at least one prompt", parameter)
    return [
        prompt if type(prompt) is str else _parse(prompt, f"{parameter}[{index}]")
        for index, prompt in enumerate(many, first)
    ]


Item = TypeVar("Item")


@overload
def each(items: Iterable[Item], parameter: str, wanted: str | None = None) -> Iterable[Item]: ...


@overload
def each(items: object, parameter: str, wanted: str | None = None) -> Iterable[object]: ...


def each(items: object, parameter: str, wanted: str | None = None) -> Iterable[object]:
    """The items of a list, an array, a column of a table, a generator ... as Python's own objects, to be read once.

    wanted: what is accepted, for messages.

    Raises:
        InvalidRequest: a value without items, without an order, or with columns.
    """
    if isinstance(items, list | tuple):
        return items
    if isinstance(items, np.ndarray) and items.ndim and items.dtype.kind in "biufcSV":
        return list(items)
    if isinstance(items, str | Mapping | bytes | bytearray | memoryview):
        raise _wrong(items, parameter, wanted)
    if isinstance(items, set | frozenset):
        raise InvalidRequest(f"{parameter} is a {type(items).__name__}, which has no order; give a list.", parameter)
    if hasattr(items, "columns") or hasattr(items, "column_names"):
        raise InvalidRequest(
            f"{parameter} is a table ({type(items).__name__}); give one of its columns, such as table['text'].",
            parameter,
        )
    # numpy, torch and pandas; pyarrow; polars.
    for name in ("tolist", "to_pylist", "to_list"):
        convert = getattr(items, name, None)
        if callable(convert):
            converted = convert()
            # An array without a dimension is one item.
            return converted if isinstance(converted, list) else [converted]
    if not isinstance(items, Iterable):
        raise _wrong(items, parameter, wanted)
    return items


def parse_texts(texts: object, parameter: str) -> list[TextOrContent]:
    """The queries, or the documents, of a score, in order; what holds no picture is a text.

    texts: `TextsInput`, unchecked: a text, `{"text": text}`, `{"prompt": text}`, `{"content": [parts]}`, a picture, or many
    of these, as `each` reads them.

    Raises:
        InvalidRequest: naming the path of the wrong value, and what is accepted there.
    """
    if isinstance(texts, str | Mapping) or is_picture(texts):
        return [_text_of(texts, parameter)]
    return [
        item if type(item) is str else _text_of(item, f"{parameter}[{index}]")
        for index, item in enumerate(each(texts, parameter, _TEXTS_WANTED))
    ]


Role = Literal["query", "document"]
# Names of a role in sentence-transformers, Cohere, Voyage, NVIDIA, Jina and Google, and of prompts in checkpoints.
_ROLE_NAMES: Mapping[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "retrieval.query", "code.query", "retrieval_query", "s2p_query"),
    # A picture is a document in Cohere's API.
    "document": (
        *("document", "passage", "search_document", "corpus", "image"),
        *("retrieval.passage", "code.passage", "retrieval_document"),
    ),
}
# Input types of Cohere's and Jina's APIs that a model without tasks may ignore: its vectors serve every use.
_OTHER_USES = ("classification", "clustering", "separation", "text-matching", "semantic_similarity")


def role_of(input_type: str | None) -> Role | None:
    """The role in a search that an input type names; None where it names none."""
    name = (input_type or "").lower()
    return next((role for role, names in _ROLE_NAMES.items() if name in names), None)


def prompt_of(input_type: str, prompts: Mapping[str, str], others: Sequence[str] = ()) -> str | None:
    """The name of the prompt for an input type; None where the model has none for it.

    prompts: those of the checkpoint, by name. others: its tasks, where it reads each in a way of its own.

    Raises:
        InvalidRequest: neither a known input type nor the name of a prompt.
    """
    names = {name.lower(): name for name in prompts}
    input_name = input_type.lower()
    role = role_of(input_name)
    for candidate in (input_name, *(_ROLE_NAMES[role] if role else ())):
        if candidate in names:
            return names[candidate]
    if role is None and input_name not in (map(str.lower, others) if others else _OTHER_USES):
        known = sorted({*prompts, *others, "query", "document"})
        raise InvalidRequest(
            f"Unsupported input_type '{input_type}'.{did_you_mean(input_type, known)} Supported values: {known}",
            "input_type",
            input_type,
        )
    return None


def check_ids(ids: Ids, vocabulary_size: int, parameter: str = "prompt_token_ids") -> None:
    """Raise InvalidRequest for an id without a vector in the model."""
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if len(wrong):
        raise InvalidRequest(f"Token id {int(wrong[0])} is out of vocabulary", parameter)


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: a lone surrogate is not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Keys of vLLM's prompts without an effect here: there is no prefix cache to salt, and pictures are told by their bytes.
_WITHOUT_EFFECT = ("cache_salt", "multi_modal_uuids", "prompt")
_PROCESSOR = "mm_processor_kwargs"
_TEXTS_WANTED = "a text, a picture, a dict with 'text' or 'content' (a list of parts), or a list of them"
_PROMPT_WANTED = (
    "a text, a pair of texts, a picture, a list of token ids, or a dict with 'prompt', 'content' or 'prompt_token_ids'"
)


def _text_of(item: object, path: str) -> TextOrContent:
    if isinstance(item, str):
        return str(item)
    if is_picture(item):
        return Content((parse_image(item, path),))
    if not isinstance(item, Mapping):
        raise _wrong(item, path, _TEXTS_WANTED)
    for key in ("text", "prompt"):
        if isinstance(item.get(key), str):
            if item.get("multi_modal_data"):
                raise InvalidRequest(
                    f"{path}: the prompt of a score is the model's own; give its pictures as parts of 'content'.", path
                )
            return str(item[key])
    if item.get(_PROCESSOR):
        raise InvalidRequest(f"{path} has '{_PROCESSOR}'; a score has one for all its pictures, beside them.", path)
    parts = item.get("content")
    if not isinstance(parts, str | list) or not (parts or isinstance(parts, str)):
        raise InvalidRequest(f"{path} must hold {_TEXTS_WANTED}.", path)
    return _text_or_content(parts, f"{path}.content")


def _text_or_content(parts: object, path: str) -> TextOrContent:
    content = parse_content(parts, path)
    return content if content.images else content.text


def _parse(prompt: object, path: str) -> Prompt:
    if isinstance(prompt, str):
        # numpy has its own class of texts.
        return Prompt(str(prompt))
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt, path)
    if is_picture(prompt):
        return Prompt(None, content=Content((parse_image(prompt, path),)))
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str):
        return _pair(prompt, path)
    if isinstance(prompt, list | tuple | np.ndarray):
        return Prompt(None, _ids(prompt, path))
    raise _wrong(prompt, path)


def _pair(texts: Sequence[object], path: str) -> Prompt:
    if len(texts) != 2:
        raise InvalidRequest(f"{path} holds {len(texts)} texts; a pair has two.", path)
    if not isinstance(texts[1], str):
        raise _wrong(texts[1], f"{path}[1]", "the second text of a pair")
    return Prompt(str(texts[0]), pair=str(texts[1]))


def _parse_mapping(prompt: Mapping[str, object], path: str) -> Prompt:
    # Typed clients write null for a field that they leave out.
    prompt = {key: value for key, value in prompt.items() if value is not None}
    if "messages" in prompt:
        return _parse_conversation(prompt, path)
    known = ("prompt", "prompt_token_ids", "messages", "content", "text", "text_pair", "multi_modal_data", _PROCESSOR)
    for key, value in prompt.items():
        if key == "prompt_embeds" and value:
            raise InvalidRequest(f"{path}: '{key}' is not supported; give a text or token ids.", f"{path}.{key}")
        if key not in (*known, *_WITHOUT_EFFECT, "prompt_embeds"):
            raise InvalidRequest(
                f"{path} has an unknown key '{key}'.{did_you_mean(str(key), known)} Keys: {list(known)}.", path
            )
    options = _processor_options(prompt, path)
    images = _images(prompt.get("multi_modal_data", {}), f"{path}.multi_modal_data")
    parsed = _parse_text(prompt, path, bool(images))
    if options and not (images or parsed.content):
        raise InvalidRequest(f"{path} has '{_PROCESSOR}' and no picture.", f"{path}.{_PROCESSOR}")
    return replace(parsed, images=images, processor_options=options) if images or options else parsed


def _parse_text(prompt: Mapping[str, object], path: str, pictures: bool) -> Prompt:
    """The text, ids or content of a prompt. pictures: whether it has some beside them."""
    present = [key for key in ("prompt_token_ids", "content", "text", "prompt") if key in prompt]
    # vLLM's prompts may hold their ids beside their text.
    if ("content" in present and len(present) > 1) or present == ["text", "prompt"]:
        raise InvalidRequest(f"{path} has {' and '.join(map(repr, present[::-1]))}; give one of them.", path)
    pair = prompt.get("text_pair")
    if pair is not None and (pictures or present[:1] in (["prompt_token_ids"], ["content"])):
        what = "token ids" if "prompt_token_ids" in present else "pictures"
        hint = "a pair is of texts" if what == "token ids" else "score reads pairs with pictures"
        raise InvalidRequest(f"{path} has 'text_pair' beside {what}; {hint}.", path)
    if "content" in prompt:
        if pictures:
            raise InvalidRequest(f"{path} has 'content' and 'multi_modal_data'; give pictures as parts of one.", path)
        return Prompt.of(_text_or_content(prompt["content"], f"{path}.content"))
    if "prompt_token_ids" in prompt:
        ids = prompt["prompt_token_ids"]
        if not isinstance(ids, list | tuple | np.ndarray):
            raise _wrong(ids, f"{path}.prompt_token_ids")
        return Prompt(None, _ids(ids, f"{path}.prompt_token_ids"))
    text = prompt.get("text", prompt.get("prompt"))
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{path} needs 'prompt' or 'text' (a text), 'content' (a list of parts), 'prompt_token_ids' (a list of "
            "integers) or 'messages'.",
            path,
        )
    if not isinstance(pair, str | None):
        raise _wrong(pair, f"{path}.text_pair", "a text")
    return Prompt(text, pair=pair)


def _processor_options(prompt: Mapping[str, object], path: str) -> Mapping[str, object]:
    options = prompt.get(_PROCESSOR, {})
    if not isinstance(options, Mapping):
        raise _wrong(options, f"{path}.{_PROCESSOR}", "a dict of settings of the picture processor")
    return options


def _images(data: object, path: str) -> tuple[Image, ...]:
    """The pictures of vLLM's `multi_modal_data`."""
    if not isinstance(data, Mapping):
        raise _wrong(data, path, "a dict with 'image', one picture or a list of them")
    for medium, value in data.items():
        if medium != "image" and value is not None:
            raise InvalidRequest(f"{path} has {medium!r}; pictures are read, under 'image'.", path)
    given = data.get("image")
    if isinstance(given, Mapping):
        raise InvalidRequest(f"{path}.image holds vectors of pictures; give the pictures themselves.", path)
    several = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    one = not isinstance(given, list | tuple)
    return tuple(
        parse_image(source, f"{path}.image" if one else f"{path}.image[{index}]")
        for index, source in enumerate(several)
    )


def _parse_conversation(prompt: Mapping[str, object], path: str) -> Prompt:
    switches = ("add_generation_prompt", "continue_final_message", "add_special_tokens")
    known = ("messages", *switches, "chat_template_kwargs", _PROCESSOR)
    for key, value in prompt.items():
        if key not in known:
            raise InvalidRequest(
                f"{path} has an unknown key '{key}' beside 'messages'.{did_you_mean(str(key), known)} "
                f"Keys: {list(known)}.",
                path,
            )
        if key in switches and not isinstance(value, bool):
            raise InvalidRequest(f"{path}.{key} must be true or false, got {value!r}.", f"{path}.{key}")
    # Checked where they are rendered.
    variables: Any = prompt.get("chat_template_kwargs") or {}
    on = [name in prompt and prompt[name] is True for name in switches]
    return Prompt(
        None,
        conversation=Conversation(
            prompt["messages"],
            add_generation_prompt=on[0],
            continue_final_message=on[1],
            add_special_tokens=on[2],
            variables=variables,
        ),
        processor_options=_processor_options(prompt, path),
    )


def _is_ids(prompts: object) -> bool:
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1 and prompts.dtype.kind in "iu"
    return isinstance(prompts, list | tuple) and len(prompts) > 0 and _is_integer(prompts[0])


def _ids(ids: Any, path: str) -> Ids:
    if len(ids) == 0:
        raise InvalidRequest(f"{path} is an empty list of token ids.", path)
    if not isinstance(ids, np.ndarray):
        for index, value in enumerate(ids):
            if not _is_integer(value):
                raise _wrong(value, f"{path}[{index}]", "a token id (an integer)")
        try:
            ids = np.array(ids, dtype=np.int64)
        except OverflowError:
            raise InvalidRequest(f"{path} holds a token id that is out of vocabulary", path) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidRequest(f"{path} must be a flat list of integers, got {ids.dtype}{list(ids.shape)}.", path)
    return ids.astype(np.int64, copy=False)  # type: ignore[no-any-return]


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _wrong(value: object, path: str, wanted: str | None = None) -> InvalidRequest:
    shown = "null" if value is None else type(value).__name__
    if (isinstance(value, float) and math.isnan(value)) or shown in ("NAType", "NaTType"):
        shown = f"{value!r}, a missing value".replace("nan", "NaN")
    elif isinstance(value, bytes | bytearray):
        shown += ", not text: decode it"
    return InvalidRequest(f"{path} is {shown}; it must be {wanted or _PROMPT_WANTED}.", path)
