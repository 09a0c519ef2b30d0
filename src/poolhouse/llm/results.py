"""Answers of the engine, waited for and turned into what a caller of LLM gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, Request, pooling, prompt_fields
from poolhouse.engine.waiting import prompt_path, with_path
from poolhouse.errors import InvalidRequest
from poolhouse.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from poolhouse.plans.late_chunking import fixed_chunks
from poolhouse.plans.scoring import Score

T = TypeVar("T")

# Progress is drawn only when there is enough to wait for.
_PROGRESS_FROM = 256


def pooled(engine: PoolingEngine) -> Callable[[str, tuple[Request, Answer]], PoolingRequestOutput]:
    """The rows of any task, and what each stands for where they are those of chunks."""

    def build(request_id: str, answered: tuple[Request, Answer]) -> PoolingRequestOutput:
        request, answer = answered
        output = pooling(request.task, engine)(request_id, answer)
        chunking = request.params.late_chunking_params
        return output if chunking is None else replace(output, late_chunking=fixed_chunks(chunking, answer.tokens))

    return build


def embedded(engine: PoolingEngine) -> Callable[[str, tuple[Request, Answer]], Any]:
    """An EmbeddingRequestOutput; a PoolingRequestOutput of what was answered with a matrix."""
    matrix = pooled(engine)

    def build(request_id: str, answered: tuple[Request, Answer]) -> Any:
        request, answer = answered
        if request.task == "token_embed":
            return matrix(request_id, answered)
        return EmbeddingRequestOutput(request_id, EmbeddingOutput(answer.array), **prompt_fields(answer))

    return build


def classification(
    labels: Mapping[int, str],
) -> Callable[[str, Answer], ClassificationRequestOutput]:
    """Answers with the name of the likeliest of these labels."""

    def named(request_id: str, answer: Answer) -> ClassificationRequestOutput:
        output = ClassificationOutput(answer.array, labels.get(int(answer.array.argmax())))
        return ClassificationRequestOutput(request_id, output, **prompt_fields(answer))

    return named


def scored(request_id: str, score: Score) -> ScoringRequestOutput:
    """A pair's score; its token ids are those of all prompts that were run for it."""
    prompts = [prompt_fields(answer) for answer in score.answers]
    return ScoringRequestOutput(
        request_id,
        ScoringOutput(score.score),
        prompt_token_ids=[token for own in prompts for token in own["prompt_token_ids"]],
        truncated=any(own["truncated"] for own in prompts),
        original_tokens=sum(own["original_tokens"] for own in prompts),
        original_is_estimate=any(own["original_is_estimate"] for own in prompts),
    )


def wait(
    futures: Sequence[Future[Answer]],
    progress: bool | Callable[..., Any],
    label: str,
    place: Callable[[int], str] = prompt_path,
) -> list[Answer]:
    """All answers in order; the first failure is raised, and what still waits is cancelled.

    place: where the caller gave the prompt of a request, for messages.
    """
    try:
        return [future.result() for future in shown(futures, len(futures), progress, label)]
    except BaseException as error:
        for future in futures:
            future.cancel()
        if isinstance(error, InvalidRequest):
            raise with_path(error, futures, place) from None
        raise


def shown(items: Iterable[T], total: int, progress: bool | Callable[..., Any], label: str) -> Iterable[T]:
    """The items, drawn as progress where that is wanted and there is enough to wait for."""
    drawn: Iterable[T] = items
    if callable(progress):
        drawn = progress(items, total=total, desc=label)
    elif progress and total >= _PROGRESS_FROM:
        from tqdm import tqdm

        drawn = tqdm(items, total=total, desc=label, unit=" prompts", dynamic_ncols=True, disable=None)
    return drawn
