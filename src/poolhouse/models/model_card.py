"""ModelCard: what the front matter of a README says about a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelCard:
    """pipeline_tag: what the hub files the model under, or "". tags, base_models: as the card lists them."""

    pipeline_tag: str = ""
    tags: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()


def read_card(folder: Path) -> ModelCard:
    """The card of a folder; an empty one where there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return ModelCard()
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(20_000)
    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if found is None:
        return ModelCard()
    fields = _fields(found[1])
    return ModelCard(
        next(iter(fields.get("pipeline_tag", ())), ""),
        tuple(fields.get("tags", ())),
        tuple(fields.get("base_model", ())),
    )


def _fields(front: str) -> dict[str, list[str]]:
    """Fields of the first level with their words: the little of YAML that cards use."""
    fields: dict[str, list[str]] = {}
    own: list[str] = []
    for line in front.splitlines():
        item = re.match(r"\s*-\s+(.*)", line)
        pair = re.match(r"(\w+)\s*:\s*(.*)", line)
        if item:
            own.append(_word(item[1]))
        elif pair:
            own = fields.setdefault(pair[1], [])
            own.extend(_word(word) for word in pair[2].strip("[] ").split(",") if word.strip())
    return fields


def _word(text: str) -> str:
    return text.strip().strip("\"'")
