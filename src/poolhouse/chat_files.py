"""What a model folder says of chats: its templates, and the special tokens that templates write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poolhouse.errors import CheckpointError
from poolhouse.json_files import read_json

# The name of the template that serves where none is named.
DEFAULT = "default"


def chat_templates(folder: Path) -> dict[str, str]:
    """Templates by name, from the first of the places where transformers keeps them.

    They are chat_template.jinja with additional_chat_templates/, tokenizer_config.json, and the older
    chat_template.json.

    Raises:
        CheckpointError: a file that is no text.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    if files:
        return {name: _text(path) for name, path in files.items()}
    return _stored(folder / "tokenizer_config.json") or _stored(folder / "chat_template.json")


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and their like, by these names."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in read_json(folder / file, needed=False).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _stored(path: Path) -> dict[str, str]:
    """The templates of a JSON file: one text, or a list of named ones."""
    stored: Any = read_json(path, needed=False).get("chat_template")
    if isinstance(stored, str):
        return {DEFAULT: stored}
    items = stored if isinstance(stored, list) else ()
    named = {item.get("name"): item.get("template") for item in items if isinstance(item, dict)}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
