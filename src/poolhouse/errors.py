"""What can go wrong, and whose turn it is to act.

PoolhouseError
├── InvalidRequest          the caller's words; one request fails, others go on (HTTP 400)
│   ├── InputTooLong        more tokens than the model or the caller allows
│   ├── NoStep              process rewards of a prompt without a step
│   ├── UnsupportedTask     the model cannot do this task; says what it can do
│   ├── UnsupportedDimensions  a Matryoshka size that the model does not offer
│   └── UnknownModel        a model name that is not served here (HTTP 404)
├── ConfigError             an option of the engine that cannot be honoured
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
    """A request that cannot be answered as it was asked.

    `parameter` names the field to change, `value` is what it held.
    """

    def __init__(self, message: str, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class InputTooLong(InvalidRequest):
    """A prompt of more tokens than allowed."""


class NoStep(InvalidRequest):
    """A prompt without the token whose rows were asked for, or of special tokens where those are left out."""

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
    """An output size that this model does not offer."""


class UnknownModel(InvalidRequest):
    """A model name that is not served here."""


class ConfigError(PoolhouseError, ValueError):
    """An option, or a combination of options, that cannot be honoured."""


class CheckpointError(PoolhouseError):
    """Model files that are missing, corrupt or not understood."""


class EngineError(PoolhouseError, RuntimeError):
    """The engine could not answer a valid request."""


class NonFiniteResult(EngineError):
    """An answer that holds NaN or infinity."""


class EngineClosed(EngineError):
    """The engine is shut down or was shut down before it could answer."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`, else nothing."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean '{near}'?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is nearly, in whatever case and with - or _; None where it is near none."""
    by_key = {_key(one): one for one in known}
    # No known name is longer; comparing a caller's megabytes would take seconds.
    near = difflib.get_close_matches(_key(name[:100]), list(by_key), n=1)
    return by_key[near[0]] if near else None


def _key(name: str) -> str:
    return name.lower().replace("-", "_")
