"""Compressed-tensors: int8, fp8 and packed whole numbers of 1 to 8 bits, a scheme per group of modules.

    int-quantized, float-quantized, naive-quantized   weight int8 or float8_e4m3fn [out, in]
    pack-quantized   weight_packed int32: numbers of a row end to end, 2 ** (bits - 1) added; weight_shape [2]
    weight_scale     [1] for the tensor, [out, 1] for outputs, [out, in / group], [out / rows, in / columns] for blocks
    weight_zero_point   as the scales; with packed weights packed too, along the outputs

    weight = scale * (number - zero)
Source: compressed-tensors 0.20.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.files.quantised.stored import (
    SCALES,
    Quantised,
    Settings,
    Stored,
    Whole,
    blocks_of,
    choice,
    pair,
    refuse_unknown,
    scaled,
    scaled_by_block,
    unpacked,
)

_KNOWN = frozenset(
    (
        *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version"),
        *("global_compression_ratio", "sparsity_config", "transform_config"),
    )
)
_OF_GROUP = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
_OF_WEIGHTS = frozenset(
    (
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "actorder"),
        *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
    )
)
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_UNUSED = (
    *(f"{of}_{kind}" for of in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point")),
    *("input_global_scale", "output_global_scale"),
)


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the weights of a group of modules are stored.

    targets: names of modules, expressions behind "re:", or classes. strategy: what has a scale of its own.
    ordered: whether each weight has an order of its inputs.
    """

    targets: tuple[str, ...]
    packed: bool
    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]
    ordered: bool

    def __str__(self) -> str:
        numbers = f"{'fp' if self.floats else 'int'}{self.bits}{' packed' if self.packed else ''}"
        sides = {"group": f" of {self.group}", "block": f" of {self.block[0]} x {self.block[1]}"}
        return f"{numbers}, a scale per {self.strategy}{sides.get(self.strategy, '')}"


def compressed_tensors(settings: Settings) -> Quantised:
    """Weights of llm-compressor."""
    refuse_unknown(settings, _KNOWN)
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refused(f"sparsity_config.format {sparsity!r}", "Sparse weights are not read.")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise _refused("transform_config", "Activations that are rotated at each call are not computed.")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refused(f"config_groups {groups!r}", "Each group must be an object that says what its weights are.")
    schemes = tuple(
        _scheme(f"quantization_config.config_groups.{name}", group, settings.get("format"))
        for name, group in groups.items()
        if group.get("weights") is not None
    )
    notes = ("The files quantise keys and values (kv_cache_scheme); here they are not.",)
    return Quantised(
        "compressed-tensors",
        "; ".join(dict.fromkeys(map(str, schemes))),
        _PARTS,
        partial(_weight, schemes),
        partial(_whole, schemes),
        _UNUSED,
        any(group.get(f"{way}_activations") for group in groups.values() for way in ("input", "output")),
        notes if settings.get("kv_cache_scheme") else (),
    )


def _scheme(where: str, group: Mapping[str, Any], layout: str | None) -> _Scheme:
    refuse_unknown(group, _OF_GROUP, where)
    weights = group["weights"]
    refuse_unknown(weights, _OF_WEIGHTS, f"{where}.weights")
    layout = group.get("format") or layout
    if layout not in _FORMATS:
        raise _refused(f"format {layout!r}", f"Read are {list(_FORMATS)}.")
    floats = choice(weights, "type", "int", ("int", "float")) == "float"
    bits, packed = weights.get("num_bits", 8), layout == "pack-quantized"
    if bits not in (range(1, 9) if packed else (8,)) or (floats and packed):
        raise _refused(f"{where}.weights.num_bits {bits!r} of {layout}", "Whole numbers of 1 to 8 bits are, and fp8.")
    size = weights.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = choice(weights, "strategy", default, ("tensor", "channel", "group", "block"))
    if strategy == "group" and (not isinstance(size, int) or size <= 0):
        raise _refused(f"{where}.weights.group_size {size!r}", "A number of inputs is needed.")
    return _Scheme(
        targets=tuple(map(str, group.get("targets") or ())),
        packed=packed,
        bits=bits,
        floats=floats,
        symmetric=choice(weights, "symmetric", True, (True, False)),
        strategy=strategy,
        group=size if strategy == "group" else 0,
        block=pair(weights, "block_structure") if strategy == "block" else (0, 0),
        ordered=bool(weights.get("actorder"))
        and choice(weights, "actorder", None, ("weight", "static", "group", "dynamic")) in ("group", "dynamic"),
    )


