"""What callers may ask of a pooler: per request (`PoolingParams`) and per model (`PoolerConfig`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from poolhouse.errors import ConfigError, InvalidRequest, UnsupportedDimensions, did_you_mean
from poolhouse.tasks import Task

# The pooling words of vLLM (upper case) and of sentence-transformers, under one spelling each.
PoolingType = Literal["CLS", "LAST", "MEAN", "MAX", "WEIGHTEDMEAN", "MEAN_SQRT_LEN", "ALL", "STEP"]


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What one request asks of the pooler; `None` leaves it to the model.

    dimensions: length of the vector, for Matryoshka models.
    use_activation: normalise embeddings, or turn logits into probabilities.
    truncate_prompt_tokens: keep this many tokens; -1 keeps as many as the model takes.
    truncation_side: "right" drops the end of the prompt, "left" its beginning.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        _check_integer("dimensions", self.dimensions)
        _check_integer("step_tag_id", self.step_tag_id)
        _check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens)
        if self.use_activation is not None and not isinstance(self.use_activation, bool):
            raise InvalidRequest(
                f"use_activation must be true, false or null, got {self.use_activation!r}", "use_activation"
            )
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 (the model's limit) or at least 1, "
                f"got {self.truncate_prompt_tokens}",
                "truncate_prompt_tokens",
                self.truncate_prompt_tokens,
            )
        if self.truncation_side not in ("left", "right"):
            raise InvalidRequest(
                f"truncation_side must be 'left' or 'right', got {self.truncation_side!r}", "truncation_side"
            )
        if self.returned_token_ids is not None and not isinstance(self.returned_token_ids, tuple):
            object.__setattr__(self, "returned_token_ids", tuple(self.returned_token_ids))

    def for_pooler(self) -> PoolingParams:
        """Only what a pooling pipeline reads, so that equal poolings compare equal."""
        if self.truncate_prompt_tokens is None and self.truncation_side == "right":
            return self
        return replace(self, truncate_prompt_tokens=None, truncation_side="right")

    def check(self, task: Task, matryoshka: Matryoshka, model_name: str) -> None:
        """Refuse what `task` cannot honour or the model does not offer.

        Raises:
            InvalidRequest, UnsupportedDimensions: naming the field.
        """
        if self.dimensions is not None:
            if task not in ("embed", "token_embed"):
                raise InvalidRequest(
                    f"Task '{task}' only supports ['use_activation'] parameters, "
                    "does not support ['dimensions'] parameters",
                    "dimensions",
                    self.dimensions,
                )
            matryoshka.check(self.dimensions, model_name)


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """Which output sizes a model offers: none, any up to its width, or a list."""

    width: int
    supported: bool = False
    dimensions: tuple[int, ...] = ()

    def check(self, dimensions: int, model_name: str) -> None:
        """Raise UnsupportedDimensions unless the model offers vectors of this length."""
        if not self.supported:
            raise UnsupportedDimensions(
                f'Model "{model_name}" does not support matryoshka representation, '
                "changing output dimensions will lead to poor results."
            )
        if dimensions < 1:
            raise UnsupportedDimensions("Dimensions must be greater than 0")
        if self.dimensions and dimensions not in self.dimensions:
            raise UnsupportedDimensions(
                f'Model "{model_name}" only supports {list(self.dimensions)} matryoshka dimensions, '
                "use other output dimensions will lead to poor results."
            )
        if dimensions > self.width:
            raise UnsupportedDimensions(
                f'Model "{model_name}" only supports dimensions in range [1, {self.width}], got {dimensions}.'
            )


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """How a model pools, where the user wants it otherwise than its files say.

    pooling_type: shorthand for the next two; ALL and STEP concern token tasks, the others whole prompts.
    A pooling may be a concatenation, as in sentence-transformers: "CLS+MEAN".
    """

    pooling_type: str | None = None
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None
    use_activation: bool | None = None
    dimensions: int | None = None
    enable_chunked_processing: bool = False
    max_embed_len: int | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if self.pooling_type is not None:
            if self.seq_pooling_type is not None or self.tok_pooling_type is not None:
                raise ConfigError(
                    "pooler_config: give pooling_type, or seq_pooling_type and tok_pooling_type, not both."
                )
            word = self.pooling_type.upper()
            target = "tok_pooling_type" if word in ("ALL", "STEP") else "seq_pooling_type"
            object.__setattr__(self, target, word)
        if self.seq_pooling_type is not None:
            object.__setattr__(self, "seq_pooling_type", _pooling_words(self.seq_pooling_type))
        if self.tok_pooling_type is not None:
            word = self.tok_pooling_type.upper()
            if word not in ("ALL", "STEP"):
                raise ConfigError(f"pooler_config: tok_pooling_type is ALL or STEP, got {word!r}.")
            object.__setattr__(self, "tok_pooling_type", word)
        if self.logit_sigma == 0:
            raise ConfigError("pooler_config: logit_sigma must not be 0.")
        if self.returned_token_ids is not None:
            object.__setattr__(self, "returned_token_ids", tuple(self.returned_token_ids))

    @classmethod
    def parse(cls, given: PoolerConfig | Mapping[str, Any] | None) -> PoolerConfig:
        """A config from what users write: a PoolerConfig, a mapping, or nothing.

        Raises:
            ConfigError: an unknown field; the message names the nearest known one.
        """
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(f"pooler_config must be a PoolerConfig or a mapping, got {type(given).__name__}.")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"pooler_config has no field '{name}'.{did_you_mean(name, known)} Fields: {known}.")
        return cls(**given)


_SEQUENCE_POOLINGS = ("CLS", "LAST", "MEAN", "MAX", "WEIGHTEDMEAN", "MEAN_SQRT_LEN")


def _pooling_words(text: str) -> str:
    words = [word.strip().upper() for word in text.split("+")]
    for word in words:
        if word not in _SEQUENCE_POOLINGS:
            raise ConfigError(
                f"pooler_config: unknown pooling type {word!r}.{did_you_mean(word, _SEQUENCE_POOLINGS)} "
                f"Pooling types: {list(_SEQUENCE_POOLINGS)}, joined by '+' to concatenate, and ALL or STEP for tokens."
            )
    return "+".join(words)


def _check_integer(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidRequest(f"{name} must be an integer or null, got {value!r}", name, value)
