"""The forms in which callers may give prompts, made equal at the edge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict, TypeVar, overload

import numpy as np
import numpy.typing as npt

from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.packing.tokens import Ids

if TYPE_CHECKING:
    from poolhouse.inputs.templates.score import ScoreTemplate

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class TextPrompt(TypedDict, total=False):
    """A text as vLLM writes it. text_pair: a second text, which is read together with the first."""

    prompt: Required[str]
    text_pair: str | None
    cache_salt: str | None


class PairPrompt(TypedDict, total=False):
    """A text as transformers writes it, and the text that it is read together with, if there is one."""

    text: Required[str]
    text_pair: str | None
    cache_salt: str | None


class TokensPrompt(TypedDict, total=False):
    """Token ids, special tokens included."""

    prompt_token_ids: Required[TokenIds]
    cache_salt: str | None


class MessagesPrompt(TypedDict, total=False):
    """A conversation for the model's chat template; see `poolhouse.inputs.conversations`."""

    messages: Required[Sequence[Mapping[str, object]]]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    chat_template_kwargs: Mapping[str, object] | None


# One prompt: a text, a pair of texts, token ids, or a dict. See `parse_prompts`.
PromptInput = str | tuple[str, str] | TokenIds | TextPrompt | PairPrompt | TokensPrompt | MessagesPrompt
# One prompt or many, as `LLM` takes them. Integers are the token ids of one bare prompt; as a second list type beside
# `Iterable` they would keep mypy from inferring lists of mixed forms.
PromptsInput = str | TextPrompt | PairPrompt | TokensPrompt | MessagesPrompt | Iterable[PromptInput | int]


class TextInput(TypedDict):
    """A text of a score by itself, or beside others in a dict of the caller's."""

    text: str


class ContentInput(TypedDict):
    """A text of a score as OpenAI's messages write it: a text, or a list of text parts."""

    content: str | Sequence[str | Mapping[str, str]]


# The queries, or the documents, of a score: one text or many. See `parse_texts`.
TextsInput = str | TextInput | TextPrompt | ContentInput | Iterable[str | TextInput | TextPrompt | ContentInput]

# Options of vLLM's prompt dictionaries that change nothing here: there is no prefix cache to salt.
_WITHOUT_EFFECT = ("cache_salt", "multi_modal_uuids", "prompt")
_MEDIA = ("multi_modal_data", "mm_processor_kwargs", "prompt_embeds")


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """Messages that a chat template makes one text of; what they must be is said in `poolhouse.inputs.conversations`.

    chat_template: another than the model's: its text, or the name of one of the model's.
    variables: what the template sees beside them (vLLM's chat_template_kwargs).
    add_special_tokens: whether the tokenizer adds its own around what the template wrote.
    """

    messages: object
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A text or two, token ids that somebody else made, or a conversation: exactly one of the three.

    ids: [tokens] int64, special tokens included. prefix: a named prompt, put before the text.
    pair: a second text, which the tokenizer joins to the first (a document to a query).
    template: what joins a pair instead, with the words of its request; None leaves it to the model.
    conversation: what `text` was made of, or is to be made of; it takes no prefix.
    """

    text: str | None
    ids: Ids | None = None
    prefix: str = ""
    pair: str | None = None
    template: ScoreTemplate | None = None
    conversation: Conversation | None = None


def parse_prompts(prompts: object, parameter: str = "prompts", first: int = 0) -> list[Prompt]:
    """One Prompt for each that the caller gave, in order; a single prompt may stand bare.

    prompts: a text, `{"prompt": text}`, a pair `{"text": text, "text_pair": text}`, `{"prompt_token_ids": ids}`,
    `{"messages": [...]}`, a list of ids, or many of these and of pairs (text, text): a list, an array, a column, or
    anything else that gives them one by one. Two texts in a list of their own are two prompts.
    parameter: what the caller calls this argument, for messages. first: the number of its first prompt.

    Raises:
        InvalidRequest: naming the place and what may stand there.
    """
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [_parse(prompts, parameter)]
    many = each(prompts, parameter)
    if not isinstance(many, list | tuple):
        many = list(many)
    if _is_ids(many):
        return [_parse(many, parameter)]
    if not many:
        raise InvalidRequest("You must pass at least one prompt", parameter)
    return [
        Prompt(prompt) if type(prompt) is str else _parse(prompt, f"{parameter}[{index}]")
        for index, prompt in enumerate(many, first)
    ]


Item = TypeVar("Item")


@overload
def each(items: Iterable[Item], parameter: str, wanted: str | None = None) -> Iterable[Item]: ...


@overload
def each(items: object, parameter: str, wanted: str | None = None) -> Iterable[object]: ...


def each(items: object, parameter: str, wanted: str | None = None) -> Iterable[object]:
    """Many items as Python's own objects, to be read once: of a list, an array, a column of a table, a generator ...

    Raises:
        InvalidRequest: what holds no items, has no order, or has columns.
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
    # Of numpy and torch, pandas, pyarrow, and polars.
    for name in ("tolist", "to_pylist", "to_list"):
        convert = getattr(items, name, None)
        if callable(convert):
            converted = convert()
            # An array without a dimension is one item.
            return converted if isinstance(converted, list) else [converted]
    if not isinstance(items, Iterable):
        raise _wrong(items, parameter, wanted)
    return items


