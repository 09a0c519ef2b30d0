"""Tiny random checkpoints, run by us and by transformers, and the difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from poolhouse.models.files.checkpoint import Checkpoint
from poolhouse.models.load_native import Loaded, load_transformer
from poolhouse.models.native.families import family_of, spec_of
from poolhouse.models.native.transformer import Transformer
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens

# Ragged, two of equal length, one of a single token; longer than the windows and original lengths in the tests.
LENGTHS = (3, 17, 1, 30, 12, 30)


@dataclass(frozen=True)
class Parity:
    """One row of docs/models.md.

    error: largest difference to the reference, relative to its largest number; of probabilities, the difference itself.
    packing_error: packed against alone.
    architecture, tasks: of a whole model, compared from text to answer; empty for a bare backbone.
    examples: models of the hub that the row speaks for.
    """

    model: str
    path: str
    reference: str
    error: float
    packing_error: float
    architecture: str = ""
    tasks: tuple[str, ...] = ()
    examples: str = ""


Record = Callable[[Parity], None]


def save(folder: Path, family: str, options: dict[str, Any], model: str | None = None) -> None:
    """A tiny random checkpoint with weights large enough that every part of a block matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    made = getattr(transformers, model or f"{family}Model")(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, drop: str | None = None, add: dict[str, Tensor] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop or "", None)
    save_file(tensors | (add or {}), folder / "model.safetensors")


def load(folder: Path, dtype: torch.dtype = torch.float32, int8: bool = False) -> Loaded:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    assert family is not None
    spec = spec_of(family, checkpoint.config, checkpoint.folder)
    return load_transformer(family, spec, checkpoint.config, checkpoint, dtype, torch.device("cpu"), int8=int8)


def texts() -> list[Tokens]:
    random = np.random.default_rng(0)
    return [Tokens(random.integers(5, 99, length)) for length in LENGTHS]


def packed(transformer: Transformer) -> list[Tensor]:
    return list(transformer(Batch.pack(texts())).split(LENGTHS))


def alone(transformer: Transformer) -> list[Tensor]:
    return [transformer(Batch.pack([text])) for text in texts()]


def reference(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = getattr(transformers, f"{family}Model").from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(text.ids)[None]).last_hidden_state[0] for text in texts()]


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference in any text, relative to the largest number expected there."""
    pairs = zip(got, expected, strict=True)
    return max(float((g.float() - e.float()).abs().max() / e.float().abs().max()) for g, e in pairs)
