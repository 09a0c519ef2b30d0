"""Tiny random checkpoints of the shapes, and tokens of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from poolhouse.bench.shapes import SHAPES, Written, checkpoint
from poolhouse.models.files.hub import embedded_model


def tiny(name: str, cache: Path) -> Written:
    """A shape of two layers of 32 features."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    if SHAPES[name].family == "Qwen3":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    return checkpoint(name, cache, 2, sizes)


def tokens_of(text: str) -> int:
    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    tokenizer.no_padding()
    return len(tokenizer.encode(text).ids)
