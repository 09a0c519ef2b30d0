"""EngineOptions: how an engine works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poolhouse.inputs.conversations import Conversations
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.params import PoolingParams
from poolhouse.vectors.precision import Calibration


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine works, as opposed to what its model is.

    max_batch_tokens: tokens of one pack. workers: batches that run at a time.
    overflow: what to do with prompts over the model's limit.
    max_prompt_tokens: another limit of prompts; with overflow "chunk" the only one.
    default_params: what the model's owner wants where a request says nothing.
    score_template: what joins a query and a document, where the tokenizer does not.
    conversations: the chat templates that messages go through.
    aliases: names beside the model's own that requests may use. unlisted_names: further ones, of which no list tells.
    truncation_side: which end of a prompt is dropped where a request does not say.
    calibration: the ranges of int8 vectors, of the task `embed`, or of `token_embed` where the model has no other.
    """

    max_batch_tokens: int
    overflow: Literal["error", "truncate", "chunk"] = "error"
    max_prompt_tokens: int | None = None
    tokenizer_threads: int = 2
    workers: int = 1
    default_params: PoolingParams = PoolingParams()
    score_template: ScoreTemplate | None = None
    conversations: Conversations = Conversations()
    aliases: tuple[str, ...] = ()
    unlisted_names: tuple[str, ...] = ()
    truncation_side: Literal["left", "right"] = "right"
    calibration: Calibration | None = None