def _refused(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config: {what} is not read. {why}")


def _scheme_of(schemes: Sequence[_Scheme], stored: Stored) -> _Scheme:
    """The scheme of a module: by its name, else by an expression, else that of a class.

    Raises:
        CheckpointError: none.
    """
    if len(schemes) == 1:
        return schemes[0]

    def closeness(target: str) -> int:
        if target.startswith("re:"):
            return 1 if re.match(target[3:], stored.module) else 3
        return 0 if target == stored.module else 2 if target in ("Linear", "Embedding") else 3

    found = [(closeness(target), number) for number, scheme in enumerate(schemes) for target in scheme.targets]
    best, number = min(found, default=(3, 0))
    if best == 3:
        raise stored.wrong(f"no group of config_groups names it; their targets are {[s.targets for s in schemes]}")
    return schemes[number]


def _numbers(scheme: _Scheme, stored: Stored) -> Tensor:
    """The numbers as they are stored, [out, in]."""
    if not scheme.packed:
        return stored.matrix("weight", torch.float8_e4m3fn if scheme.floats else torch.int8)
    shape = stored.shaped("weight_shape", 2).tolist()
    outputs, inputs = (int(size) for size in shape)
    words = stored.shaped("weight_packed", outputs, -(-inputs * scheme.bits // 32), dtypes=(torch.int32,))
    return unpacked(words, scheme.bits, inputs).sub_(2 ** (scheme.bits - 1))


def _scales(scheme: _Scheme, stored: Stored, outputs: int, inputs: int) -> Tensor:
    """[outputs or 1, groups]."""
    if scheme.strategy in ("tensor", "channel"):
        scales = stored.get("weight_scale", *SCALES)
        count = 1 if scheme.strategy == "tensor" else outputs
        if scales.numel() != count:
            raise stored.wrong(f"weight_scale is {list(scales.shape)}, not {count} numbers, one per {scheme.strategy}")
        return scales.view(count, 1)
    if scheme.strategy == "group" and inputs % scheme.group:
        raise stored.wrong(f"{inputs} inputs are no whole groups of {scheme.group}")
    block = (1, scheme.group) if scheme.strategy == "group" else scheme.block
    shape = blocks_of((outputs, inputs), block)
    return stored.shaped("weight_scale", *shape, dtypes=SCALES)


def _zeros(scheme: _Scheme, stored: Stored, scales: Tensor) -> Tensor | None:
    """As the scales; None where there are none."""
    if scheme.symmetric and (scheme.packed or "weight_zero_point" not in stored.parts):
        return None
    if not scheme.packed or scheme.strategy == "tensor":
        return stored.get("weight_zero_point").view(scales.shape)
    outputs, groups = scales.shape
    words = stored.shaped("weight_zero_point", -(-outputs * scheme.bits // 32), groups, dtypes=(torch.int32,))
    return unpacked(words.T, scheme.bits, outputs).sub_(2 ** (scheme.bits - 1)).T


def _weight(schemes: Sequence[_Scheme], stored: Stored) -> Tensor:
    scheme = _scheme_of(schemes, stored)
    numbers = _numbers(scheme, stored)
    scales = _scales(scheme, stored, *numbers.shape)
    zeros = _zeros(scheme, stored, scales)
    if scheme.strategy == "block":
        if zeros is not None:
            raise stored.wrong("blocks have no zero points")
        return scaled_by_block(numbers, scales, scheme.block)
    if scheme.ordered:
        stored.get("weight_g_idx")
    if scheme.strategy == "tensor":
        scales = scales.expand(len(numbers), 1)
        zeros = None if zeros is None else zeros.expand(len(numbers), 1)
    return scaled(numbers, scales, zeros, stored.groups("weight_g_idx", numbers.shape[1], scales.shape[1]))


def _whole(schemes: Sequence[_Scheme], stored: Stored) -> Whole | None:
    scheme = _scheme_of(schemes, stored)
    if scheme.floats or scheme.strategy not in ("tensor", "channel"):
        return None
    numbers = _numbers(scheme, stored).to(torch.int8)
    scales = _scales(scheme, stored, *numbers.shape)
    if _zeros(scheme, stored, scales) is not None:
        return None
    return numbers, scales.to(torch.float32).expand(len(numbers), 1).flatten()
