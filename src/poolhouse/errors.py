"""Errors: what can go wrong, by who can mend it.

PoolhouseError
├── InvalidRequest          a request of the caller; it fails alone, others continue (HTTP 400)
│   ├── InputTooLong        more tokens than the model or the caller allows
│   ├── NoStep              process rewards of a prompt without a step tag
│   ├── UnsupportedTask     the model does not have this task; names those it has
│   ├── UnsupportedDimensions  a Matryoshka size that the model does not offer
│   ├── UnknownModel        a model name that is not served here (HTTP 404)
│   └── FetchFailed         a picture that its URL does not give (HTTP 422)
├── ConfigError             an option that cannot be applied
├── CheckpointError         files that are missing, corrupt or not understood
└── EngineError             the engine could not answer
    ├── NonFiniteResult     NaN or infinity in one answer
    └── EngineClosed        submitted after, or cut off by, shutdown
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PoolhouseError(Exception):
    """Base of everything that Poolhouse raises on purpose."""


class InvalidRequest(PoolhouseError, ValueError):
    """A request that cannot be answered.

    parameter: the field to change. value: what it held.
    """

    def __init__(self, message: str, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class InputTooLong(InvalidRequest):
    """A prompt of more tokens than allowed."""


class NoStep(InvalidRequest):
    """A prompt without a token that the answer has rows for: no step tag, or special tokens only."""

    def __init__(
        self,
        message: str = "The prompt holds no step tag (step_tag_id), or other token that the model answers at, so there "
        "is no row.",
        parameter: str | None = "prompt",
        value: object = None,
    ) -> None:
        super().__init__(message, parameter, value)


class UnsupportedTask(InvalidRequest):
    """A task that this model does not offer."""


class UnsupportedDimensions(InvalidRequest):
    """An output size (Matryoshka) that this model does not offer."""


class UnknownModel(InvalidRequest):
    """A model name that is not served here."""


class FetchFailed(InvalidRequest):
    """A picture that could not be fetched from its URL."""


class ConfigError(PoolhouseError, ValueError):
    """An option, or a combination of options, that cannot be applied."""


class CheckpointError(PoolhouseError):
    """Model files that are missing, corrupt or not understood."""


class EngineError(PoolhouseError, RuntimeError):
    """The engine could not answer a valid request."""


class NonFiniteResult(EngineError):
    """An answer that holds NaN or infinity."""


class EngineClosed(EngineError):
    """The engine is shut down or was shut down before it could answer."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`; "" where none is near."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean '{near}'?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, whatever its case and with - or _; None where none is near."""
    by_key = {_key(one): one for one in known}
    # No known name is longer; comparing a caller's megabytes would take seconds.
    near = difflib.get_close_matches(_key(name[:100]), list(by_key), n=1)
    return by_key[near[0]] if near else None


def _key(name: str) -> str:
    return name.lower().replace("-", "_")
