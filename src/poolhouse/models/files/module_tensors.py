"""The tensors of one module of a sentence-transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from poolhouse.errors import CheckpointError


def module_tensors(place: Path) -> dict[str, Tensor]:
    """The tensors in a module's folder by name.

    Raises:
        CheckpointError: no weights, or none that can be read.
    """
    safe, pickle = place / "model.safetensors", place / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        if pickle.is_file():
            tensors: dict[str, Tensor] = torch.load(pickle, map_location="cpu", weights_only=True)
            return tensors
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{place}: the weights cannot be read: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{place}: {pickle.name} cannot be read as plain weights: {error}") from error
    raise CheckpointError(f"{place} has no weights. Looked for {safe.name} and {pickle.name}.")


def find_tensor(tensors: Mapping[str, Tensor], kind: str, place: Path, needed: bool = True) -> Any:
    """The weight or bias of a module's only layer, whatever the layer is called.

    Raises:
        CheckpointError: there is none, and it is needed.
    """
    for name in (f"linear.{kind}", f"dense.{kind}", f"norm.{kind}", kind):
        if name in tensors:
            return tensors[name]
    if needed:
        raise CheckpointError(f"{place}: no {kind} among the tensors {sorted(tensors)}.")
    return None
