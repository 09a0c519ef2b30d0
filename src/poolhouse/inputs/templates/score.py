"""Score templates: a query and a document rendered into the one prompt that a reranker was trained on.

A template is Jinja, run in the sandbox. It sees two messages with the roles `query` and `document`, `instruction` where
the request has one, variables of the request, and `seam`, which splits the prompt into parts that are tokenised one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from poolhouse.errors import InvalidRequest, did_you_mean

# Of the private use area, so that no text of a human language holds it.
SEAM = "\ue0f5"

_FOLDER = Path(__file__).parent
_RESERVED = ("chat_template", "tools", "tokenize", "messages", "seam")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTemplate:
    """A template, and its input beside the two texts.

    name: for messages. variables: what the template sees. system: text of a system message before the two, or "".
    special_tokens: whether the tokenizer adds its own around the prompt.
    structured: contents are lists of parts, as in OpenAI's messages. instruction_as_system: the instruction is the
    system message (sentence-transformers' way). keep_last_newline: False drops it, as transformers does.
    """

    name: str
    text: str
    variables: Mapping[str, object] = field(default_factory=dict)
    system: str = ""
    special_tokens: bool = True
    structured: bool = False
    instruction_as_system: bool = False
    keep_last_newline: bool = True

    def bind(self, instruction: str | None = None, variables: Mapping[str, object] | None = None) -> ScoreTemplate:
        """This template with the instruction and the variables of a request, rendered once to check it.

        Raises:
            InvalidRequest: a reserved variable, an instruction that the template ignores, or a template that does not
                compile, raises, or ignores a text.
        """
        for name in variables or {}:
            if name in _RESERVED:
                raise InvalidRequest(f"chat_template_kwargs: '{name}' is reserved.", f"chat_template_kwargs.{name}")
        plain = replace(self, variables={**self.variables, **(variables or {})})
        bound = _with_instruction(plain, instruction)
        rendered = bound.render("alpha", "bravo")
        for role, pair in (("query", ("charlie", "bravo")), ("document", ("alpha", "foxtrot"))):
            if bound.render(*pair) == rendered:
                raise InvalidRequest(f"The score template ({self.name}) does not show the {role}.", "chat_template")
        if instruction and _with_instruction(plain, instruction + "?").render("alpha", "bravo") == rendered:
            raise InvalidRequest(f"The score template ({self.name}) reads no instruction.", "instruction")
        return bound

    def render(self, query: str, document: str, prefix: str = "") -> str:
        """The prompt of a pair. prefix: a prompt stored with the checkpoint, which becomes the system message.

        Raises:
            InvalidRequest: the template fails on these texts.
        """
        messages = [self._message("query", query), self._message("document", document)]
        if self.system or prefix:
            messages.insert(0, self._message("system", self.system or prefix))
        from poolhouse.inputs.templates import sandbox  # imports jinja2, which most models do not need

        variables = {**_DEFAULTS, **self.variables, "messages": messages}
        return sandbox.render(self.text, variables, f"score template ({self.name})", self.keep_last_newline)

    def _message(self, role: str, text: str) -> dict[str, object]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}


def _with_instruction(template: ScoreTemplate, instruction: str | None) -> ScoreTemplate:
    if not instruction:
        return template
    system = instruction if template.instruction_as_system else template.system
    return replace(template, variables={**template.variables, "instruction": instruction}, system=system)


_DEFAULTS: Mapping[str, object] = {"seam": SEAM, "add_generation_prompt": False, "tools": None, "documents": None}


def score_template(source: str) -> ScoreTemplate:
    """The template of the option `chat_template`: its text, the name of a built-in one, or a file.

    Raises:
        InvalidRequest: none of these.
    """
    if "{{" in source or "{%" in source or "\n" in source:
        return ScoreTemplate("given as text", source)
    if source in built_in():
        return ScoreTemplate(source, (_FOLDER / f"{source}.jinja").read_text(encoding="utf-8"))
    path = Path(source).expanduser()
    try:
        return ScoreTemplate(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"chat_template={source!r} is neither a template's text, nor a file, nor a built-in name: {built_in()}."
            f"{did_you_mean(source, built_in())} ({error})",
            "chat_template",
        ) from error


def built_in() -> list[str]:
    """Names of the templates in this package."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))
