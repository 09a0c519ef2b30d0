"""Conversations: messages rendered by a chat template into the one text that the model reads.

Rendered as transformers' `apply_chat_template` does; what a message may hold, and what is refused, is as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from poolhouse.errors import InvalidRequest
from poolhouse.files import DEFAULT, Folder, chat_templates, special_tokens
from poolhouse.inputs.prompts import Conversation, Prompt, text_parts

if TYPE_CHECKING:
    from poolhouse.inputs.templates.content_format import Contents

ContentFormat = Literal["auto", "string", "openai"]

_NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the "
    "tokenizer does not define one."
)
_RESERVED = ("chat_template", "tokenize", "messages", "add_generation_prompt", "continue_final_message")
# Of the private use area. The blank shows whether the template trimmed the end of a message.
_END = "\ue0f6 "


@dataclass(frozen=True, slots=True, eq=False)
class Conversations:
    """The chat templates of a model.

    templates: by name. special_tokens: bos_token and its like, which templates may write.
    content_format: what templates expect of contents: texts ("string"), lists of parts ("openai"), or whichever they
    read.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    content_format: ContentFormat = "auto"

    @classmethod
    def of(
        cls, folder: Path | Folder, chat_template: str | None = None, content_format: ContentFormat = "auto"
    ) -> Conversations:
        """Those of a tokenizer's folder. chat_template: the text of the one to use instead.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        folder = Folder.of(folder)
        templates = chat_templates(folder) if chat_template is None else {DEFAULT: chat_template}
        return cls(templates, special_tokens(folder), content_format)

    def prompt(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> Prompt:
        """The prompt of one conversation.

        messages: mappings with `role`, and `content`: a text, or a list of text parts. Other fields go to the template.
        add_generation_prompt: begin an answer after the last message. continue_final_message: leave that one open.
        chat_template: another than the model's: its text, or the name of one of the model's.
        variables: what the template sees beside the messages, `tools` and `documents` among them.
        add_special_tokens: whether the tokenizer adds its own around what the template wrote.

        Raises:
            InvalidRequest: messages that are none, no template, or one that fails.
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

    def rendered(self, asked: Conversation) -> Prompt:
        """The same, of a conversation that waits to be rendered."""
        variables = _checked_variables(asked)
        name, template = self._template(asked.chat_template, variables)
        from poolhouse.inputs.templates import content_format, sandbox  # draw in jinja2, which most models do without

        if self.content_format == "auto":
            reads = content_format.contents_of(template, name)
        else:
            reads = content_format.Contents(parts=self.content_format == "openai", wrapped=True)
        messages = _messages(asked.messages, reads)
        if asked.continue_final_message:
            _leave_open(messages[-1])
        seen = {"tools": None, "documents": None, **self.special_tokens, **variables}
        seen |= {"messages": messages, "add_generation_prompt": asked.add_generation_prompt}
        text = sandbox.render(template, seen, name)
        return Prompt(_up_to_the_end(text) if asked.continue_final_message else text, conversation=asked)

    def _template(self, chosen: str | None, variables: Mapping[str, Any]) -> tuple[str, str]:
        """What to call the template, and its text."""
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


def _checked_variables(asked: Conversation) -> dict[str, Any]:
    if asked.add_generation_prompt and asked.continue_final_message:
        raise InvalidRequest(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    if not isinstance(asked.variables, Mapping):
        raise InvalidRequest("chat_template_kwargs must be an object.", "chat_template_kwargs")
    for name in _RESERVED:
        if name in asked.variables:
            raise InvalidRequest(f"chat_template_kwargs: '{name}' is reserved.", f"chat_template_kwargs.{name}")
    plain: dict[str, Any] = _plain(dict(asked.variables), "chat_template_kwargs")
    return plain


def _messages(given: Any, reads: Contents) -> list[dict[str, Any]]:
    """Copies of the messages, with contents in the form that the template reads."""
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise InvalidRequest("messages must be a list of at least one message.", "messages")
    messages = []
    for number, message in enumerate(given):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{place} must be an object with 'role' (a text) and 'content'.", place)
        # A field that is null is as good as absent, which templates take better.
        others = {name: value for name, value in message.items() if name != "content" and value is not None}
        made = _plain(others, place)
        content = message.get("content")
        if content is not None:
            made["content"] = _content(content, f"{place}.content", reads)
        messages.append(made)
    return messages


def _content(content: Any, place: str, reads: Contents) -> str | list[dict[str, str]]:
    """A content as the template reads it."""
    if isinstance(content, str) and not (reads.parts and reads.wrapped):
        return str(content)
    if not isinstance(content, str | list | tuple):
        raise InvalidRequest(f"{place} must be a text or a list of text parts.", place)
    texts = [content] if isinstance(content, str) else text_parts(content, place)
    return [{"type": "text", "text": text} for text in texts] if reads.parts else "\n".join(texts)


def _leave_open(message: dict[str, Any]) -> None:
    """Mark where the message ends."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END
    elif content:
        content[-1]["text"] += _END
    else:
        raise InvalidRequest("continue_final_message: the last message has no text to continue.", "messages")


def _up_to_the_end(text: str) -> str:
    """What stands before the mark, trimmed where the template trims messages."""
    place = text.rfind(_END.strip())
    if place < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not show the end of the last message.",
            "continue_final_message",
        )
    kept = text[:place]
    return kept if text.startswith(_END, place) else kept.rstrip()


def _plain(value: Any, place: str) -> Any:
    """A copy of plain data: a template may call the methods of whatever it sees."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{place} must hold plain data, as JSON has it: {error}", place) from error