def parse_texts(side: object, parameter: str) -> list[str]:
    """The texts of one side of a score, in order; a single one may stand bare.

    side: a text, `{"text": text}`, `{"prompt": text}`, `{"content": [text parts]}`, or many of these, as `each` reads them.

    Raises:
        InvalidRequest: naming the place and what may stand there.
    """
    if isinstance(side, str | Mapping):
        return [_text_of(side, parameter)]
    return [
        item if type(item) is str else _text_of(item, f"{parameter}[{index}]")
        for index, item in enumerate(each(side, parameter, _SIDE))
    ]


def text_parts(parts: Sequence[object], place: str) -> list[str]:
    """The texts of a message's or a document's parts: texts themselves, or `{"type": "text", "text": text}`.

    Raises:
        InvalidRequest: naming the first part of another kind.
    """
    texts: list[str] = []
    for number, part in enumerate(parts):
        kind = (part.get("type") or "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) and kind in _TEXTS else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else kind
            raise InvalidRequest(f"{place}[{number}] is {kind!r}; this model reads text parts only.", place)
        texts.append(text)
    return texts


def check_ids(ids: Ids, vocabulary_size: int, parameter: str = "prompt_token_ids") -> None:
    """Raise InvalidRequest for an id that the model has no vector for."""
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if len(wrong):
        raise InvalidRequest(f"Token id {int(wrong[0])} is out of vocabulary", parameter)


# Types of parts that are text, in the chat API and in the newer one for responses.
_TEXTS = ("text", "input_text", "output_text")
_SIDE = "a text, a dict with 'text' or 'content' (a list of text parts), or a list of them"


def _text_of(item: object, place: str) -> str:
    if isinstance(item, str):
        return str(item)
    if not isinstance(item, Mapping):
        raise _wrong(item, place, _SIDE)
    for key in ("text", "prompt"):
        if isinstance(item.get(key), str):
            return str(item[key])
    parts = item.get("content")
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{place} must hold {_SIDE}.", place)
    return "".join(text_parts(parts, f"{place}.content"))


def _parse(prompt: object, place: str) -> Prompt:
    if isinstance(prompt, str):
        # Not numpy's kind of text.
        return Prompt(str(prompt))
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt, place)
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str):
        return _pair(prompt, place)
    if isinstance(prompt, list | tuple | np.ndarray):
        return Prompt(None, _ids(prompt, place))
    raise _wrong(prompt, place)


def _pair(texts: Sequence[object], place: str) -> Prompt:
    if len(texts) != 2:
        raise InvalidRequest(f"{place} holds {len(texts)} texts; a pair has two.", place)
    if not isinstance(texts[1], str):
        raise _wrong(texts[1], f"{place}[1]", "the second text of a pair")
    return Prompt(str(texts[0]), pair=str(texts[1]))


def _parse_mapping(prompt: Mapping[str, object], place: str) -> Prompt:
    # Typed clients write null for what they leave out, and keys tell the forms apart.
    prompt = {key: value for key, value in prompt.items() if value is not None}
    if "messages" in prompt:
        return _parse_conversation(prompt, place)
    known = ("prompt", "prompt_token_ids", "messages", "text", "text_pair", "cache_salt")
    for key, value in prompt.items():
        if key in _MEDIA and value:
            raise InvalidRequest(
                f"{place}: '{key}' is not supported by this model, which reads text.", f"{place}.{key}"
            )
        if key not in (*known, *_WITHOUT_EFFECT, *_MEDIA):
            raise InvalidRequest(
                f"{place} has an unknown key '{key}'.{did_you_mean(str(key), known)} Keys: {list(known)}.", place
            )
    if "prompt_token_ids" in prompt:
        if prompt.get("text_pair") is not None:
            raise InvalidRequest(f"{place} has 'text_pair' beside token ids; a pair is of texts.", place)
        ids = prompt["prompt_token_ids"]
        if not isinstance(ids, list | tuple | np.ndarray):
            raise _wrong(ids, f"{place}.prompt_token_ids")
        return Prompt(None, _ids(ids, f"{place}.prompt_token_ids"))
    if "text" in prompt and "prompt" in prompt:
        raise InvalidRequest(f"{place} has 'prompt' and 'text'; give one of them.", place)
    text, pair = prompt.get("text", prompt.get("prompt")), prompt.get("text_pair")
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{place} needs 'prompt' or 'text' (a text), 'prompt_token_ids' (a list of integers) or 'messages'.", place
        )
    if not isinstance(pair, str | None):
        raise _wrong(pair, f"{place}.text_pair", "a text")
    return Prompt(text, pair=pair)


