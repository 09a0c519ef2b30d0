"""Where a model runs and in which type of numbers: the user's words, or what suits the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from poolhouse.errors import ConfigError
from poolhouse.models.families import Family


def device_of(word: str) -> torch.device:
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise ConfigError(f"device={word!r} is not a device; try 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={word!r}, but this process sees no CUDA device.")
    return device


_DTYPES = {
    **dict.fromkeys(("float32", "float"), torch.float32),
    **dict.fromkeys(("float16", "half"), torch.float16),
    "bfloat16": torch.bfloat16,
}


def dtype_of(word: str, config: Mapping[str, Any], family: Family | None, device: torch.device) -> torch.dtype:
    """float32 on CPUs, whose half types are slow; on CUDA as stored, float32 cut to a half type that is safe."""
    if word != "auto":
        if word not in _DTYPES:
            raise ConfigError(f"dtype={word!r} is not one of {['auto', *_DTYPES]}.")
        return _DTYPES[word]
    if device.type != "cuda":
        return torch.float32
    stored = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    if stored != torch.float32:
        return stored
    return torch.float16 if family is not None and family.float16 else torch.bfloat16
