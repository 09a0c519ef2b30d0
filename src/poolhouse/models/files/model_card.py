"""Model cards: what they state and files do not, the lengths that vectors may be cut to and how to pool."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from poolhouse.errors import ConfigError
from poolhouse.models.files.checkpoint import Config
from poolhouse.params import Matryoshka

# Repository -> its Matryoshka sizes, by its model card, the full one last; () where any length may be asked for.
_MATRYOSHKA: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Qwen3-Embedding-0.6B", "Qwen3-Embedding-4B", "Qwen3-Embedding-8B"), ()),
    "embeddinggemma-300m": (128, 256, 512, 768),
    "nomic-embed-text-v1.5": (64, 128, 256, 512, 768),
    "nomic-embed-text-v2-moe": (256, 768),
    "modernbert-embed-base": (256, 768),
    "snowflake-arctic-embed-m-v1.5": (256, 768),
    "snowflake-arctic-embed-m-v2.0": (256, 768),
    "snowflake-arctic-embed-l-v2.0": (256, 1024),
    "jina-colbert-v2": (64, 96, 128),
    **dict.fromkeys(
        (f"jina-embeddings-v4-vllm-{task}" for task in ("retrieval", "text-matching", "code")),
        (128, 256, 512, 1024, 2048),
    ),
    "voyage-4-nano": (256, 512, 1024, 2048),
    "llama-nemotron-embed-1b-v2": (384, 512, 768, 1024, 2048),
    **dict.fromkeys(("Qwen3-VL-Embedding-2B", "Qwen3-VL-Embedding-8B", "dse-qwen2-2b-mrl-v1", "vdr-2b-multi-v1"), ()),
}
# Repository -> its pooling, where sentence-transformers' files are missing or broken.
_POOLINGS = {"Qwen2-7B-Instruct-embed-base": "MEAN"}


def repository(folder: Path) -> str:
    """The repository's name without its owner: of a hub cache (models--owner--name/snapshots/...), else the folder's."""
    cached = next((part for part in folder.parts if part.startswith("models--")), None)
    return folder.name if cached is None else cached.rsplit("--", 1)[-1]


def published_sizes(folder: Path, width: int) -> tuple[int, ...] | None:
    """The sizes that the model card of this repository states; None where none are known.

    A fine-tuned copy has another name, or another `width`, and is not taken for the model that it came from.
    """
    sizes = _MATRYOSHKA.get(repository(folder))
    return None if sizes and sizes[-1] != width else sizes


def published_pooling(folder: Path) -> str | None:
    """The pooling that the model card of this repository states; None where none is known."""
    return _POOLINGS.get(repository(folder))


def matryoshka_of(
    config: Config, switched_on: tuple[int, ...], width: int, folder: Path
) -> tuple[Matryoshka, tuple[str, ...]]:
    """Sizes by the user's switch, else by config.json, else by what the model card of a known repository states."""
    # jina-embeddings-v4 says it in its own words.
    stated = switched_on or config.get("matryoshka_dimensions") or config.get("matryoshka_dims") or ()
    listed = tuple(stated) if isinstance(stated, list | tuple) else (stated,)
    for size in listed:
        if not isinstance(size, int) or not 1 <= size <= width:
            raise ConfigError(f"matryoshka_dimensions: {size!r} is not a whole number from 1 to {width}.")
    if listed or "is_matryoshka" in config:
        return Matryoshka(width, bool(listed) or bool(config.get("is_matryoshka")), listed), ()
    sizes = published_sizes(folder, width)
    if sizes is None:
        return Matryoshka(width), ()
    lengths = f"{list(sizes)}" if sizes else f"any length up to {width}"
    return Matryoshka(width, True, sizes), (f"Matryoshka sizes by the model card of {repository(folder)}: {lengths}.",)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """pipeline_tag: what the hub files the model under, or "". tags, base_models: as the card lists them.

    title: its first heading, or "".
    """

    pipeline_tag: str = ""
    tags: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    title: str = ""


def read_card(folder: Path) -> ModelCard:
    """The card of a folder; an empty one where there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return ModelCard()
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(20_000)
    heading = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    title = "" if heading is None else heading[1].strip()
    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if found is None:
        return ModelCard(title=title)
    fields = _fields(found[1])
    return ModelCard(
        next(iter(fields.get("pipeline_tag", ())), ""),
        tuple(fields.get("tags", ())),
        tuple(fields.get("base_model", ())),
        title,
    )


def _fields(front: str) -> dict[str, list[str]]:
    """Fields of the first level with their values, of the little YAML that cards use, well-formed or not."""
    fields: dict[str, list[str]] = {}
    values: list[str] = []
    for line in front.splitlines():
        item = re.match(r"\s*-\s+(.*)", line)
        pair = re.match(r"(\w+)\s*:\s*(.*)", line)
        if item:
            values.append(_unquoted(item[1]))
        elif pair:
            values = fields.setdefault(pair[1], [])
            values.extend(_unquoted(value) for value in pair[2].strip("[] ").split(",") if value.strip())
    return fields


def _unquoted(value: str) -> str:
    return value.strip().strip("\"'")
