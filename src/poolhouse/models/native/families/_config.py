"""Reading config.json: what several families read under the same keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poolhouse.errors import CheckpointError
from poolhouse.layers.feed_forward import ACTIVATIONS
from poolhouse.layers.positions import RopeSpec
from poolhouse.models.files.checkpoint import Config


class NotNative(CheckpointError):
    """A config that means something our Transformer does not compute; transformers may."""


def activation(config: Config, key: str, default: str) -> str:
    """The name of the activation under `key`, checked to be one that we have."""
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise NotNative(f"config.json: {key} is {name!r}, which is not among {sorted(ACTIVATIONS)}.")
    return str(name)


def refuse(config: Config, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise for a key that changes numbers and holds a value the family does not honour.

    allowed: key -> the values that mean what we compute; an absent key is fine.
    """
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise NotNative(f"config.json: {key} is {config[key]!r}; the native family handles only {values}.")


_POOLINGS = {"avg": "MEAN", "mean": "MEAN", "cls": "CLS", "last": "LAST", "max": "MAX"}


def pooling(config: Config, key: str) -> str | None:
    """Our name of the pooling under `key`, None where there is no such key.

    Raises:
        CheckpointError: one that we do not have.
    """
    name = config.get(key)
    if name is None:
        return None
    if name not in _POOLINGS:
        raise CheckpointError(f"config.json: {key} is {name!r}, which is not among {sorted(_POOLINGS)}.")
    return _POOLINGS[name]


def rope(config: Config, head_dim: int, theta: float, layer_type: str | None = None) -> RopeSpec:
    """Rotary positions from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    theta: default of the family. layer_type: entry to take where there is one per kind of layer.
    """
    # Where a file has both, transformers lets the older key win.
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if layer_type is not None and isinstance(found.get(layer_type), Mapping):
        found = dict(found[layer_type])
    kind = found.get("rope_type", found.get("type", "default"))
    base = float(found.get("rope_theta", config.get("rope_theta", theta)) or theta)
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0
    dim = int(head_dim * partial)
    longest = int(config.get("max_position_embeddings") or 0)
    original = int(
        config.get("original_max_position_embeddings") or found.get("original_max_position_embeddings") or longest
    )
    factor = float(found.get("factor") or (longest / original if original else 1.0))
    if kind in ("default", "mrope"):
        # Positions of three axes, of models that read pictures; "mrope" is the older name of their plain angles.
        return RopeSpec(
            dim, base, sections=tuple(found.get("mrope_section") or ()),
            interleaved=bool(found.get("mrope_interleaved")),
        )  # fmt: skip
    if kind == "linear":
        return RopeSpec(dim, base, "linear", factor)
    if kind == "dynamic":
        return RopeSpec(dim, base, "dynamic", factor, original_length=longest)
    if kind == "llama3":
        return RopeSpec(
            dim, base, "llama3", factor, original_length=original,
            low_frequency_factor=float(found["low_freq_factor"]),
            high_frequency_factor=float(found["high_freq_factor"]),
        )  # fmt: skip
    if kind == "yarn":
        return RopeSpec(
            dim, base, "yarn", factor, original_length=original,
            beta_fast=float(found.get("beta_fast") or 32), beta_slow=float(found.get("beta_slow") or 1),
            truncate=found.get("truncate", True), attention_factor=found.get("attention_factor"),
            mscale=found.get("mscale"), mscale_all_dim=found.get("mscale_all_dim"),
        )  # fmt: skip
    if kind in ("longrope", "su"):
        return RopeSpec(
            dim, base, "longrope", factor, original_length=original,
            attention_factor=found.get("attention_factor"),
            short_factor=tuple(found["short_factor"]), long_factor=tuple(found["long_factor"]),
        )  # fmt: skip
    raise NotNative(f"config.json: rope type {kind!r} is not one of default, linear, dynamic, llama3, yarn, longrope.")
