"""What model cards state and files do not: the vector lengths that some published models were trained for."""

from __future__ import annotations

from pathlib import Path

# Repository -> its Matryoshka sizes, by its model card; () where any length up to the full one may be asked for.
_MATRYOSHKA: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Qwen3-Embedding-0.6B", "Qwen3-Embedding-4B", "Qwen3-Embedding-8B"), ()),
    "embeddinggemma-300m": (128, 256, 512, 768),
    "nomic-embed-text-v1.5": (64, 128, 256, 512, 768),
    "nomic-embed-text-v2-moe": (256, 768),
    "modernbert-embed-base": (256, 768),
    "snowflake-arctic-embed-m-v1.5": (256, 768),
    "snowflake-arctic-embed-m-v2.0": (256, 768),
    "snowflake-arctic-embed-l-v2.0": (256, 1024),
    "voyage-4-nano": (256, 512, 1024, 2048),
    "llama-nemotron-embed-1b-v2": (384, 512, 768, 1024, 2048),
}


def repository(folder: Path) -> str:
    """The repository's name without its owner: of a hub cache (models--owner--name/snapshots/...), else the folder's."""
    cached = next((part for part in folder.parts if part.startswith("models--")), None)
    return folder.name if cached is None else cached.rsplit("--", 1)[-1]


def published_sizes(folder: Path, width: int) -> tuple[int, ...] | None:
    """The sizes up to `width` that the model card of this repository states; None where none are known.

    A fine-tuned copy has another name, and is not taken for the model that it came from.
    """
    sizes = _MATRYOSHKA.get(repository(folder))
    return None if sizes is None else tuple(size for size in sizes if size <= width)
