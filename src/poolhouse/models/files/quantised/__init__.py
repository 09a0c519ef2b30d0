"""Quantised: checkpoints whose weights are stored in a few bits, read as if they were stored in float32.

    config.json --read_quantised--> Quantised, a row of METHODS      names of tensors --Dequantised--> names without parts
    "X.weight" --Dequantised--> the parts of X are read, checked and multiplied out, one weight at a time

Tensors decide what is quantised: a module that has parts, whatever lists of modules config.json holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.files.quantised.bitsandbytes import bitsandbytes
from poolhouse.models.files.quantised.compressed_tensors import compressed_tensors
from poolhouse.models.files.quantised.fp8 import fp8
from poolhouse.models.files.quantised.packed import awq, gptq
from poolhouse.models.files.quantised.stored import Quantised, Settings, Stored, Whole

METHODS: dict[str, Callable[[Settings], Quantised]] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
}
# Where config.json says it; the second is the older name in files of compressed-tensors.
_KEYS = ("quantization_config", "compression_config")
# What weights are never stored in without scales.
_CODES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


def method_of(config: Mapping[str, object]) -> str | None:
    """What config.json calls the method that its weights are quantised by; None where they are not."""
    settings = _settings(config)
    if settings is None:
        return None
    four = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if four else "unknown")).lower()


def read_quantised(config: Mapping[str, object]) -> Quantised | None:
    """How the weights of a checkpoint are stored; None where they are not quantised.

    Raises:
        CheckpointError: a method that is not read, or settings that are not understood.
    """
    method, settings = method_of(config), _settings(config)
    if method is None or settings is None:
        return None
    if method not in METHODS:
        raise CheckpointError(
            f"config.json: weights quantised by {method!r} (quantization_config.quant_method) are not read; read are "
            f"{list(METHODS)}. Take the checkpoint that it was made from, with quantization='int8' or dtype='bfloat16' "
            "to save memory, or try model_impl='transformers', which needs the packages of that method."
        )
    try:
        return METHODS[method](settings)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"config.json: quantization_config cannot be understood: {error!r}") from error


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of how weights are stored."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(inner := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in inner.items() if key not in _KEYS}
    return plain


def bits_of(config: Mapping[str, object]) -> int | None:
    """About how many bits a weight takes in the files; None where they are not quantised."""
    settings = _settings(config)
    if settings is None:
        return None
    groups = settings.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    found = [settings.get("bits"), settings.get("w_bit"), 4 if settings.get("load_in_4bit") else None]
    found += [weights.get("num_bits") for group in groups if isinstance(weights := group.get("weights"), Mapping)]
    return min((bits for bits in found if isinstance(bits, int) and bits > 0), default=8)


def _settings(config: Mapping[str, object]) -> Settings | None:
    """Where models that read pictures have it in the part about texts, that."""
    for whole in (config, config.get("text_config")):
        if isinstance(whole, Mapping):
            for key in _KEYS:
                if isinstance(settings := whole.get(key), Mapping) and settings:
                    return settings
    return None


class Dequantised(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each quantised weight under its plain name, multiplied out when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], quantised: Quantised) -> None:
        self.quantised = quantised
        self._tensors = tensors
        parts, unused = (_ending(endings) for endings in (quantised.parts, quantised.unused))
        found: dict[str, set[str]] = {}
        for name in tensors:
            if match := parts.fullmatch(name):
                found.setdefault(match[1], set()).add(match[2])
        # A weight alone is not quantised.
        self._parts = {module: frozenset(names) for module, names in found.items() if names != {"weight"}}
        taken = {f"{module}.{part}" for module, names in self._parts.items() for part in names}
        others = [name for name in tensors if name not in taken]
        self._names = dict.fromkeys(name for name in others if not unused.fullmatch(name))
        self.unused = [name for name in others if name not in self._names]
        self._names.update(dict.fromkeys(f"{module}.weight" for module in self._parts))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        stored = self._stored(name)
        return check_plain(name, self._tensors[name]) if stored is None else self.quantised.weight(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def count(self) -> int:
        """Of weights that are quantised."""
        return len(self._parts)

    def whole(self, name: str) -> Whole | None:
        """A weight as whole numbers of int8 with a step per output; None where it is not stored so."""
        stored = self._stored(name)
        return None if stored is None else self.quantised.whole(stored)

    def _stored(self, name: str) -> Stored | None:
        module = name.removesuffix(".weight")
        parts = self._parts.get(module) if name.endswith(".weight") else None
        return None if parts is None else Stored(module, self._tensors, parts)


def check_plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor that stands for itself.

    Raises:
        CheckpointError: a weight of whole numbers or float8, whose scales are not there.
    """
    if name.endswith(".weight") and tensor.dtype in _CODES:
        raise CheckpointError(
            f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, but its scales are not there, or config.json "
            "has no quantization_config that says what they are called."
        )
    return tensor


def _ending(endings: tuple[str, ...]) -> re.Pattern[str]:
    """Splits a name into the module and one of these endings."""
    return re.compile(rf"(.+)\.({'|'.join(map(re.escape, endings))})") if endings else re.compile(r"(?!)")


__all__ = ["Dequantised", "Quantised", "bits_of", "check_plain", "method_of", "read_quantised", "unquantised"]
