"""The forms in which callers may give prompts, made equal at the edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.tokens import Ids

if TYPE_CHECKING:
    from poolhouse.inputs.chat import ScoreTemplate

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

    messages: Any
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A text, token ids that somebody else made, or a conversation: exactly one of the three.

    ids: [tokens] int64, special tokens included. prefix: a named prompt, put before the text.
    pair: a second text, which the tokenizer joins to the first (a document to a query).
    template: what joins a pair instead, with the words of its request.
    conversation: what `text` was made of, or is to be made of; it takes no prefix.
    """

    text: str | None
    ids: Ids | None = None
    prefix: str = ""
    pair: str | None = None
    template: ScoreTemplate | None = None
    conversation: Conversation | None = None


def parse_prompts(prompts: Any, parameter: str = "prompts") -> list[Prompt]:
    """One Prompt for each that the caller gave, in order; a single prompt may stand bare.

    prompts: a text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, `{"messages": [...]}`, a list of ids, or a list
    of any of these.
    parameter: what the caller calls this argument, for messages.

    Raises:
        InvalidRequest: naming the place and what may stand there.
    """
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [_parse(prompts, parameter)]
    if isinstance(prompts, np.ndarray):
        prompts = list(prompts)
    if not isinstance(prompts, list | tuple):
        raise _wrong(prompts, parameter)
    if not prompts:
        raise InvalidRequest("You must pass at least one prompt", parameter)
    return [
        Prompt(prompt) if type(prompt) is str else _parse(prompt, f"{parameter}[{index}]")
        for index, prompt in enumerate(prompts)
    ]


def parse_side(side: Any, parameter: str) -> list[str]:
    """The texts of one side of a score, in order; a single one may stand bare.

    side: a text, `{"text": text}`, `{"prompt": text}`, `{"content": [text parts]}`, or a list of any of these.

    Raises:
        InvalidRequest: naming the place and what may stand there.
    """
    if isinstance(side, str | Mapping):
        return [_text_of(side, parameter)]
    if not isinstance(side, list | tuple):
        raise _wrong(side, parameter, _SIDE)
    return [item if type(item) is str else _text_of(item, f"{parameter}[{index}]") for index, item in enumerate(side)]


def text_parts(parts: Sequence[Any], place: str) -> list[str]:
    """The texts of a message's or a document's parts: texts themselves, or `{"type": "text", "text": text}`.

    Raises:
        InvalidRequest: naming the first part of another kind.
    """
    texts: list[str] = []
    for number, part in enumerate(parts):
        typed = isinstance(part, Mapping) and (part.get("type") or "text") in _TEXTS
        text = part.get("text") if typed else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
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


def _text_of(item: Any, place: str) -> str:
    if isinstance(item, str):
        return item
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


def _parse(prompt: Any, place: str) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt, place)
    if isinstance(prompt, list | tuple | np.ndarray):
        return Prompt(None, _ids(prompt, place))
    raise _wrong(prompt, place)


def _parse_mapping(prompt: Mapping[str, Any], place: str) -> Prompt:
    # Typed clients write null for what they leave out, and keys tell the forms apart.
    prompt = {key: value for key, value in prompt.items() if value is not None}
    if "messages" in prompt:
        return _parse_conversation(prompt, place)
    known = ("prompt", "prompt_token_ids", "messages", "cache_salt")
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
        ids = prompt["prompt_token_ids"]
        if not isinstance(ids, list | tuple | np.ndarray):
            raise _wrong(ids, f"{place}.prompt_token_ids")
        return Prompt(None, _ids(ids, f"{place}.prompt_token_ids"))
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{place} needs 'prompt' (a text), 'prompt_token_ids' (a list of integers) or 'messages'.", place
        )
    return Prompt(text)


def _parse_conversation(prompt: Mapping[str, Any], place: str) -> Prompt:
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
    variables = prompt.get("chat_template_kwargs") or {}
    asked = {name: prompt[name] for name in switches if name in prompt}
    return Prompt(None, conversation=Conversation(prompt["messages"], variables=variables, **asked))


def _is_ids(prompts: Any) -> bool:
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


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _wrong(
    value: Any, place: str, wanted: str = "a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"
) -> InvalidRequest:
    shown = "null" if value is None else type(value).__name__
    return InvalidRequest(f"{place} is {shown}; it must be {wanted}.", place)
