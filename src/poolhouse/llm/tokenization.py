"""What vLLM's `tokenization_kwargs` ask."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from poolhouse.engine.request import Request
from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.params import PoolingParams

_KNOWN = (
    *("add_special_tokens", "do_lower_case", "max_length"),
    *("truncate_prompt_tokens", "truncation", "truncation_side"),
)
# Nothing is padded or decoded here, so these change no number.
_MEANINGLESS = ("needs_detokenization", "pad_prompt_tokens", "padding")
_CUTS = (True, "longest_first")
_DOES_NOT_CUT = (None, False, "do_not_truncate")


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How to make tokens; None leaves it to the parameters or the model.

    keep, side: see `PoolingParams`. max_tokens: refuse longer prompts.
    """

    keep: int | None = None
    side: Literal["left", "right"] | None = None
    max_tokens: int | None = None
    lower_case: bool | None = None
    add_special_tokens: bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Tokenization:
        """Options as vLLM reads them: max_length is what `truncation` cuts to, and a limit without it.

        Raises:
            InvalidRequest: an option that is unknown or cannot be honoured.
        """
        if not options:
            return cls()
        _check(options)
        longest, truncation = options.get("max_length"), options.get("truncation")
        keep = options.get("truncate_prompt_tokens")
        if truncation in _CUTS and keep is None:
            keep = -1 if longest is None else longest
        return cls(
            keep=keep,
            side=options.get("truncation_side"),
            max_tokens=longest if keep is None else None,
            lower_case=options.get("do_lower_case"),
            add_special_tokens=options.get("add_special_tokens", True),
        )

    def params(self, params: PoolingParams | None) -> PoolingParams:
        """The caller's parameters, cut as was asked here."""
        params = params or PoolingParams()
        if self.keep is None and self.side is None:
            return params
        return replace(
            params,
            truncate_prompt_tokens=params.truncate_prompt_tokens if self.keep is None else self.keep,
            truncation_side=self.side or params.truncation_side,
        )

    def applied(self, request: Request) -> Request:
        """The request with everything else that was asked here."""
        if (self.max_tokens, self.lower_case, self.add_special_tokens) == (None, None, True):
            return request
        return replace(
            request,
            max_tokens=self.max_tokens,
            lower_case=self.lower_case,
            add_special_tokens=self.add_special_tokens,
        )


def _check(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _KNOWN and name not in _MEANINGLESS:
            raise InvalidRequest(
                f"tokenization_kwargs has no option '{name}'.{did_you_mean(name, _KNOWN)} Options: {list(_KNOWN)}.",
                name,
            )
    ignored = [name for name in _MEANINGLESS if name in options]
    if ignored:
        warnings.warn(
            f"tokenization_kwargs: {', '.join(ignored)} mean nothing here and are ignored; prompts are never padded.",
            stacklevel=5,
        )
    for name in ("add_special_tokens", "do_lower_case"):
        if not isinstance(options.get(name, True), bool):
            raise InvalidRequest(f"{name} must be true or false, got {options[name]!r}", name, options[name])
    longest = options.get("max_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise InvalidRequest(f"max_length must be an integer from 1, got {longest!r}", "max_length", longest)
    truncation = options.get("truncation")
    if truncation not in (*_CUTS, *_DOES_NOT_CUT):
        raise InvalidRequest(
            f"truncation must be one of {[*_CUTS, *_DOES_NOT_CUT]}, got {truncation!r}", "truncation", truncation
        )
