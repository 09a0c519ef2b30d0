"""Pipeline: the pooling steps of one task, from hidden states to the answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Literal

import torch

from poolhouse.errors import InvalidRequest
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.splade import SparseEncoder
from poolhouse.pooling.steps import (
    AtTokens,
    Dense,
    Every,
    Kept,
    Norm,
    Normalize,
    Probabilities,
    Reduce,
    Step,
    StepTags,
    WithoutEnds,
)
from poolhouse.tasks import TOKEN_TASKS, SparseHead, Task

Place = Literal["first", "last"]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The steps of one task.

    width: features of its answer, before Matryoshka cuts. sparse: how its answer becomes a sparse vector, if it does.
    """

    steps: tuple[Step, ...]
    width: int
    sparse: SparseHead | None = None

    @property
    def description(self) -> str:
        """The steps for people: "mean > dense 384 > truncate > normalize"."""
        return " > ".join(step.description for step in self.steps)

    @property
    def place(self) -> Place | None:
        """Where the only row of each prompt stands that counts; None where several do."""
        reduce = self.steps[0]
        if not isinstance(reduce, Reduce):
            return None
        if reduce.names == ("CLS",) and reduce.include_prompt:
            return "first"
        return "last" if reduce.names == ("LAST",) else None

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        for step in self.steps:
            rows = step(rows, params)
        return rows

    def check(self, params: PoolingParams) -> None:
        """Raise InvalidRequest for parameters that no step of this task can honour."""
        steps = [step for step in self.steps if isinstance(step, StepTags)]
        if not steps and (params.step_tag_id is not None or params.returned_token_ids is not None):
            raise InvalidRequest(
                "step_tag_id and returned_token_ids belong to STEP pooling, which this model does not use; "
                "load it with pooler_config={'tok_pooling_type': 'STEP', ...}.",
                "step_tag_id",
            )
        for step in steps:
            step.check(params)

    def activates(self, params: PoolingParams) -> bool:
        """Whether an answer is normalised, or consists of probabilities."""
        last = self.steps[-1]
        default = isinstance(last, Normalize | Probabilities) and last.default
        return default if params.use_activation is None else params.use_activation

    def of_spans(self, task: Task) -> Pipeline:
        """The same steps after the mean of each span, for late chunking (Günther et al. 2024).

        In a token task all tokens count, also those that get no row of their own, as in vLLM.

        Raises:
            InvalidRequest: no mean can be put before these steps.
        """
        index = next((index for index, step in enumerate(self.steps) if isinstance(step, Reduce)), 0)
        reduce, rest = self.steps[index], self.steps[index + 1 :]
        if task in TOKEN_TASKS and not any(isinstance(step, AtTokens | StepTags) for step in self.steps):
            behind = dropwhile(lambda step: isinstance(step, Every | Kept | WithoutEnds), self.steps)
            return replace(self, steps=(Reduce(("MEAN",)), *behind))
        heads = [step for step in rest if isinstance(step, Dense | Norm | SparseEncoder)]
        if not isinstance(reduce, Reduce) or (len(reduce.names) > 1 and heads):
            raise InvalidRequest(
                f"Late chunking puts a mean before the model's heads; here they follow {reduce.description}."
            )
        return replace(self, steps=(*self.steps[:index], Reduce(("MEAN",)), *rest))

    def to(self, device: torch.device) -> Pipeline:
        return replace(self, steps=tuple(step.to(device) for step in self.steps))