def _parse_conversation(prompt: Mapping[str, object], place: str) -> Prompt:
    switches = ("add_generation_prompt", "continue_final_message", "add_special_tokens")
    known = ("messages", *switches, "chat_template_kwargs")
    for key, value in prompt.items():
        if key not in known:
            raise InvalidRequest(
                f"{place} has an unknown key '{key}' beside 'messages'.{did_you_mean(str(key), known)} "
                f"Keys: {list(known)}.",
                place,
            )
        if key in switches and not isinstance(value, bool):
            raise InvalidRequest(f"{place}.{key} must be true or false, got {value!r}.", f"{place}.{key}")
    # What they must be is said where they are rendered.
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
    )


def _is_ids(prompts: object) -> bool:
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1 and prompts.dtype.kind in "iu"
    return isinstance(prompts, list | tuple) and len(prompts) > 0 and _is_integer(prompts[0])


def _ids(given: Any, place: str) -> Ids:
    if len(given) == 0:
        raise InvalidRequest(f"{place} is an empty list of token ids.", place)
    if not isinstance(given, np.ndarray):
        for index, value in enumerate(given):
            if not _is_integer(value):
                raise _wrong(value, f"{place}[{index}]", "a token id (an integer)")
        try:
            given = np.array(given, dtype=np.int64)
        except OverflowError:
            raise InvalidRequest(f"{place} holds a token id that is out of vocabulary", place) from None
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InvalidRequest(f"{place} must be a flat list of integers, got {given.dtype}{list(given.shape)}.", place)
    return given.astype(np.int64, copy=False)  # type: ignore[no-any-return]


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


_PROMPT = "a text, a pair of texts, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"


def _wrong(value: object, place: str, wanted: str | None = None) -> InvalidRequest:
    shown = "null" if value is None else type(value).__name__
    if (isinstance(value, float) and math.isnan(value)) or shown in ("NAType", "NaTType"):
        shown = f"{value!r}, a missing value".replace("nan", "NaN")
    elif isinstance(value, bytes | bytearray):
        shown += ", not text: decode it"
    return InvalidRequest(f"{place} is {shown}; it must be {wanted or _PROMPT}.", place)


def is_unicode(text: str) -> bool:
    """Whether a text can be written at all: a lone surrogate cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


Role = Literal["query", "document"]
# One idea, as sentence-transformers, Cohere, Voyage, NVIDIA, Jina and Google write it; checkpoints name prompts likewise.
_WORDS: Mapping[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "retrieval.query", "retrieval_query", "s2p_query"),
    "document": ("document", "passage", "search_document", "corpus", "retrieval.passage", "retrieval_document"),
}
# Words of Cohere's and Jina's APIs that a model without such a prompt may ignore: its vectors serve every use, unless
# it has tasks.
_OTHER_USES = ("classification", "clustering", "separation", "text-matching", "semantic_similarity")


def role_of(input_type: str | None) -> Role | None:
    """The side of a search that a text stands on, or None where the word says no side."""
    word = (input_type or "").lower()
    return next((role for role, words in _WORDS.items() if word in words), None)


def prompt_of(input_type: str, prompts: Mapping[str, str], others: Sequence[str] = ()) -> str | None:
    """The name of the prompt that this input type means, or None where the model has none for it.

    prompts: those of the checkpoint, by name. others: its tasks, where it has a way of its own to read for each.

    Raises:
        InvalidRequest: neither a known input type nor the name of a prompt.
    """
    names = {name.lower(): name for name in prompts}
    word = input_type.lower()
    role = role_of(word)
    for candidate in (word, *(_WORDS[role] if role else ())):
        if candidate in names:
            return names[candidate]
    if role is None and word not in (map(str.lower, others) if others else _OTHER_USES):
        known = sorted({*prompts, *others, "query", "document"})
        raise InvalidRequest(
            f"Unsupported input_type '{input_type}'.{did_you_mean(input_type, known)} Supported values: {known}",
            "input_type",
            input_type,
        )
    return None
