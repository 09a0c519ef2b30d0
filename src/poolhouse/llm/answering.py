"""Answers of the engine, waited for and turned into what a caller of LLM gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from poolhouse.engine.answers import facts
from poolhouse.engine.request import Answer
from poolhouse.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from poolhouse.scoring import Score

# Progress is drawn only when there is enough to wait for.
_PROGRESS_FROM = 256


def embedding(request_id: str, answer: Answer) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(request_id, EmbeddingOutput(answer.array), **facts(answer))


def classification(
    labels: Mapping[int, str],
) -> Callable[[str, Answer], ClassificationRequestOutput]:
    """Answers with the name of the likeliest of these labels."""

    def named(request_id: str, answer: Answer) -> ClassificationRequestOutput:
        output = ClassificationOutput(answer.array, labels.get(int(answer.array.argmax())))
        return ClassificationRequestOutput(request_id, output, **facts(answer))

    return named


def scored(request_id: str, score: Score) -> ScoringRequestOutput:
    """A pair's score; its token ids are those of all prompts that were run for it."""
    prompts = [facts(answer) for answer in score.answers]
    return ScoringRequestOutput(
        request_id,
        ScoringOutput(score.score),
        prompt_token_ids=[token for own in prompts for token in own["prompt_token_ids"]],
        truncated=any(own["truncated"] for own in prompts),
        original_tokens=sum(own["original_tokens"] for own in prompts),
        original_is_estimate=any(own["original_is_estimate"] for own in prompts),
    )


def wait(futures: Sequence[Future[Answer]], progress: bool | Callable[..., Any], label: str) -> list[Answer]:
    """All answers in order; the first failure is raised, and what still waits is cancelled."""
    waited: Iterable[Future[Answer]] = futures
    if callable(progress):
        waited = progress(futures, total=len(futures), desc=label)
    elif progress and len(futures) >= _PROGRESS_FROM:
        from tqdm import tqdm

        waited = tqdm(futures, desc=label, unit=" prompts", dynamic_ncols=True, disable=None)
    try:
        return [future.result() for future in waited]
    except BaseException:
        for future in futures:
            future.cancel()
        raise
