"""The user's changes to config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from poolhouse.errors import ConfigError

Overrides = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]] | None


def overridden(config: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """config.json with the user's changes; nested objects are merged key by key."""
    if overrides is None:
        return config
    if callable(overrides):
        changed = overrides(dict(config))
        if not isinstance(changed, Mapping):
            raise ConfigError(f"hf_overrides must return the changed config, a mapping; it returned {changed!r}.")
        return dict(changed)
    merged = dict(config)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged
