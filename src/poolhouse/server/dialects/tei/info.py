"""What TEI's /info says of a model, and the headers that say what a request took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import poolhouse
from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.inputs.prompts import Prompt
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects.vllm.classify import label_names
from poolhouse.server.engines import Serving

# Pooling words of TEI that differ from ours.
_POOLING = {"last": "last_token"}


def info(serving: Serving, engine: PoolingEngine) -> dict[str, Any]:
    """The body of /info: TEI's fields, then what else this server limits."""
    about, settings = engine.facts, serving.settings
    return {
        "model_id": engine.facts.name,
        "model_sha": None,
        "model_dtype": about.dtype,
        "served_model_name": engine.facts.name,
        "model_type": _model_type(engine),
        "max_concurrent_requests": settings.max_queued_prompts,
        "max_input_length": engine.facts.max_tokens,
        "max_batch_tokens": about.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": True,
        "tokenization_workers": about.tokenizer_threads,
        "version": poolhouse.__version__,
        "sha": None,
        "docker_label": None,
        "tasks": list(engine.facts.tasks),
        "max_body_bytes": settings.max_body_bytes,
        "request_timeout_seconds": settings.request_timeout_seconds,
    }


def is_splade(engine: PoolingEngine) -> bool:
    """Whether its vectors are weights of vocabulary entries."""
    return engine.facts.sparse is not None and engine.facts.sparse.unit == "vocabulary"


def headers(engine: PoolingEngine, answers: Sequence[Answer], characters: int, started: float) -> dict[str, str]:
    """What a request took, in whole milliseconds; of several inputs the mean, as in TEI.

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


def _model_type(engine: PoolingEngine) -> dict[str, Any]:
    if "classify" in engine.facts.tasks:
        names = label_names(engine)
        labels = {
            "id2label": {str(place): name for place, name in enumerate(names)},
            "label2id": {name: place for place, name in enumerate(names)},
        }
        return {"reranker" if engine.facts.labels == 1 else "classifier": labels}
    pooling = engine.facts.pooling or "none"
    return {"embedding": {"pooling": "splade" if is_splade(engine) else _POOLING.get(pooling, pooling)}}


def _mean(seconds: Iterable[float]) -> str:
    parts = list(seconds)
    return _milliseconds(sum(parts) / max(len(parts), 1))


def _milliseconds(seconds: float) -> str:
    return str(int(1000 * seconds))
