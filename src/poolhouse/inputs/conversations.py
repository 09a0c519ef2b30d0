"""Conversations: messages rendered by a chat template into one text.

The text is that of transformers' `apply_chat_template`; which messages are accepted and refused is as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from poolhouse.errors import InvalidRequest
from poolhouse.files import DEFAULT, Folder, chat_templates, special_tokens
from poolhouse.inputs.content import Content, Image, parse_content
from poolhouse.inputs.prompts import Conversation, Prompt

if TYPE_CHECKING:
    from poolhouse.inputs.templates.sandbox import Contents

ContentFormat = Literal["auto", "string", "openai"]

_NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the "
    "tokenizer does not define one."
)
_RESERVED = ("chat_template", "tokenize", "messages", "add_generation_prompt", "continue_final_message")
# Marks the end of a message; of the private use area. The blank shows whether the template trimmed that end.
_END = "\ue0f6 "


@dataclass(frozen=True, slots=True, eq=False)
class Conversations:
    """The chat templates of a model.

    templates: by name. special_tokens: bos_token and its like, which templates may write.
    content_format: how contents are passed to templates: as texts ("string"), lists of parts ("openai"), or as each
    template reads them ("auto").
    placeholder: the text of a picture in prompts, of models that read pictures. A template that reads parts writes it
    itself; in texts the placeholders of a message's pictures come first, a line each, as in vLLM.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    content_format: ContentFormat = "auto"
    placeholder: str = ""

    @classmethod
    def of(
        cls,
        folder: Path | Folder,
        chat_template: str | None = None,
        content_format: ContentFormat = "auto",
        placeholder: str = "",
    ) -> Conversations:
        """The templates of a tokenizer's folder. chat_template: the text of one to use instead.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        folder = Folder.of(folder)
        templates = chat_templates(folder) if chat_template is None else {DEFAULT: chat_template}
        return cls(templates, special_tokens(folder), content_format, placeholder)

    def prompt(
        self,
        messages: object,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        variables: Mapping[str, object] | None = None,
        add_special_tokens: bool = False,
    ) -> Prompt:
        """The prompt of one conversation.

        messages: mappings with `role` and `content`: a text, or a list of parts, texts and pictures. Other fields go
            to the template.
        For the other arguments see `Conversation`.

        Raises:
            InvalidRequest: invalid messages, no template, or one that fails.
        """
        return self.rendered(
            Conversation(
                messages,
                add_generation_prompt,
                continue_final_message,
                chat_template,
                variables or {},
                add_special_tokens,
            )
        )

    def rendered(self, conversation: Conversation) -> Prompt:
        """The same for the conversation of a parsed prompt."""
        variables = _checked_variables(conversation)
        name, template = self._template(conversation.chat_template, variables)
        from poolhouse.inputs.templates import sandbox  # imports jinja2, which most models do not need

        if self.content_format == "auto":
            reads = sandbox.contents_of(template, name)
        else:
            reads = sandbox.Contents(parts=self.content_format == "openai", wrapped=True)
        messages, images = _messages(conversation.messages, reads, self.placeholder)
        if conversation.continue_final_message:
            _mark_end(messages[-1])
        variables = {"tools": None, "documents": None, **self.special_tokens, **variables}
        variables |= {"messages": messages, "add_generation_prompt": conversation.add_generation_prompt}
        text = sandbox.render(template, variables, name)
        text = _up_to_mark(text) if conversation.continue_final_message else text
        return Prompt(text, conversation=conversation, images=images)

    def _template(self, chosen: str | None, variables: Mapping[str, object]) -> tuple[str, str]:
        """The name of the template, for messages, and its text."""
        if chosen is not None and chosen not in self.templates:
            return "given chat template", chosen
        name = chosen
        if name is None:
            name = "tool_use" if variables.get("tools") is not None and "tool_use" in self.templates else DEFAULT
        if not self.templates:
            raise InvalidRequest(_NO_TEMPLATE)
        if name not in self.templates:
            raise InvalidRequest(
                f"This model has several chat templates and none of them is the default: choose one of "
                f"{sorted(self.templates)} by chat_template.",
                "chat_template",
            )
        return "chat template" if name == DEFAULT else f"chat template ({name})", self.templates[name]


def _checked_variables(conversation: Conversation) -> dict[str, object]:
    if conversation.add_generation_prompt and conversation.continue_final_message:
        raise InvalidRequest(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    if not isinstance(conversation.variables, Mapping):
        raise InvalidRequest("chat_template_kwargs must be an object.", "chat_template_kwargs")
    for name in _RESERVED:
        if name in conversation.variables:
            raise InvalidRequest(f"chat_template_kwargs: '{name}' is reserved.", f"chat_template_kwargs.{name}")
    return _plain(conversation.variables, "chat_template_kwargs")


# The content of a message as a template reads it.
_Read = str | list[dict[str, str]]


def _messages(messages: object, reads: Contents, placeholder: str) -> tuple[list[dict[str, object]], tuple[Image, ...]]:
    """Copies of the messages, with contents in the form that the template reads, and their pictures."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest("messages must be a list of at least one message.", "messages")
    copies = []
    images: list[Image] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{path} must be an object with 'role' (a text) and 'content'.", path)
        # A field that is null means the same as no field, and templates expect the latter.
        others = {name: value for name, value in message.items() if name != "content" and value is not None}
        copy = _plain(others, path)
        content = message.get("content")
        if content is not None:
            parsed = parse_content(content, f"{path}.content")
            images.extend(parsed.images)
            copy["content"] = _content(content, parsed, reads, placeholder)
        copies.append(copy)
    return copies, tuple(images)


def _content(content: object, parsed: Content, reads: Contents, placeholder: str) -> _Read:
    """A content as the template reads it. parsed: its parts."""
    if isinstance(content, str) and not (reads.parts and reads.wrapped):
        return str(content)
    if reads.parts:
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parsed.parts]
    texts = [part for part in parsed.parts if isinstance(part, str)]
    return "\n".join([placeholder] * len(parsed.images) + texts)


def _mark_end(message: dict[str, object]) -> None:
    """Put the mark at the end of the message."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END
    elif isinstance(content, list) and content and content[-1]["type"] == "text":
        content[-1]["text"] += _END
    else:
        raise InvalidRequest("continue_final_message: the last message ends with no text to continue.", "messages")


def _up_to_mark(text: str) -> str:
    """The text before the mark, trimmed where the template trims messages."""
    index = text.rfind(_END.strip())
    if index < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not show the end of the last message.",
            "continue_final_message",
        )
    kept = text[:index]
    return kept if text.startswith(_END, index) else kept.rstrip()


def _plain(values: Mapping[str, object], path: str) -> dict[str, object]:
    """A copy, of plain data only: a template may call the methods of an object that it sees."""
    try:
        copy: dict[str, object] = json.loads(json.dumps(dict(values)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} must hold plain data, as JSON has it: {error}", path) from error
    return copy
