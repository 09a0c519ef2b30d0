"""Config: config.json with the user's changes, and what it says of names and lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from poolhouse.errors import ConfigError
from poolhouse.files import Folder, JsonObject
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles

Overrides = Config | Callable[[JsonObject], Config] | None


def overridden(config: JsonObject, overrides: Overrides) -> JsonObject:
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


# Where neither the config nor the tokenizer states a limit.
_DEFAULT_MAX_TOKENS = 2048


def longest_prompt(
    by_config: int | None,
    folder: Folder,
    files: SentenceTransformersFiles,
    requested: int | None,
    longest_side: int | None = None,
    endless: bool = False,
) -> int:
    """The longest prompt: sentence-transformers' max_seq_length, else the lesser of config and tokenizer.

    The user may request more than these, but not more than by_config, unless the model is endless: it has no
    positions, but counts distances. folder: of the weights, with the tokenizer that they were trained with.
    longest_side: tokens of the longer of query and document of a late-interaction model, whose other files state the
    length of the one that was read last.

    Raises:
        ConfigError: the user requests more.
    """
    limit = by_config
    by_tokenizer = folder.json("tokenizer_config.json", needed=False).get("model_max_length")
    # transformers writes 1e30 for "no limit".
    if isinstance(by_tokenizer, int | float) and 0 < by_tokenizer < 1e9:
        limit = min(limit or int(by_tokenizer), int(by_tokenizer))
    if files.max_seq_length is not None:
        limit = files.max_seq_length if by_config is None else min(files.max_seq_length, by_config)
    if longest_side is not None:
        limit = by_config or longest_side
    limit = limit or _DEFAULT_MAX_TOKENS
    if requested is None or requested == -1:
        return limit
    if requested < 1:
        raise ConfigError(f"max_model_len must be at least 1, or -1 for the model's own limit, got {requested}.")
    if by_config is not None and requested > by_config and not endless:
        raise ConfigError(
            f"max_model_len={requested} is more than the {by_config} positions that the model was made for."
        )
    return requested


def architecture(config: Config) -> str:
    """The name of the checkpoint's class; its model type where it names none."""
    return next(iter(config.get("architectures") or ()), str(config.get("model_type")))
