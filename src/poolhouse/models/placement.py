"""Placement: on which device a model runs and in which type of numbers, by the user or by what suits the machine."""

from __future__ import annotations

import torch

from poolhouse.errors import ConfigError
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families import Family


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: none that models run on, or one that this machine or this torch lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device; {_POSSIBLE}.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={name!r} is not served; {_POSSIBLE}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but this process sees no CUDA device.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but the CUDA devices are 0 to {torch.cuda.device_count() - 1}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"device={name!r}, but this torch sees no Metal device (mps); it needs macOS on Apple silicon."
        )
    return device


_POSSIBLE = "try 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'"
_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


def dtype_of(name: str, config: Config, family: Family | None, device: torch.device) -> torch.dtype:
    """The type of that name; for "auto" one that suits the device.

    That is float32 on CPUs, whose half types are slow; on CUDA as stored, float32 cut to a half type that is safe.

    Raises:
        ConfigError: a name of none that models run in.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"dtype={name!r} is not one of {['auto', *_DTYPES]}.")
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    stored = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    if stored != torch.float32:
        return stored
    return torch.float16 if family is not None and family.float16 else torch.bfloat16
