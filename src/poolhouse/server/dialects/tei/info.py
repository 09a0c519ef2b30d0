"""Info: TEI's description of a model, and its headers with the time and tokens of a request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Literal

from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.inputs.prompts import Prompt
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects.vllm.classify import label_names
from poolhouse.settings import ServerSettings
from poolhouse.tasks import Task
from poolhouse.version import __version__

# TEI's names of pooling methods, where they differ from ours.
_POOLING = {"last": "last_token"}

ModelType = Literal["embedding", "classifier", "reranker"]


class Info(TypedDict):
    """The model and the server's limits."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[ModelType, dict[str, object]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int | None
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int | None
    version: str
    sha: str | None
    docker_label: str | None
    tasks: list[Task]
    max_body_bytes: int
    request_timeout_seconds: float


def info(engine: PoolingEngine, settings: ServerSettings) -> Info:
    """The body of /info: TEI's fields, then what else this server limits."""
    facts = engine.facts
    return {
        "model_id": facts.name,
        "model_sha": None,
        "model_dtype": facts.dtype,
        "served_model_name": facts.name,
        "model_type": _model_type(engine),
        "max_concurrent_requests": settings.max_queued_prompts,
        "max_input_length": facts.max_tokens,
        "max_batch_tokens": facts.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": True,
        "tokenization_workers": facts.tokenizer_threads,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "tasks": list(facts.tasks),
        "max_body_bytes": settings.max_body_bytes,
        "request_timeout_seconds": settings.request_timeout_seconds,
    }


def is_splade(engine: PoolingEngine) -> bool:
    """Whether its vectors are weights of vocabulary entries."""
    return engine.facts.sparse is not None and engine.facts.sparse.unit == "vocabulary"


COST = {
    "x-compute-type": "The device.",
    "x-compute-characters": "Characters of the inputs.",
    "x-compute-tokens": "Tokens of the inputs.",
    "x-compute-time": "Milliseconds in all, as x-total-time.",
    "x-total-time": "Milliseconds in all.",
    "x-tokenization-time": "Milliseconds, the mean of the inputs.",
    "x-queue-time": "Milliseconds, the mean of the inputs.",
    "x-inference-time": "Milliseconds, the mean of the inputs.",
}


def headers(engine: PoolingEngine, answers: Sequence[Answer], characters: int, started: float) -> dict[str, str]:
    """What a request took, in the headers of `COST`; of several inputs the mean, as in TEI.

    characters: of all inputs. started: the reading of the clock `time.perf_counter` when work began.
    """
    total = _milliseconds(time.perf_counter() - started)
    device = engine.facts.device
    timings = [answer.timing for answer in answers]
    return {
        "x-compute-type": f"{'gpu' if device == 'cuda' else device}+optimized",
        "x-compute-time": total,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(_replies.tokens_of(answers)),
        "x-total-time": total,
        "x-tokenization-time": _mean(timing.tokenize_seconds for timing in timings),
        "x-queue-time": _mean(timing.queue_seconds for timing in timings),
        "x-inference-time": _mean(timing.run_seconds for timing in timings),
    }


def characters(prompts: Iterable[Prompt]) -> int:
    """How many characters prompts have; token ids count one each."""
    return sum(
        len(prompt.text or "") + len(prompt.pair or "") + (0 if prompt.ids is None else len(prompt.ids))
        for prompt in prompts
    )


def _model_type(engine: PoolingEngine) -> dict[ModelType, dict[str, object]]:
    if "classify" in engine.facts.tasks:
        names = label_names(engine)
        labels: dict[str, object] = {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
        }
        return {"reranker" if engine.facts.labels == 1 else "classifier": labels}
    pooling = engine.facts.pooling or "none"
    return {"embedding": {"pooling": "splade" if is_splade(engine) else _POOLING.get(pooling, pooling)}}


def _mean(seconds: Iterable[float]) -> str:
    parts = list(seconds)
    return _milliseconds(sum(parts) / max(len(parts), 1))


def _milliseconds(seconds: float) -> str:
    return str(int(1000 * seconds))
