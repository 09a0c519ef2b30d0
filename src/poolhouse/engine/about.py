"""About: what an engine tells of itself to those who ask over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolhouse.engine.options import EngineOptions
    from poolhouse.models.model import Model


@dataclass(frozen=True, slots=True)
class About:
    """How a model is run.

    dtype, device: of its weights, in torch's words ("float32", "cpu").
    pooling: what makes one vector of a text's rows ("mean"); None where no task does.
    max_batch_tokens: tokens of one pack. tokenizer_threads: how many texts are tokenised side by side.
    default_prompt_name: the prompt that is put before texts where a request names none.
    width: the length of a vector of `embed` before Matryoshka cuts; None where the model has none.
    """

    dtype: str
    device: str
    pooling: str | None = None
    max_batch_tokens: int | None = None
    tokenizer_threads: int | None = None
    default_prompt_name: str | None = None
    width: int | None = None

    @classmethod
    def of(cls, model: Model, options: EngineOptions) -> About:
        """What is known of a loaded model."""
        facts, pipeline = model.facts, model.pipelines.get("embed")
        return cls(
            str(facts.dtype).removeprefix("torch."),
            facts.device.type,
            None if pipeline is None else pipeline.steps[0].words,
            options.max_batch_tokens,
            options.tokenizer_threads,
            facts.default_prompt_name,
            None if pipeline is None else pipeline.width,
        )
