"""Limit: how long a prompt may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poolhouse.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a prompt may be, and what to do when it is longer.

    max_tokens: the model's limit, special tokens included. keep: cut to this many; -1 means max_tokens.
    side: "right" drops the end, "left" the beginning. overflow applies where `keep` is None.
    chunked_tokens: how long a prompt may be that is to be split; None: no limit.
    max_query_tokens, max_document_tokens: what each side of a pair is cut to first, special tokens not counted.
    """

    max_tokens: int
    keep: int | None = None
    side: Literal["left", "right"] = "right"
    overflow: Literal["error", "truncate", "chunk"] = "error"
    add_special_tokens: bool = True
    chunked_tokens: int | None = None
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None

    @property
    def most(self) -> int | None:
        """Tokens from which on a prompt that is not to be cut is refused, or None where it never is."""
        return self.chunked_tokens if self.overflow == "chunk" else self.max_tokens

    @property
    def cut(self) -> int | None:
        """Tokens to cut to, or None where nothing is to be cut.

        Raises:
            InvalidRequest: more than the model takes.
        """
        if self.keep is None:
            return self.max_tokens if self.overflow == "truncate" else None
        if self.keep > self.max_tokens:
            raise InvalidRequest(
                "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
                "truncate_prompt_tokens",
                self.keep,
            )
        return self.max_tokens if self.keep == -1 else self.keep
